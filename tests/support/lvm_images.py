# SPDX-License-Identifier: Apache-2.0
"""Images on logical volumes of the fake lvm, with the names in /dev that volumes have."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chainmerge.records import files as state_files
from tests.support.fake_lvm import FakeLvm
from tests.support.loopdev import loop_device
from tests.support.qemu import create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
VOLUME, DISK = 8 * MIB, 4 * MIB
CHUNK = 64 << 10
"""Bytes that a pool gives a thin volume at once."""
WRITTEN = 2 * MIB


@dataclass
class Volumes:
    """Images on logical volumes of a group, which has a dash in its name."""

    group: str
    lvm: FakeLvm
    directory: Path
    stack: contextlib.ExitStack
    monkeypatch: pytest.MonkeyPatch
    uuids: dict[str, str] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return Path("/dev", self.group, name)

    def device(self, name: str, size: int = VOLUME) -> Path:
        return self.stack.enter_context(loop_device(self.directory / name, size))

    def show(self) -> None:
        """Let the kernel seem to know the volumes that there are now."""
        self.lvm.show_in_sysfs(self.monkeypatch)

    def chain(self, *names: str, root_size: int = VOLUME) -> list[Path]:
        """Images one above the other, each with a piece of its own, by relative names."""
        for number, name in enumerate(names):
            size = VOLUME if number else root_size
            self.lvm.add_volume(self.group, name, self.device(name, size))
        self.stack.enter_context(self.lvm.names_in_dev())
        paths = [self.path(name) for name in names]
        for number, path in enumerate(paths):
            create(path, DISK, backing=names[number - 1] if number else None)
            qemu_img("bitmap", "--add", "-f", "qcow2", path, "kept")
            qemu_io(path, f"write -q -P {number + 1} {number * 256}k 512k")
        self.uuids = self.names()
        return paths

    def names(self) -> dict[str, str]:
        return self.lvm.names(self.group)


@contextlib.contextmanager
def lvm_images(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volumes]:
    """A volume group with nothing in it; what outlives processes is kept in *directory*."""
    monkeypatch.setattr(state_files, "STATE_DIRECTORY", directory / "state")
    for name in ("lvm", "images"):
        (directory / name).mkdir()
    lvm = FakeLvm(directory / "lvm")
    lvm.install(monkeypatch)
    group = f"chainmerge-{os.getpid()}"
    physical = directory / "physical-volume"
    physical.touch()
    lvm.add_group(group, 200, [physical], extent_size=MIB)
    with contextlib.ExitStack() as stack:
        yield Volumes(group, lvm, directory / "images", stack, monkeypatch)


def on_pool(volumes: Volumes, extents: int, used: float) -> tuple[Path, Path]:
    """A chain of two on thin volumes; the upper one has WRITTEN bytes of its own."""
    base, top = volumes.chain("base-0", "top-1")
    volumes.lvm.add_pool(volumes.group, "pool", extents, used, CHUNK)
    for name in volumes.names():
        if name != "pool":
            volumes.lvm.make_thin(name, "pool")
    volumes.show()
    create(base, 4 * MIB)
    create(top, 4 * MIB, backing="base-0")
    qemu_img("bitmap", "--add", "-f", "qcow2", top, "kept")
    qemu_io(top, f"write -q -P 7 1M {WRITTEN}")
    return base, top
