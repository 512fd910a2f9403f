# SPDX-License-Identifier: Apache-2.0
"""How times and content are weighed; what they are is looked for in test_which_is_right."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

import chainmerge
from chainmerge.planning import dry_run, evidence
from chainmerge.planning.errors import BaseNewer
from chainmerge.planning.facts import Evidence, ImageTimes
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
MOMENTS = st.none() | st.integers(0, 5)


def image(written: int | None, created: int | None = None, size: int = 1) -> ImageTimes:
    return ImageTimes("image", written, created, size)


@pytest.mark.parametrize(
    ("times", "held", "differing", "equal", "speaks"),
    [
        ((5, 4), 3, 2, False, True),
        ((5, 4), 2, 2, False, False),
        ((5, 4), 3, 0, True, False),
        ((5, 4), 3, 0, None, False),
        ((5, 5), 3, 2, False, False),
        ((4, 5), 3, 2, False, False),
        ((None, 4), 3, 2, False, False),
        ((5, None), 3, 2, False, False),
        ((5, 4, 6), 3, 2, False, False),
        ((5, 4, 3), 3, 2, False, True),
    ],
)
def test_what_speaks_for_base(
    times: tuple[int | None, ...], held: int, differing: int, equal: bool | None, speaks: bool
) -> None:
    found = Evidence(tuple(map(image, times)), held, differing, equal)
    assert found.speaks_for_base is speaks


@given(
    st.lists(st.builds(image, MOMENTS, MOMENTS, st.integers(1, 2)), min_size=2, max_size=5),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([True, False, None]),
)
def test_what_is_equal_raises_no_doubt(
    times: list[ImageTimes], held: int, differing: int, equal: bool | None
) -> None:
    found = Evidence(tuple(times), held, differing, equal)
    if equal:
        assert found.misfits == ()
        assert not found.holds_most
        assert not found.speaks_for_base
    if found.speaks_for_base:
        assert found.misfits[0][0] == times[0]
        assert not found.is_timeless


@pytest.mark.parametrize("seconds", [-(10**12), 0, 10**13])
def test_times_that_no_calendar_has(tmp_path: Path, seconds: int) -> None:
    base = create(tmp_path / "base", MIB)
    top = create(tmp_path / "top", backing=base)
    try:
        os.utime(base, ns=(0, (seconds + 1) * 10**9))
        os.utime(top, ns=(0, seconds * 10**9))
    except OverflowError:
        pytest.skip("such times cannot be given")
    assert chainmerge.plan(top).feasible


def test_a_plan_does_not_compare_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = create(tmp_path / "base", 64 * MIB)
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, "write -P 2 0 32M")
    # As after a pivot, and one small write since at a place that is not looked at.
    qemu_io(base, "write -P 2 0 32M", "write -P 5 64k 4k")
    monkeypatch.setattr(evidence, "PLACES", 16)
    for limit, refused in ((16 * MIB, False), (64 * MIB, True)):
        monkeypatch.setattr(dry_run, "COMPARED_BY_A_PLAN", limit)
        plan = chainmerge.plan(top)
        assert ["base-newer"] * refused == [one.code for one in plan.refusals]
        told = [one for one in plan.warnings if "the merge compares everything" in one]
        assert len(told) == (not refused)
    with pytest.raises(BaseNewer):
        chainmerge.merge(top)
