# SPDX-License-Identifier: Apache-2.0
"""Linux works with files, and checks them, on a disk whose chain is merged underneath."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import chainmerge
from chainmerge import live
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.live.qmp.monitor import Monitor
from chainmerge.options import LiveOptions
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import FileReadable
from tests.support.live_vm import DEVICE, separate_nodes
from tests.support.qemu import assert_clean, content, info, qemu_img, run
from tests.vm.rig import MIB, PROJECT, Machine, booted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.timeout(1200)

DISK: Final = 64 * MIB
STALE: Final = 3
GRANULARITY: Final = 65536
BEFORE, AFTERWARDS = 10, 20


@pytest.mark.parametrize(("kind", "levels"), [("internal", 1), ("active", 1), ("active", 3)])
def test_linux_writes_through_a_whole_merge(tmp_path: Path, kind: str, levels: int) -> None:
    images = build(tmp_path, levels, active=kind == "active")
    before = content(images[0])
    top = images[levels]
    enough = enough_for(tmp_path)
    with working_machine(images, enough) as (machine, qmp):
        wait_for_work(machine, BEFORE)
        with live.QmpVm(str(qmp), device=DEVICE) as disk:
            done = work_done(machine)
            # Slow enough for a guest without a processor of its own to write in between.
            options = LiveOptions(delete=True, bandwidth=4 * MIB)
            live.merge(disk, top, images[0], options=options)
            during = work_done(machine) - done
        wait_for_work(machine, work_done(machine) + AFTERWARDS)
        enough.touch()
        assert machine.wait(600) == 0, machine.output[-20:]
    assert during > 0
    assert_right(machine, images, top)
    if kind == "active":
        assert_incremental_backup_is_right(before, images[0])


def test_linux_is_slowed_down_until_the_copy_catches_up(tmp_path: Path) -> None:
    images = build(tmp_path, 1, active=True)
    before = content(images[0])
    # Linux writes faster than that, so that what remains would never become less.
    options = LiveOptions(delete=True, bandwidth=MIB, deadline=2.0, on_stall="throttle")
    enough = enough_for(tmp_path)
    seen: list[int] = []
    with working_machine(images, enough) as (machine, qmp):
        wait_for_work(machine, BEFORE)
        with live.QmpVm(str(qmp), device=DEVICE) as disk, Monitor(f"{qmp}-of-test") as monitor:

            def look(event: ProgressEvent) -> None:
                if event.stage is Stage.COPY:
                    devices = monitor.execute("query-block")
                    (its,) = (one for one in devices if DEVICE in one["qdev"])
                    seen.append(its["inserted"]["bps_wr"])

            limits = disk.disk_limits()
            live.merge(disk, images[1], images[0], options=options, on_progress=look)
            assert disk.disk_limits() == limits
        enough.touch()
        assert machine.wait(600) == 0, machine.output[-20:]
    assert seen[0] == 0
    assert 0 < seen[-1] < MIB
    assert_right(machine, images, images[1])
    assert_incremental_backup_is_right(before, images[0])


def enough_for(directory: Path) -> Path:
    """What the guest looks for, in a directory that it sees."""
    enough = PROJECT / "build" / "vm" / f"enough-{directory.name}"
    enough.parent.mkdir(parents=True, exist_ok=True)
    return enough


def assert_right(machine: Machine, images: Sequence[Path], top: Path) -> None:
    """All that the guest has said, and what is on disk afterwards."""
    assert machine.output[-1].startswith("right: "), machine.output[-20:]
    result = images[0] if top == images[-1] else images[-1]
    assert {*images[0].parent.glob("*.qcow2")} == {images[0], result}
    assert_clean(images[0])
    assert_file_system_is_whole(result)


def build(directory: Path, levels: int, *, active: bool) -> list[Path]:
    """A chain whose images hold the steps of a file system's life, root first."""
    raw = directory / "raw"
    raw.touch()
    with raw.open("r+b") as file:
        file.truncate(DISK)
    run("mkfs.ext4", "-q", "-F", raw)
    images = [directory / "base.qcow2"]
    _put(raw, directory, 0)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, images[0])
    for name in ("good", *(f"stale-{number}" for number in range(STALE))):
        chainmerge.bitmaps_add(images[0], name, granularity=GRANULARITY)
    for level in range(1, levels + 1):
        _put(raw, directory, level)
        images.append(_overlay_with(raw, directory / f"{level}.qcow2", images[-1]))
    if not active:
        leaf = directory / "leaf.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-b", images[-1], "-F", "qcow2", leaf)
        chainmerge.bitmaps_add(leaf, "good", granularity=GRANULARITY)
        images.append(leaf)
    raw.unlink()
    return images


def _put(raw: Path, directory: Path, number: int) -> None:
    """Store a file in an ext4 file system that nobody has mounted."""
    source = directory / f"older-{number}.bin"
    source.write_bytes(random.Random(number).randbytes(3 * MIB))
    run("debugfs", "-w", "-R", f"write {source} {source.name}", raw)
    source.unlink()


def _overlay_with(raw: Path, overlay: Path, backing: Path) -> Path:
    """An overlay of *backing* that reads as *raw*, and whose bitmap knows what differs."""
    qemu_img("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", overlay)
    chainmerge.bitmaps_add(overlay, "good", granularity=GRANULARITY)
    qemu_img("rebase", "-b", backing, "-F", "qcow2", overlay)
    return overlay


@contextmanager
def working_machine(images: Sequence[Path], enough: Path) -> Iterator[tuple[Machine, Path]]:
    """A machine whose guest works on the chain until *enough* is there; and its QMP socket."""
    command = ["python3", "-m", "tests.vm.guest.writing", str(enough)]
    with tempfile.TemporaryDirectory(prefix="chainmerge-vm-") as sockets:
        qmp = Path(sockets) / "qmp"
        more = [*separate_nodes(images)]
        for path in (qmp, f"{qmp}-of-test"):
            more += ["-qmp", f"unix:{path},server=on,wait=off"]
        try:
            with booted(command, environment={"PYTHONPATH": str(PROJECT)}, more=more) as machine:
                yield machine, qmp
        finally:
            enough.unlink(missing_ok=True)


def work_done(machine: Machine) -> int:
    """How often the guest has written."""
    done = [line for line in machine.output if line.startswith("done ")]
    return int(done[-1].split()[1]) if done else 0


def wait_for_work(machine: Machine, amount: int) -> None:
    while work_done(machine) < amount:
        assert machine.process.poll() is None, machine.output[-20:]
        machine.wait_for_output()


def assert_file_system_is_whole(image: Path) -> None:
    raw = image.with_suffix(".raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
    program = shutil.which("e2fsck")
    assert program is not None
    subprocess.run([program, "-f", "-n", raw], check=True, stdout=subprocess.DEVNULL)


def assert_incremental_backup_is_right(before: bytes, result: Path) -> None:
    """What a full backup held, with what the checkpoint says is dirty, is the disk."""
    assert info(result).get("backing-filename") is None
    restored = bytearray(before)
    now = content(result)
    assert restored != now
    with FileReadable(result) as readable:
        image = Qcow2Image(readable)
        (entry,) = read_directory(image)
        assert entry.name == "good"
        assert entry.auto
        assert not entry.in_use
        for start, length in zip(*read_bits(image, entry).ranges(), strict=True):
            restored[int(start) : int(start + length)] = now[int(start) : int(start + length)]
    assert bytes(restored) == now
