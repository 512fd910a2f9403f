# SPDX-License-Identifier: Apache-2.0
"""Thin volumes of a running VM: their pool is counted, and extended, as in a cold merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.live.errors import LiveMergeFailed
from chainmerge.options import Access, LiveOptions
from chainmerge.storage.volume_errors import ThinPoolFull
from tests.live.test_refusals import read_only_for_good
from tests.support.live_vm import running_vm
from tests.support.lvm_images import MIB, Volumes, lvm_images, on_pool
from tests.support.qemu import assert_clean, content, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chainmerge.options import DirectionChoice

DEVICES = Access(allow_backing=("/dev",))
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volumes]:
    with lvm_images(tmp_path, monkeypatch) as made:
        yield made


@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_a_pool_that_is_too_small_is_refused_or_extended(
    volumes: Volumes, tmp_path: Path, direction: DirectionChoice
) -> None:
    base, top = on_pool(volumes, 10, 99.0)
    qemu_io(base, "write -q -P 3 0 4M")
    expected = content(top)
    with running_vm(tmp_path / "vm", [base, top]) as vm, vm.disk() as disk:
        plain = LiveOptions(direction=direction)
        with pytest.raises(ThinPoolFull) as caught:
            live.merge(disk, top, base, access=DEVICES, options=plain)
        assert "--extend-pool" in caught.value.advice
        assert volumes.lvm.calls("lvextend") == []
        extend = LiveOptions(direction=direction, extend_pool=True)
        plan = live.plan(disk, top, base, DEVICES, extend)
        assert plan.refusals == ()
        assert plan.space.pool is not None
        by = plan.space.pool.extend_by
        assert by >= MIB
        live.merge(disk, top, base, access=DEVICES, options=extend)
        vm.quit()
    # What comes after it is the volume itself, whose size takes nothing of the pool.
    size = f"{10 * MIB + by}b"
    assert volumes.lvm.calls("lvextend")[0] == ["-L", size, "--", f"{volumes.group}/pool"]
    result = base if direction == "commit" else top
    assert content(result) == expected
    assert_clean(result)


def test_a_pool_that_was_extended_for_a_job_that_did_not_begin(
    volumes: Volumes, tmp_path: Path
) -> None:
    """Something was changed, so it is no refusal."""
    base, top = on_pool(volumes, 10, 99.0)
    with running_vm(tmp_path / "vm", [base, top], read_only_for_good) as vm, vm.disk() as disk:
        options = LiveOptions(extend_pool=True)
        with pytest.raises(LiveMergeFailed, match="read-only"):
            live.merge(disk, top, base, access=DEVICES, options=options)
        vm.quit()
    assert len(volumes.lvm.calls("lvextend")) == 1
