# SPDX-License-Identifier: Apache-2.0
"""What lies behind the end of a disk never comes to light, whatever makes the disk larger."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import Refused
from chainmerge.options import Access, EngineChoice, MergeOptions
from chainmerge.planning.space.errors import OldBytesBehindEnd
from chainmerge.records.merge_journal import load_journal
from chainmerge.storage.volume_errors import DeviceTooSmall, RawDeviceTooSmall
from tests.support.fake_lvm import FakeLvm
from tests.support.loopdev import loop_device
from tests.support.qemu import assert_clean, content, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KIB = 1 << 10
MIB = 1 << 20
EXTENT = 512 * KIB
# Inside a cluster of an overlay that has large ones.
BASE = 15 * EXTENT
# Not where an extent ends: the volume gets more than the disk takes.
DISK = 18 * MIB + 256 * KIB
VOLUME = 37 * EXTENT
DEVICES = Access(allow_backing=("/dev",))
Options = dict[str, str | int]
ENGINES: tuple[EngineChoice, ...] = ("native", "qemu")


@dataclass
class Volume:
    """A raw base on a logical volume whose volume group holds others' bytes."""

    device: Path
    lvm: FakeLvm
    directory: Path

    def overlay(self, options: Options | None = None, name: str = "top.qcow2") -> Path:
        top = self.directory / name
        chosen = ",".join(f"{key}={value}" for key, value in (options or {}).items())
        arguments = ("-o", chosen) if chosen else ()
        qemu_img("create", "-q", "-f", "qcow2", *arguments, "-b", self.device, "-F", "raw", top)
        return resized(top)

    def behind(self, end: int) -> bytes:
        with self.device.open("rb") as device:
            device.seek(end)
            return device.read()


def resized(image: Path, size: int = DISK) -> Path:
    qemu_img("resize", "-q", "--shrink", image, str(size))
    return image


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volume]:
    backing, physical = tmp_path / "backing", tmp_path / "physical"
    backing.write_bytes(os.urandom(32 * MIB))
    physical.write_bytes(bytes(MIB))
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    lvm.add_group("vg", extents=64, devices=[physical], extent_size=EXTENT)
    with loop_device(backing, 32 * MIB, "--sizelimit", str(BASE)) as device:
        lvm.add_volume("vg", "base", device)
        yield Volume(device, lvm, tmp_path)


def _options(engine: EngineChoice) -> MergeOptions:
    return MergeOptions(engine=engine, volume="lvm")


def _merge(top: Path, engine: EngineChoice, base: Path | None = None) -> MergeOutcome:
    return chainmerge.merge(top, base, access=DEVICES, options=_options(engine)).outcome


def _in_child(action: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"extended_l2": "on"},
        {"cluster_size": 2 * MIB},
        {"cluster_size": 512},
    ],
    ids=str,
)
def test_a_volume_with_old_bytes_is_extended(
    volume: Volume, engine: EngineChoice, options: Options
) -> None:
    top = volume.overlay(options)
    qemu_img("bitmap", "--add", top, "daily", expect=(0, 1))
    qemu_io(top, f"write -q -P 2 {15 * MIB} 1M", f"write -q -P 3 {MIB} 512")
    expected = content(top)
    options_of_merge = MergeOptions(engine=engine, volume="lvm", drop_bitmaps=True)
    planned = chainmerge.plan(top, access=DEVICES, options=options_of_merge)
    assert planned.hides is not None
    assert (planned.hides.start, planned.hides.end) == (BASE, DISK)
    report = chainmerge.merge(top, access=DEVICES, options=options_of_merge)
    assert report.plan is not None
    assert report.plan.hides == planned.hides
    assert content(top) == expected
    assert_clean(top)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", top, volume.device)
    assert not any(volume.behind(DISK))
    assert _merge_again(top, options_of_merge) is MergeOutcome.ALREADY_MERGED
    assert content(top) == expected


def _merge_again(top: Path, options: MergeOptions) -> MergeOutcome:
    return chainmerge.merge(top, access=DEVICES, options=options).outcome


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_lowest_overlay_can_see_base(volume: Volume, engine: EngineChoice) -> None:
    """A shorter image between hides what is behind its end by itself; above it is a longer one."""
    middle = resized(volume.overlay(name="middle.qcow2"), 12 * MIB)
    top = resized(create(volume.directory / "top.qcow2", backing=middle))
    qemu_io(middle, f"write -q -P 5 {11 * MIB} 64k")
    qemu_io(top, f"write -q -P 6 {16 * MIB} 64k")
    expected = content(top)
    planned = chainmerge.plan(top, volume.device, access=DEVICES, options=_options(engine))
    assert planned.hides is not None
    assert planned.hides.image == str(middle)
    _merge(top, engine, volume.device)
    assert content(top) == expected
    assert volume.behind(0)[:DISK] == expected
    assert not any(volume.behind(DISK))


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_as_the_volume_is_extended(volume: Volume, engine: EngineChoice) -> None:
    """The guest can be started at once, and whoever runs the command again finishes it."""
    top = volume.overlay()
    qemu_io(top, f"write -q -P 2 {15 * MIB} 1M")
    expected = content(top)
    volume.lvm.kill_after("lvextend")
    died = _in_child(lambda: _merge(top, engine))
    assert died == -signal.SIGKILL
    assert volume.device.stat().st_rdev
    assert len(volume.behind(BASE)) == VOLUME - BASE
    assert any(volume.behind(BASE))
    assert content(top) == expected
    volume.lvm.mend("lvextend")
    _merge(top, engine)
    assert content(top) == expected
    assert volume.behind(0)[:DISK] == expected
    if engine == "native":
        # It is told from what the guest wrote by the journal, which QEMU's copy has none of.
        assert not any(volume.behind(DISK))
        assert load_journal(volume.device) is None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stage", [Stage.HIDE, Stage.EXTEND, Stage.COPY, Stage.VERIFY])
def test_killed_at_a_stage(volume: Volume, engine: EngineChoice, stage: Stage) -> None:
    top = volume.overlay()
    qemu_io(top, f"write -q -P 2 {15 * MIB} 1M")
    expected = content(top)

    def die(event: ProgressEvent) -> None:
        if event.stage is stage:
            os.kill(os.getpid(), signal.SIGKILL)

    died = _in_child(
        lambda: chainmerge.merge(top, access=DEVICES, options=_options(engine), on_progress=die)
    )
    assert died == -signal.SIGKILL
    assert content(top) == expected
    _merge(top, engine)
    assert content(top) == expected
    assert volume.behind(0)[:DISK] == expected


def test_what_the_guest_writes_after_a_kill_counts(volume: Volume) -> None:
    top = volume.overlay()
    volume.lvm.kill_after("lvextend")
    _in_child(lambda: _merge(top, "native"))
    qemu_io(top, f"write -q -P 9 {10 * MIB} 64k")
    expected = content(top)
    volume.lvm.mend("lvextend")
    _merge(top, "native")
    assert volume.behind(0)[:DISK] == expected


def test_an_extension_that_fails_after_the_overlay_was_changed_is_no_refusal(
    volume: Volume,
) -> None:
    top = volume.overlay()
    expected = content(top)
    volume.lvm.break_command("lvextend", 5, "the volume group is locked")
    with pytest.raises(chainmerge.ChainmergeError) as failure:
        _merge(top, "native")
    assert not isinstance(failure.value, Refused)
    assert content(top) == expected
    assert_clean(top)


def test_an_overlay_on_a_full_volume_is_refused(volume: Volume, tmp_path: Path) -> None:
    """Nothing is extended before it is known that the overlay can hide what comes."""
    source = volume.overlay()
    qemu_io(source, f"write -q -P 2 {6 * MIB} 1M")
    with loop_device(tmp_path / "overlay", source.stat().st_size) as device:
        device.write_bytes(source.read_bytes())
        before = device.read_bytes()
        with pytest.raises(DeviceTooSmall):
            _merge(device, "native")
        assert device.read_bytes() == before
    assert not volume.lvm.calls("lvextend")


def test_an_overlay_that_cannot_hide_it_is_refused(volume: Volume) -> None:
    data = volume.directory / "data"
    top = volume.overlay({"data_file": str(data)})
    access = Access(allow_backing=("/dev",), allow_data_file=(str(data),))
    with pytest.raises(OldBytesBehindEnd):
        chainmerge.merge(top, access=access, options=_options("native"))
    assert not volume.lvm.calls("lvextend")


def test_a_device_that_is_too_small_is_not_to_be_enlarged(tmp_path: Path) -> None:
    with loop_device(tmp_path / "base", BASE) as device:
        top = create(tmp_path / "top.qcow2", backing=device, backing_format="raw")
        resized(top)
        with pytest.raises(RawDeviceTooSmall) as refusal:
            chainmerge.merge(top, access=DEVICES)
        assert "--direction pull" in refusal.value.advice
        expected = content(top)
        chainmerge.merge(top, access=DEVICES, options=MergeOptions(direction="pull"))
        assert content(top) == expected


# A qcow2 base that ends inside a cluster: QEMU shows what the rest of that holds.


def _small_base(directory: Path, size: int, options: Options) -> Path:
    """An image that was larger and full of data before."""
    base = directory / "base.qcow2"
    chosen = ",".join(f"{key}={value}" for key, value in options.items())
    arguments = ("-o", chosen) if chosen else ()
    qemu_img("create", "-q", "-f", "qcow2", *arguments, base, str(4 * MIB))
    qemu_io(base, f"write -q -P 0x55 0 {4 * MIB}")
    return resized(base, size)


SHAPES: list[Options] = [
    {},
    {"cluster_size": 4 * KIB},
    {"cluster_size": 2 * MIB},
    {"extended_l2": "on"},
    {"compat": "0.10"},
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [512, MIB + 512, 2 * MIB - 512, 2 * MIB], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rest_of_the_last_cluster_does_not_show(
    tmp_path: Path, shape: Options, size: int, engine: EngineChoice
) -> None:
    base = _small_base(tmp_path, size, shape)
    top = resized(create(tmp_path / "top.qcow2", backing=base), 6 * MIB)
    qemu_io(top, f"write -q -P 2 {5 * MIB} 64k", "write -q -P 3 0 512")
    expected = content(top)
    chainmerge.merge(top, options=MergeOptions(engine=engine))
    assert content(base) == expected == content(top)
    assert_clean(base)


@pytest.mark.parametrize("engine", ENGINES)
def test_base_has_a_longer_backing_file(tmp_path: Path, engine: EngineChoice) -> None:
    root = create(tmp_path / "root.qcow2", 6 * MIB)
    qemu_io(root, f"write -q -P 9 0 {6 * MIB}")
    base = create(tmp_path / "base.qcow2", backing=root)
    qemu_io(base, f"write -q -P 0x55 0 {4 * MIB}")
    resized(base, MIB + 512)
    top = resized(create(tmp_path / "top.qcow2", backing=base), 6 * MIB)
    qemu_io(top, f"write -q -P 2 {5 * MIB} 64k")
    expected = content(top)
    chainmerge.merge(top, options=MergeOptions(engine=engine))
    assert content(base) == expected == content(top)


def test_killed_once_the_old_bytes_are_wiped(tmp_path: Path) -> None:
    base = _small_base(tmp_path, MIB + 512, {})
    top = resized(create(tmp_path / "top.qcow2", backing=base), 6 * MIB)
    qemu_io(top, f"write -q -P 2 {5 * MIB} 64k")
    expected, of_base = content(top), content(base)

    def die(event: ProgressEvent) -> None:
        if event.stage is Stage.COPY:
            os.kill(os.getpid(), signal.SIGKILL)

    options = MergeOptions(engine="qemu")
    died = _in_child(lambda: chainmerge.merge(top, options=options, on_progress=die))
    assert died == -signal.SIGKILL
    assert (content(top), content(base)) == (expected, of_base)
    chainmerge.merge(top, options=options)
    assert content(base) == expected == content(top)


def test_old_bytes_in_an_external_data_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    base = _small_base(tmp_path, MIB + 512, {"data_file": str(data)})
    # Where it cannot be made shorter, as a volume, it has what it had.
    with data.open("r+b") as file:
        file.seek(MIB + 512)
        file.write(b"o" * (3 * MIB))
    top = resized(create(tmp_path / "top.qcow2", backing=base), 6 * MIB)
    qemu_io(top, f"write -q -P 2 {5 * MIB} 64k")
    expected = content(top)
    chainmerge.merge(top, access=Access(allow_data_file=(str(data),)))
    assert content(base) == expected == content(top)


def test_a_snapshot_has_the_old_bytes(tmp_path: Path) -> None:
    """They are the snapshot's data, and stay."""
    base = create(tmp_path / "base.qcow2", 4 * MIB)
    qemu_io(base, f"write -q -P 0x55 0 {4 * MIB}")
    qemu_img("snapshot", "-c", "larger", base)
    # QEMU does not resize an image with snapshots; other programs do.
    with base.open("r+b") as file:
        file.seek(24)
        file.write((MIB + 512).to_bytes(8, "big"))
    top = resized(create(tmp_path / "top.qcow2", backing=base), 6 * MIB)
    before, expected = base.read_bytes(), content(top)
    with pytest.raises(OldBytesBehindEnd):
        chainmerge.merge(top, options=MergeOptions(engine="qemu"))
    assert base.read_bytes() == before
    chainmerge.merge(top)
    assert content(base) == expected == content(top)


def test_compressed_old_bytes(tmp_path: Path) -> None:
    full = create(tmp_path / "full.qcow2", 4 * MIB)
    qemu_io(full, f"write -q -P 0x55 0 {4 * MIB}")
    base = tmp_path / "base.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", full, base)
    resized(base, MIB + 512)
    top = resized(create(tmp_path / "top.qcow2", backing=base), 6 * MIB)
    before, expected = base.read_bytes(), content(top)
    options = MergeOptions(engine="qemu")
    with pytest.raises(OldBytesBehindEnd):
        chainmerge.merge(top, options=options)
    assert not chainmerge.plan(top, options=options).feasible
    assert base.read_bytes() == before
    chainmerge.merge(top)
    assert content(base) == expected == content(top)
