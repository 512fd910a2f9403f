# SPDX-License-Identifier: Apache-2.0
"""What the images of a life lie on: files that are made and deleted, or volumes that stay."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tests.support.qemu import run

if TYPE_CHECKING:
    from collections.abc import Iterator

VOLUME_BYTES = 8 << 20


class Storage(Protocol):
    """Places for images, all in one directory, each under a name that stays."""

    directory: Path
    deletes: bool
    """Whether images come and go with their names."""

    def place(self, name: str) -> Path:
        """Where the image of that name is, or is to be."""
        ...

    def holds(self, path: Path) -> bool:
        """Whether there is something at *path*, an image or what is left of one."""
        ...

    def put(self, source: Path, target: Path, *, same_inode: bool) -> None:
        """Copy a file into the place of an image."""
        ...

    def renumber(self) -> None:
        """What a restart of the machine does: volumes come back under other numbers."""
        ...


@dataclass
class Files:
    """Files in a directory."""

    directory: Path
    deletes: bool = True

    def place(self, name: str) -> Path:
        return self.directory / name

    def holds(self, path: Path) -> bool:
        return path.exists()

    def put(self, source: Path, target: Path, *, same_inode: bool) -> None:
        if not same_inode:
            target.unlink(missing_ok=True)
        shutil.copyfile(source, target)

    def renumber(self) -> None:
        """Files have no numbers."""


@dataclass
class Volumes:
    """Loop devices behind links that stay, as those of udev do."""

    directory: Path
    stores: Path
    deletes: bool = False
    _keepers: list[int] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)

    def place(self, name: str) -> Path:
        link = self.directory / name
        if not link.is_symlink():
            with (self.stores / name).open("wb") as store:
                store.truncate(VOLUME_BYTES)
            self._names.append(name)
            self._attach(name)
        return link

    def holds(self, path: Path) -> bool:
        return path.is_symlink()

    def put(self, source: Path, target: Path, *, same_inode: bool) -> None:
        del same_inode
        run("dd", f"if={source}", f"of={target}", "bs=1M", "conv=notrunc,fsync")

    def renumber(self) -> None:
        self.detach()
        # Each gets the number that another one had.
        self._names = [*self._names[1:], *self._names[:1]]
        for name in self._names:
            self._attach(name)

    def _attach(self, name: str) -> None:
        device = run("losetup", "--find", "--show", self.stores / name).stdout.strip()
        self._keepers.append(os.open(device, os.O_RDONLY | os.O_CLOEXEC))
        # The kernel detaches it when the last one closes it, this process included.
        run("losetup", "--detach", device)
        link = self.directory / name
        link.unlink(missing_ok=True)
        link.symlink_to(device)

    def detach(self) -> None:
        """Give all devices back."""
        for keeper in self._keepers:
            os.close(keeper)
        self._keepers.clear()


@contextlib.contextmanager
def volumes(directory: Path) -> Iterator[Volumes]:
    """Volumes, links to them in a directory of their own, and their contents beside it."""
    links, stores = directory / "volumes", directory / "stores"
    links.mkdir()
    stores.mkdir()
    made = Volumes(links, stores)
    try:
        yield made
    finally:
        made.detach()
