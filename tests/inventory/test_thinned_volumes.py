# SPDX-License-Identifier: Apache-2.0
"""Snapshots on logical volumes thinned out, killed at every step; what groups get back by merges.

``tests/vm/guest/test_thinned_volumes.py`` does the same with LVM itself.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

import chainmerge
from chainmerge.documents.disks import DiskOutcome
from chainmerge.inventory.errors import ThinningUnfinished
from chainmerge.options import Access, MergeOptions, Retention, ScanOptions
from chainmerge.records import files as state_files
from chainmerge.records.unfinished import status
from chainmerge.storage.locks import LockMode, lock_image
from tests.inventory.trees import DAY
from tests.support.children import is_killed
from tests.support.loopdev import loop_device
from tests.support.lvm_images import DISK, MIB, Volumes, lvm_images
from tests.support.qemu import assert_clean, bitmap_names, content, create, info, qemu_img

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEVICES = Access(allow_backing=("/dev",))
NAMES = (
    "snap_disk_a.qcow2", "snap_disk_b.qcow2", "snap_disk_c.qcow2", "snap_disk_d.qcow2", "disk.qcow2"
)  # fmt: skip
ONE = Retention(keep_last=1)
C_ALONE = Retention(keep=("snap_disk_c*",))


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volumes]:
    with lvm_images(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def images(volumes: Volumes) -> list[Path]:
    paths = volumes.chain(*NAMES)
    volumes.show()
    return paths


def free(volumes: Volumes) -> int:
    return volumes.lvm.free(volumes.group)


def rules_of(report: chainmerge.ThinOutPlan | chainmerge.ThinOutReport) -> list[str]:
    return [str(one.rule) for one in report.snapshots]


def two_ranges(direction: str) -> MergeOptions:
    return MergeOptions(direction=direction)  # type: ignore[arg-type]


# Thinned out


@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_snapshots_on_volumes_go_as_files_do(
    volumes: Volumes, images: list[Path], direction: str
) -> None:
    a, _, c, d, leaf = images
    kept, shown, before = content(c), content(leaf), free(volumes)
    plan = chainmerge.plan_thin_out(leaf, C_ALONE, DEVICES, two_ranges(direction))
    assert (plan.feasible, plan.refusals) == (True, ())
    assert rules_of(plan) == ["no-rule", "no-rule", "keep", "no-rule"], plan.snapshots
    assert [(one.base, one.top) for one in plan.ranges] == [(str(d), str(leaf)), (str(a), str(c))]
    assert [one.occupied_bytes for one in plan.snapshots] == [8 * MIB] * 4
    report = chainmerge.thin_out(leaf, C_ALONE, DEVICES, two_ranges(direction))
    assert [one.outcome for one in report.ranges] == [DiskOutcome.MERGED] * 2, report.ranges
    of_lower, of_upper = (c, leaf) if direction == "pull" else (a, d)
    assert volumes.names() == {
        c.name: volumes.uuids[of_lower.name], leaf.name: volumes.uuids[of_upper.name]
    }  # fmt: skip
    assert (content(c), content(leaf)) == (kept, shown)
    assert info(leaf)["backing-filename"] == c.name
    assert_clean(c)
    assert_clean(leaf)
    assert bitmap_names(leaf)["kept"]["flags"] == ["auto"]
    assert free(volumes) - before == plan.freed_bytes == 24 * MIB
    assert status([]).merges == ()
    assert chainmerge.thin_out(leaf, C_ALONE, DEVICES).ranges == ()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["lvremove", "lvrename"])
def test_killed_on_the_way(volumes: Volumes, images: list[Path], step: str, moment: str) -> None:
    a, b, c, d, leaf = images
    kept, shown, options = content(c), content(leaf), two_ranges("commit")
    kill = volumes.lvm.kill_before if moment == "before" else volumes.lvm.kill_after
    # In the upper range, in which the leaf's own volume goes, and then in the lower one.
    for _ in range(2):
        kill(step)
        assert is_killed(lambda: chainmerge.thin_out(leaf, C_ALONE, DEVICES, options))
        volumes.lvm.mend(step)
        found = status([]).merges
        assert len(found) == 1, found
        (unfinished,) = found
        assert unfinished.command is not None
        assert "thin-out" in unfinished.command
        assert str(leaf) in unfinished.command
        with pytest.raises(ThinningUnfinished):
            chainmerge.thin_out(leaf, ONE, DEVICES, options)
    report = chainmerge.thin_out(leaf, C_ALONE, DEVICES, options)
    assert all(one.is_done for one in report.ranges)
    assert volumes.names() == {
        c.name: volumes.uuids[a.name], leaf.name: volumes.uuids[d.name]
    }  # fmt: skip
    assert (content(c), content(leaf)) == (kept, shown)
    assert info(leaf)["backing-filename"] == c.name
    assert bitmap_names(leaf)["kept"]["flags"] == ["auto"]
    assert not b.exists()
    assert status([]).merges == ()
    assert not list(state_files.STATE_DIRECTORY.glob("*.chainmerge-thin"))


def test_what_stands_in_the_way_of_one_is_kept_or_refuses_all(
    volumes: Volumes, images: list[Path]
) -> None:
    volumes.lvm.set_attributes(NAMES[1], "owi-a-s---")
    with lock_image(images[3], LockMode.READER, 0):
        plan = chainmerge.plan_thin_out(images[-1], Retention(keep_last=0), DEVICES)
    assert rules_of(plan) == ["no-rule", "not-removable", "in-use", "in-use"]
    assert "LVM snapshots" in plan.snapshots[1].reason
    volumes.lvm.set_attributes(NAMES[1], "-wi-a-----")
    volumes.lvm.set_attributes(NAMES[-1], "owi-a-s---")
    before = volumes.names()
    refused = chainmerge.plan_thin_out(images[-1], ONE, DEVICES, two_ranges("commit"))
    assert refused.feasible
    refused = chainmerge.plan_thin_out(
        images[-1], Retention(keep_last=0), DEVICES, two_ranges("commit")
    )
    assert [one.code for one in refused.refusals] == ["cannot-take-away"]
    assert volumes.names() == before


def test_ages_of_volumes(volumes: Volumes, images: list[Path]) -> None:
    """When one was made says that its snapshot is young, and never that it is old."""
    for name, days in zip(NAMES, (9, 8, 7, 1, 0), strict=True):
        volumes.lvm.set_age(name, days * DAY)
    week = Retention(keep_within=3 * DAY)
    plan = chainmerge.plan_thin_out(images[-1], week, DEVICES)
    assert rules_of(plan) == ["age-unknown"] * 3 + ["keep-within"]
    assert [one.written_at for one in plan.snapshots] == [None] * 4
    assert plan.ranges == ()


def test_a_file_above_says_how_old_a_volume_is(
    volumes: Volumes, images: list[Path], tmp_path: Path
) -> None:
    """What it shows was there before the file: that is a bound on the safe side."""
    overlay, leaf = tmp_path / "overlay.qcow2", tmp_path / "leaf.qcow2"
    create(overlay, DISK, backing=str(images[-1]))
    create(leaf, DISK, backing=overlay.name)
    shown = content(leaf)
    for name in NAMES:
        volumes.lvm.set_age(name, 9 * DAY)
    written = time.time() - 8 * DAY
    os.utime(overlay, (written, written))
    rules = Retention(keep_within=DAY)
    plan = chainmerge.plan_thin_out(leaf, rules, DEVICES)
    assert set(rules_of(plan)) == {"no-rule"}
    # A volume cannot have the name of a file: what it holds is pulled up.
    assert (plan.refusals, plan.ranges[0].pulls) == ((), True)
    chainmerge.thin_out(leaf, rules, DEVICES)
    assert volumes.names() == {}
    assert not overlay.exists()
    assert content(leaf) == shown


def test_a_device_that_is_no_volume_stays(
    volumes: Volumes, images: list[Path], tmp_path: Path
) -> None:
    with loop_device(tmp_path / "device", 8 * MIB) as device:
        create(device, DISK)
        qemu_img("rebase", "-q", "-u", "-f", "qcow2", "-b", device, "-F", "qcow2", images[0])
        plan = chainmerge.plan_thin_out(images[-1], Retention(keep_last=0), DEVICES)
        assert rules_of(plan) == ["not-removable", *["no-rule"] * 4]
        assert "no logical volume" in plan.snapshots[0].reason
        chainmerge.thin_out(images[-1], Retention(keep_last=0), DEVICES)
        assert list(volumes.names()) == [NAMES[-1]]


# What volume groups get back


@pytest.mark.parametrize("direction", ["commit", "pull"])
@pytest.mark.parametrize("keep_name", [False, True], ids=["", "keep-name"])
def test_freed_bytes_are_what_the_group_gets_back(
    volumes: Volumes, direction: str, keep_name: bool
) -> None:
    """Removed volumes, less what the result is extended by."""
    base, _, top = volumes.chain(*NAMES[:3], root_size=MIB)
    volumes.show()
    expected, before = content(top), free(volumes)
    options = replace(two_ranges(direction), delete=True, keep_name=keep_name)
    found = chainmerge.scan([volumes.path("")], options=ScanOptions(cache=False, history=False))
    plain = chainmerge.plan(top, base, DEVICES, two_ranges(direction))
    plan = chainmerge.plan(top, base, DEVICES, options)
    grown = 0 if plan.space.grow_to is None else plan.space.grow_to - plan.space.size
    assert (grown > 0) == (direction == "commit")
    removed = 16 * MIB if direction == "commit" else 9 * MIB
    assert plan.freed_bytes == plain.deletable_bytes == removed - grown
    assert plain.freed_bytes == 0
    (chain,) = found.chains
    auto = chainmerge.plan(top, base, DEVICES, MergeOptions(delete=True))
    assert chain.freed_bytes == found.freed_bytes == auto.freed_bytes
    report = chainmerge.merge(top, base, DEVICES, options)
    assert report.plan is not None
    assert free(volumes) - before == plan.freed_bytes == report.plan.freed_bytes
    assert content(top if keep_name or direction == "pull" else base) == expected


def test_what_a_volume_is_reduced_by_is_freed(volumes: Volumes) -> None:
    base, top = volumes.chain(*NAMES[:2])
    volumes.show()
    before = free(volumes)
    options = MergeOptions(direction="commit", delete=True, shrink=True, leave=0)
    plan = chainmerge.plan(top, base, DEVICES, options)
    assert plan.space.shrink_to is not None
    assert plan.freed_bytes == 8 * MIB + 8 * MIB - plan.space.shrink_to > 8 * MIB
    chainmerge.merge(top, base, DEVICES, options)
    assert free(volumes) - before == plan.freed_bytes


def test_copies_and_parity_count(volumes: Volumes) -> None:
    names = NAMES[:3]
    base, middle, top = volumes.chain(*names)
    volumes.lvm.set_type(names[0], "raid1", 2)
    volumes.lvm.set_type(names[1], "raid5_ls", 3)
    volumes.show()
    before = free(volumes)
    options = MergeOptions(direction="pull", delete=True)
    plan = chainmerge.plan(top, base, DEVICES, options)
    assert plan.freed_bytes == 16 * MIB + 12 * MIB
    chainmerge.merge(top, base, DEVICES, options)
    assert free(volumes) - before == plan.freed_bytes
    assert not middle.exists()


def test_nothing_is_said_of_what_a_thin_pool_gets_back(volumes: Volumes) -> None:
    base, top = volumes.chain(*NAMES[:2])
    volumes.lvm.add_pool(volumes.group, "pool", 32, 10.0)
    for name in NAMES[:2]:
        volumes.lvm.make_thin(name, "pool")
    volumes.show()
    before = free(volumes)
    options = MergeOptions(direction="commit", delete=True)
    plan = chainmerge.plan(top, base, DEVICES, options)
    assert plan.freed_bytes == 0
    # What is hidden is what the pool gets back at least.
    (chain,) = chainmerge.scan([volumes.path("")]).chains
    assert chain.freed_bytes == 256 << 10
    chainmerge.merge(top, base, DEVICES, options)
    assert free(volumes) == before
