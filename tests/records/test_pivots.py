# SPDX-License-Identifier: Apache-2.0
"""A live merge that took effect and did not come to its end: base is right, and top is old."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.pivot import LivePivotUnclear, LivePivotUnfinished
from chainmerge.records.live_journal import save_live_journal
from tests.records.killed import chain
from tests.records.pivoted import pivoted
from tests.support.qemu import content, qemu_io

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "options",
    [
        MergeOptions(direction="pull"),
        MergeOptions(direction="pull", delete=True),
        MergeOptions(keep_name=True),
        MergeOptions(keep_name=True, delete=True),
    ],
)
def test_what_a_pivot_has_left_does_not_become_the_result(
    tmp_path: Path, options: MergeOptions
) -> None:
    """The guest went on in base; whoever asks for the result in top would go on in old data."""
    base, top = chain(tmp_path, "base", "top")
    save_live_journal(pivoted(base, top))
    qemu_io(base, "write -P 9 0 1M")
    newer = content(base)
    in_base = Access(active=str(base))
    for access in (in_base, Access()):
        with pytest.raises((LivePivotUnfinished, LivePivotUnclear)) as refused:
            chainmerge.merge(top, base, access, options)
        assert content(base) == newer
    with pytest.raises(LivePivotUnfinished) as refused:
        chainmerge.merge(top, base, in_base, options)
    plan = chainmerge.plan(top, base, in_base, options)
    assert plan.refusals[0].code == LivePivotUnfinished.code
    assert top.exists()
    assert str(base) in refused.value.finish


def test_a_plan_knows_of_a_pivot(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    save_live_journal(pivoted(base, top))
    assert "was about to take effect" in " ".join(chainmerge.plan(top, base).warnings)
    qemu_io(base, "write -P 9 0 1M")
    plan = chainmerge.plan(top, base, Access(active=str(base)))
    assert (plan.progress, plan.refusals) == ("merged", ())
    assert chainmerge.plan(top, base, Access(active=str(top))).progress == "new"
