# SPDX-License-Identifier: Apache-2.0
"""The demo's scenario: base full of stale bitmaps, top full of data.

Base is a 1 GiB disk on a volume of 128 MiB, with bitmaps that no image above has any
more. Top holds 126 MiB of data and the bitmap that the next backup needs. So 32
clusters of the volume are left for everything that is not data. Images are built once
and copied, because a merge changes them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from demo.volumes import FixedVolume
from tests.support.qemu import DirtyRange, create, qemu_img, qemu_io

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

VOLUME_SIZE: Final = 128 * MIB
DISK_SIZE: Final = 1 * GIB
DATA_SIZE: Final = 126 * MIB
GRANULARITY: Final = 64 * KIB
GOOD: Final = "good"

# What base's guest wrote since the bitmaps that base and top share: outside of top's data,
# so that a merge that forgets base's bits is found out.
BASE_WRITE: Final = DirtyRange(DATA_SIZE + MIB, GRANULARITY)
TOP_WRITE: Final = DirtyRange(0, DATA_SIZE)


@dataclass(frozen=True)
class Case:
    """One chain of two images, ready to be merged.

    Attributes:
        volume: Where base lies.
        top: The image to merge.
        expected: An image of its own with the content that top's view has.
    """

    volume: FixedVolume
    top: Path
    expected: Path


class Workshop:
    """Builds cases in a directory of its own.

    Attributes:
        shared: Good bitmaps in both images.
        own: Good bitmaps in top alone.
    """

    def __init__(
        self, directory: Path, shared: tuple[str, ...] = (), own: tuple[str, ...] = (GOOD,)
    ) -> None:
        self.shared = shared
        self.own = own
        self._directory = directory
        self._top = self._build_top()
        self._expected = self._build_expected()
        self._bases = [self._build_base()]

    @property
    def good_bitmaps(self) -> tuple[str, ...]:
        """All that base must hold after the merge, and nothing else."""
        return (*self.shared, *self.own)

    def dirty_ranges(self, name: str) -> list[DirtyRange]:
        """What a good bitmap of base must say after the merge."""
        return [TOP_WRITE, BASE_WRITE] if name in self.shared else [TOP_WRITE]

    def case(self, volume: FixedVolume, stale: int) -> Case:
        """Put a base with *stale* bitmaps on the volume, and a fresh top over it."""
        volume.fill(self._base(stale))
        # A merge leaves its notes beside top, and the next one must not find them.
        place = self._directory / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        top = place / "top.qcow2"
        shutil.copyfile(self._top, top)
        self.let_stand_on(top, str(volume.path))
        return Case(volume, top, self._expected)

    @staticmethod
    def let_stand_on(top: Path, backing_name: str) -> None:
        """Write another backing name into top; nothing is read or compared."""
        qemu_img("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing_name, top)

    def _base(self, stale: int) -> Path:
        # One bitmap at a time, as the years bring them. Every one makes QEMU write all of
        # them anew beside the old ones, and the holes that this leaves are part of the story.
        while len(self._bases) <= stale:
            number = len(self._bases)
            base = self._directory / f"base-{number}.qcow2"
            shutil.copyfile(self._bases[-1], base)
            qemu_img("bitmap", "--add", "-f", "qcow2", base, f"stale-{number}")
            self._bases.append(base)
        return self._bases[stale]

    def _build_base(self) -> Path:
        base = create(self._directory / "base-0.qcow2", DISK_SIZE)
        if self.shared:
            for name in self.shared:
                qemu_img("bitmap", "--add", "-f", "qcow2", base, name)
            _write(base, BASE_WRITE, pattern=1)
        return base

    def _build_top(self) -> Path:
        top = create(self._directory / "top-template.qcow2", DISK_SIZE)
        for name in self.good_bitmaps:
            qemu_img("bitmap", "--add", "-f", "qcow2", top, name)
        _write(top, TOP_WRITE, pattern=2)
        return top

    def _build_expected(self) -> Path:
        expected = create(self._directory / "expected.qcow2", DISK_SIZE)
        if self.shared:
            _write(expected, BASE_WRITE, pattern=1)
        _write(expected, TOP_WRITE, pattern=2)
        return expected


def _write(image: Path, where: DirtyRange, pattern: int) -> None:
    qemu_io(image, f"write -q -P {pattern} {where.start} {where.length}")
