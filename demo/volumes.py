# SPDX-License-Identifier: Apache-2.0
"""Volumes of a fixed size: loop devices where the machine has them, else limited files."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from tests.support import machine
from tests.support.loopdev import loop_device

if TYPE_CHECKING:
    from collections.abc import Iterator

_COPY_BYTES: Final = 1 << 20


class FixedVolume(Protocol):
    """A volume for base that nobody can make larger."""

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def backing_name(self) -> str:
        """The name by which QEMU reaches base on this volume, and not a byte beyond it."""
        ...

    @property
    def merge_arguments(self) -> tuple[str, ...]:
        """What `chainmerge merge` has to be told about this volume."""
        ...

    def fill(self, image: Path) -> None:
        """Copy an image file onto the volume; what lies behind it stays as it was."""
        ...


@dataclass(frozen=True)
class LoopVolume:
    """A loop device."""

    path: Path
    kind: str = "loop device"

    @property
    def backing_name(self) -> str:
        return str(self.path)

    @property
    def merge_arguments(self) -> tuple[str, ...]:
        # Devices do not lie beside top: a guest must not be able to name one unasked.
        return ("--allow-backing", str(self.path.parent))

    def fill(self, image: Path) -> None:
        with image.open("rb") as source, self.path.open("r+b") as device:
            shutil.copyfileobj(source, device, _COPY_BYTES)


@dataclass(frozen=True)
class LimitedFile:
    """A file that QEMU's raw driver is told to take for a device of a fixed size."""

    path: Path
    size: int
    kind: str = "file of a fixed size"

    @property
    def backing_name(self) -> str:
        limited = {
            "driver": "qcow2",
            "file": {
                "driver": "raw",
                "size": self.size,
                "file": {"driver": "file", "filename": str(self.path)},
            },
        }
        return "json:" + json.dumps(limited)

    @property
    def merge_arguments(self) -> tuple[str, ...]:
        # A base in another directory than top could be a base of many.
        alone = ("--allow-backing", str(self.path.parent), "--sole-user")
        return (*alone, "--size-limit", str(self.size))

    def fill(self, image: Path) -> None:
        shutil.copyfile(image, self.path)
        with self.path.open("r+b") as file:
            file.truncate(self.size)


@contextmanager
def loop_volume(directory: Path, size: int, *options: str) -> Iterator[LoopVolume]:
    """A loop device of *size* bytes on a new file in *directory*; *options* go to losetup."""
    with loop_device(directory / f"volume-{size}", size, *options) as device:
        yield LoopVolume(device)


@contextmanager
def fixed_volume(directory: Path, size: int) -> Iterator[FixedVolume]:
    """The most real volume of *size* bytes that this machine permits."""
    if machine.has_loop_devices():
        with loop_volume(directory, size) as loop:
            yield loop
    else:
        yield LimitedFile(directory / "base.qcow2", size)
