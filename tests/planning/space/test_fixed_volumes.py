# SPDX-License-Identifier: Apache-2.0
"""Merges into volumes that cannot grow, or grow by what the plan says and no more."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.options import Access, DataChoice, EngineChoice, MergeOptions
from chainmerge.storage.volume_errors import CannotGrow, ExtensionRefused
from tests.support.fake_lvm import FakeLvm
from tests.support.loopdev import loop_device
from tests.support.qemu import assert_clean, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
CLUSTER = 65536


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exact_size(directory: Path, disk: int, written: int) -> None:
    """70 stale bitmaps: the planned size is enough, and one cluster less is refused."""
    template = create(directory / "template.qcow2", disk)
    for number in range(70):
        chainmerge.bitmaps_add(template, f"stale-{number}")
    with loop_device(directory / "planning", disk + 64 * MIB) as device:
        device.write_bytes(template.read_bytes())
        top = create(directory / "top.qcow2", backing=device)
        qemu_img("bitmap", "--add", top, "good")
        # One request of qemu-io is less than 2 GiB.
        pieces = range(0, written, 1 << 30)
        qemu_io(top, *(f"write -q -P 7 {at} {min(1 << 30, written - at)}" for at in pieces))
        access = Access(allow_backing=("/dev",))
        space = chainmerge.plan(top, access=access).space
        # On this large a device nothing has to be taken out first.
        assert not space.prune_first
        required = space.required_by_placement[space.placement]
    with loop_device(directory / "short", required - CLUSTER) as device:
        device.write_bytes(template.read_bytes())
        qemu_img("rebase", "-q", "-u", "-F", "qcow2", "-b", device, top)
        before = _digest(device), _digest(top)
        with pytest.raises(CannotGrow) as refusal:
            chainmerge.merge(top, access=access)
        assert refusal.value.missing == CLUSTER
        assert (_digest(device), _digest(top)) == before
    with loop_device(directory / "exact", required) as device:
        device.write_bytes(template.read_bytes())
        qemu_img("rebase", "-q", "-u", "-F", "qcow2", "-b", device, top)
        assert chainmerge.plan(top, access=access).space.required == required
        report = chainmerge.merge(top, access=access)
        assert report.bitmaps[0].name == "good"
        assert report.bitmaps[0].dirty_bytes == written
        assert_clean(device)
        qemu_img("compare", "-q", "-U", top, device)


def test_exact_size(tmp_path: Path) -> None:
    _exact_size(tmp_path, 256 * MIB, 251 * MIB)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_exact_size_of_a_large_disk(tmp_path: Path) -> None:
    _exact_size(tmp_path, 2560 * MIB, 2555 * MIB)


def test_a_logical_volume_grows_and_shrinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extent = 4 * MIB
    base, top = tmp_path / "base", tmp_path / "top.qcow2"
    create(base, 256 * MIB)
    qemu_img("bitmap", "--add", base, "stale")
    with base.open("r+b") as file:
        file.truncate(extent)
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    physical = tmp_path / "physical-volume"
    physical.touch()
    lvm.add_group("vg", extents=100, devices=[physical])
    lvm.add_volume("vg", "base", base)
    create(top, backing="base")
    qemu_img("bitmap", "--add", top, "good")
    qemu_io(top, "write -P 4 0 50M")
    options = MergeOptions(volume="lvm", shrink=True, leave=0)
    plan = chainmerge.plan(top, options=options)
    assert plan.space.kind == "lvm"
    assert plan.space.grow_to is not None
    assert plan.space.grow_to % extent == 0
    report = chainmerge.merge(top, options=options)
    assert not report.warnings
    assert report.volume_size == -(-report.image_end // extent) * extent
    assert report.volume_size <= plan.space.grow_to
    assert_clean(base)
    qemu_img("compare", "-q", "-U", top, base)


def test_a_volume_group_without_room_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extent = 4 * MIB
    base, top = tmp_path / "base", tmp_path / "top.qcow2"
    create(base, 256 * MIB)
    with base.open("r+b") as file:
        file.truncate(extent)
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    lvm.add_group("vg", extents=5, devices=[])
    lvm.add_volume("vg", "base", base)
    create(top, backing="base")
    qemu_io(top, "write -P 4 0 50M")
    before = _digest(base), _digest(top)
    with pytest.raises(CannotGrow):
        chainmerge.merge(top, options=MergeOptions(volume="lvm"))
    assert (_digest(base), _digest(top)) == before


@pytest.mark.parametrize("engine", ["native", "qemu"])
def test_a_volume_group_that_is_locked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: EngineChoice
) -> None:
    """LVM's own failure comes before anything is written: it is no half-done merge."""
    base, top = tmp_path / "base", tmp_path / "top.qcow2"
    create(base, 256 * MIB)
    qemu_img("bitmap", "--add", base, "kept")
    with base.open("r+b") as file:
        file.truncate(4 * MIB)
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    (tmp_path / "physical-volume").touch()
    lvm.add_group("vg", extents=100, devices=[tmp_path / "physical-volume"])
    lvm.add_volume("vg", "base", base)
    create(top, backing="base")
    qemu_img("bitmap", "--add", top, "kept")
    qemu_io(top, "write -P 4 0 50M")
    before = _digest(base), _digest(top)
    lvm.break_command("lvextend", 5, "Can't get lock for vg.")
    options = MergeOptions(volume="lvm", engine=engine)
    with pytest.raises(ExtensionRefused, match="Can't get lock"):
        chainmerge.merge(top, options=options)
    assert (_digest(base), _digest(top)) == before
    assert not list(tmp_path.glob(".*chainmerge*"))


def test_file_is_not_left_larger_than_it_has_to_be(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    create(base, 256 * MIB)
    create(top, backing="base.qcow2")
    qemu_io(top, "write -P 4 0 20M")
    report = chainmerge.merge(top)
    assert base.stat().st_size == report.image_end
    assert base.stat().st_blocks * 512 < 22 * MIB


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is a volume of small extents, of 80 MiB, with an image in it."""
    base = create(tmp_path / "base", 256 * MIB)
    qemu_io(base, "write -q -P 1 0 40M")
    # A bitmap that lies where the image ends, and is written anew by the merge.
    qemu_img("bitmap", "--add", "-g", "64k", base, "good")
    qemu_io(base, "write -q -P 2 10M 1M", "discard 20M 20M", options=("--discard", "unmap"))
    with base.open("r+b") as file:
        file.truncate(80 * MIB)
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    lvm.add_group("vg", extents=10_000, devices=[], extent_size=CLUSTER)
    lvm.add_volume("vg", "base", base)
    return base


@pytest.mark.parametrize("leave", [None, 0, 5 * MIB + 1], ids=str)
@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "below"])
@pytest.mark.parametrize(
    ("engine", "data"), [("native", "cow"), ("native", "in-place"), ("qemu", "auto")]
)
def test_a_volume_is_reduced_to_what_was_planned(
    volume: Path, engine: EngineChoice, data: DataChoice, *, is_leaf: bool, leave: int | None
) -> None:
    top = create(volume.parent / "top.qcow2", backing="base")
    qemu_img("bitmap", "--add", "-g", "64k", top, "good")
    qemu_io(top, "write -q -P 4 2M 3M")
    if not is_leaf:
        create(volume.parent / "leaf.qcow2", backing="top.qcow2")
    options = MergeOptions(engine=engine, data=data, volume="lvm", shrink=True, leave=leave)
    plan = chainmerge.plan(top, options=options)
    report = chainmerge.merge(top, options=options)
    assert not report.warnings
    assert report.volume_size == plan.space.shrink_to == volume.stat().st_size
    kept = 0 if leave is None else leave
    least = -(-(report.image_end + kept) // CLUSTER) * CLUSTER
    if leave is None and is_leaf:
        # All that it has: less than what a guest is left.
        assert report.volume_size == 80 * MIB
    elif engine == "native":
        assert report.volume_size == least
    else:
        assert least <= report.volume_size < 80 * MIB
    assert_clean(volume)


def test_a_raw_volume_is_not_reduced_and_the_plan_does_not_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(8 * MIB))
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    lvm.add_group("vg", extents=10, devices=[])
    lvm.add_volume("vg", "base", base)
    top = create(tmp_path / "top.qcow2", backing="base", backing_format="raw")
    options = MergeOptions(volume="lvm", shrink=True)
    assert chainmerge.plan(top, options=options).space.shrink_to is None
    assert chainmerge.merge(top, options=options).volume_size == 8 * MIB
