# SPDX-License-Identifier: Apache-2.0
"""A guest that works with files on its disk, and knows by checksums what must be in them.

It goes on until the file that it is given the name of is there, whatever happens to the disk
underneath. Then it unmounts the file system, mounts it again, and looks at every file.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.qemu import run

DISK: Final = Path("/dev/disk/by-id/virtio-disk0")
PLACE: Final = Path("/tmp/disk")
MOST_BYTES: Final = 16 << 20
LARGEST: Final = 512 << 10


@dataclass
class Work:
    """Files that are made, changed, read and deleted.

    Attributes:
        sums: SHA-256 of what each file must hold, by its name.
        done: how many things have been done.
    """

    random: random.Random
    sums: dict[str, str] = field(default_factory=dict)
    done: int = 0

    def adopt(self) -> None:
        """Take the files that are there already for what they must be."""
        for path in PLACE.glob("*.bin"):
            self.sums[path.name] = _checksum(path)

    def do_something(self) -> None:
        mine = [name for name in self.sums if name.startswith("mine")]
        size = sum((PLACE / name).stat().st_size for name in mine)
        self.done += 1
        if size > MOST_BYTES:
            self._delete(self.random.choice(mine))
        elif mine and self.random.random() < 0.4:
            self._change(self.random.choice(mine))
        else:
            self._make(f"mine-{self.done}")
        self.look_at(self.random.choice(list(self.sums)))

    def _make(self, name: str) -> None:
        self._write(name, self.random.randbytes(self.random.randrange(1, LARGEST)))

    def _change(self, name: str) -> None:
        content = bytearray((PLACE / name).read_bytes())
        at = self.random.randrange(len(content))
        content[at : at + 5000] = self.random.randbytes(min(5000, len(content) - at))
        self._write(name, bytes(content))

    def _write(self, name: str, content: bytes) -> None:
        """In place, as databases do it."""
        descriptor = os.open(PLACE / name, os.O_WRONLY | os.O_CREAT)
        try:
            os.write(descriptor, content)
            os.ftruncate(descriptor, len(content))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.sums[name] = hashlib.sha256(content).hexdigest()

    def _delete(self, name: str) -> None:
        (PLACE / name).unlink()
        del self.sums[name]

    def look_at(self, name: str) -> None:
        """What a file holds must be what was written to it last."""
        assert _checksum(PLACE / name) == self.sums[name], name

    def look_at_all(self) -> None:
        assert {path.name for path in PLACE.glob("*-*")} == set(self.sums)
        for name in self.sums:
            self.look_at(name)


def _checksum(path: Path) -> str:
    """Of what the disk holds: the kernel forgets what it has in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return hashlib.sha256(file.read()).hexdigest()
    finally:
        os.close(descriptor)


def _mount() -> None:
    run("mount", "-t", "ext4", "-o", "discard", DISK, PLACE)


def main() -> None:
    enough = Path(sys.argv[1])
    PLACE.mkdir()
    _mount()
    work = Work(random.Random(1))
    work.adopt()
    adopted = len(work.sums)
    while not enough.exists():
        work.do_something()
        print(f"done {work.done}", flush=True)
    run("umount", PLACE)
    _mount()
    work.look_at_all()
    run("umount", PLACE)
    print(f"right: {len(work.sums)} files, {adopted} of them older, {work.done} writes", flush=True)


if __name__ == "__main__":
    main()
