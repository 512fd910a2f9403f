# SPDX-License-Identifier: Apache-2.0
"""Records every write and flush of a command, below LVM or below a file system.

The device ``/dev/mapper/recorded`` lies on a disk; while something is recorded, a log-writes
target is between the two. Its name stays the same, so nobody notices.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.qemu import bitmap_names, create, qemu_img, qemu_io, run
from tests.vm.commands import chainmerge_forked
from tests.vm.guest.volumes import Group
from tests.vm.power.cases import LVM, Image, PowerCase
from tests.vm.power.log_writes import SECTOR, clear, copy_log
from tests.vm.power.recordings import mount_point_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_PIECE: Final = 1 << 20
DONE: Final = "done"


@dataclass(frozen=True)
class RecordedDevice:
    """A mapped device over the first *size* bytes of a disk."""

    name: str
    disk: Path
    size: int

    @property
    def path(self) -> Path:
        return Path("/dev/mapper") / self.name

    def create(self) -> None:
        run("dmsetup", "create", self.name, "--table", self._table("linear", str(self.disk), "0"))

    def remove(self) -> None:
        run("dmsetup", "remove", "--retry", self.name)

    @contextmanager
    def recorded(self, log: Path) -> Iterator[None]:
        """Log what happens in the block onto the device *log*."""
        clear(log)
        self._swap(self._table("log-writes", str(self.disk), str(log)))
        try:
            yield
        finally:
            # The end of this table is what completes the log.
            self._swap(self._table("linear", str(self.disk), "0"))

    def mark(self, text: str) -> None:
        run("dmsetup", "message", self.name, "0", "mark", text)

    def copy_to(self, target: Path) -> None:
        """Copy what is durable, holes where there are zeros."""
        with self.disk.open("rb", buffering=0) as source, target.open("wb") as copy:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for start in range(0, self.size, _PIECE):
                piece = source.read(min(_PIECE, self.size - start))
                if piece.strip(b"\0"):
                    copy.seek(start)
                    copy.write(piece)
            copy.truncate(self.size)

    def _table(self, *target: str) -> str:
        return " ".join(["0", str(self.size // SECTOR), *target])

    def _swap(self, table: str) -> None:
        run("dmsetup", "load", self.name, "--table", table)
        run("dmsetup", "resume", self.name)


def record(case: PowerCase, device: RecordedDevice, log: Path, into: Path) -> None:
    """Build a chain, run the command on it, and leave ``before`` and ``log`` in a directory."""
    places = _on_volumes if case.storage == LVM else _on_file_system
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    with places(case, device) as storage:
        for index, image in enumerate(case.images):
            _build(case, index, image, storage.paths)
        _require_valid_bitmaps(case, storage.paths)
        storage.settle()
        device.copy_to(into / "before")
        with device.recorded(log):
            storage.take_up()
            paths = {name: str(path) for name, path in storage.paths.items()}
            ran = chainmerge_forked(*(word.format_map(paths) for word in case.command))
            assert ran.status == 0, ran
            device.mark(DONE)
            storage.settle()
    copy_log(log, into / "log")


@dataclass(frozen=True)
class _Storage:
    paths: Mapping[str, Path]

    def settle(self) -> None:
        """Have everything on the device."""
        os.sync()

    def take_up(self) -> None:
        """Use it again."""


@dataclass(frozen=True)
class _Mounted(_Storage):
    device: Path
    mount_point: Path

    def settle(self) -> None:
        run("umount", self.mount_point)

    def take_up(self) -> None:
        run("mount", self.device, self.mount_point)


@contextmanager
def _on_volumes(case: PowerCase, device: RecordedDevice) -> Iterator[_Storage]:
    group = Group("recorded-vg")
    del device
    paths = {image.name: group.create(image.name, image.volume) for image in case.images}
    if case.ballast:
        run("lvcreate", "-q", "-y", "-Wn", "-l", "100%FREE", "-n", "ballast", group.name)
    try:
        yield _Storage(paths)
    finally:
        group.remove_volumes()


@contextmanager
def _on_file_system(case: PowerCase, device: RecordedDevice) -> Iterator[_Storage]:
    run("wipefs", "-q", "-a", device.path)
    run(f"mkfs.{case.storage}", "-q", device.path)
    mount_point = mount_point_of(case)
    mount_point.mkdir(exist_ok=True)
    storage = _Mounted(
        {image.name: mount_point / image.name for image in case.images}, device.path, mount_point
    )
    storage.take_up()
    yield storage


def _build(case: PowerCase, index: int, image: Image, paths: Mapping[str, Path]) -> None:
    below = case.images[index - 1] if index else None
    path = paths[image.name]
    if image.options is not None:
        create(
            path,
            image.disk,
            backing=below.name if below else None,
            backing_format="raw" if below and below.options is None else "qcow2",
            **image.options,
        )
    for name in (*image.bitmaps, *image.stale):
        qemu_img("bitmap", "--add", "-f", "qcow2", path, name)
    qemu_io(path, *image.writes, fmt="raw" if image.options is None else "qcow2")
    if image.snapshot:
        qemu_img("snapshot", "-c", "kept", path)
        qemu_io(path, *image.writes)


def _require_valid_bitmaps(case: PowerCase, paths: Mapping[str, Path]) -> None:
    """On a volume that is too small QEMU loses them and says so in passing."""
    for image in case.images:
        names = bitmap_names(paths[image.name])
        assert names.keys() == {*image.bitmaps, *image.stale}, names
        assert all(bitmap["flags"] == ["auto"] for bitmap in names.values()), names
