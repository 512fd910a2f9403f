# SPDX-License-Identifier: Apache-2.0
"""Disks whose images have the same numbers, on file systems of their own, merged side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.options import Direction, LiveOptions
from tests.support.live_scenario import DISK, stored_bits
from tests.support.live_vm import disk_of_nodes, running_qemu
from tests.support.loopdev import mounted_tmpfs
from tests.support.qemu import content, create, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)

SPACE = 256 << 20
SLOWLY = 16 << 20


def build(directory: Path) -> list[Path]:
    """A base and its overlay, which has a checkpoint and some data that takes a moment to copy."""
    base = create(directory / "base.qcow2", DISK)
    top = create(directory / "top.qcow2", backing=base.name)
    for image in (base, top):
        chainmerge.bitmaps_add(image, "checkpoint")
    qemu_io(base, "write -q -P 1 0 40M")
    qemu_io(top, "write -q -P 2 4M 40M")
    return [base, top]


@pytest.mark.parametrize("direction", [Direction.COMMIT, Direction.PULL])
def test_neither_merge_takes_the_job_of_the_other_for_its_own(
    tmp_path: Path, direction: Direction
) -> None:
    places = [tmp_path / name for name in ("one", "other")]
    for place in places:
        place.mkdir()
    options = LiveOptions(direction=direction, bandwidth=SLOWLY)  # type: ignore[arg-type]
    with mounted_tmpfs(places[0], SPACE) as first, mounted_tmpfs(places[1], SPACE) as second:
        one, other = build(first), build(second)
        assert [image.stat().st_ino for image in one] == [image.stat().st_ino for image in other]
        before = content(one[-1])
        disks = [*disk_of_nodes(one, "disk0", "a"), *disk_of_nodes(other, "disk1", "b")]
        outcomes: list[str] = []
        with running_qemu(tmp_path / "vm", disks) as vm:

            def merge_the_other_one(event: ProgressEvent) -> None:
                if event.stage is Stage.COPY and event.total and not outcomes:
                    outcomes.append("begun")
                    with live.QmpVm(vm.monitor, device="disk1") as disk:
                        outcomes.append(live.merge(disk, other[-1], options=options).outcome)

            with live.QmpVm(str(vm.qmp), device="disk0") as disk:
                report = live.merge(disk, one[-1], options=options, on_progress=merge_the_other_one)
            vm.quit()
        assert (report.outcome, outcomes) == ("merged", ["begun", "merged"])
        for base, top in (one, other):
            result = base if direction is Direction.COMMIT else top
            assert content(result) == before
            assert stored_bits(result).keys() == {"checkpoint"}
