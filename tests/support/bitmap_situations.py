# SPDX-License-Identifier: Apache-2.0
"""A chain in which every situation of a checkpoint's bitmaps occurs, each under its own name.

Names have nothing to do with each other in a merge, so one chain, and one running VM, holds all
of them: for every combination of states in the images, a bitmap in each of these states.
"""

from __future__ import annotations

import itertools
import random
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from chainmerge.bitmaps.rules import BitmapState, chain_test
from chainmerge.bitmaps.stored import state_of
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.qcow2.bitmaps import BitmapFlag, read_bits, read_directory
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import FileReadable, WritablePort
from tests.support.live_scenario import granules
from tests.support.qemu import create, qemu_io
from tests.support.surgery import mark_bitmap_in_use

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

KIB: Final = 1 << 10
DISK: Final = 4 << 20
CLUSTER: Final = 64 * KIB
GRANULARITIES: Final = (4 * KIB, 16 * KIB, 64 * KIB)
STATES: Final = tuple(BitmapState)
_LETTERS: Final = {
    BitmapState.ABSENT: "-",
    BitmapState.VALID: "v",
    BitmapState.DISABLED: "d",
    BitmapState.IN_USE: "u",
}


@dataclass(frozen=True)
class Found:
    """A bitmap as it is on disk: the guest's bytes that one bit stands for, and its dirty bits."""

    state: BitmapState
    granularity: int
    dirty: frozenset[int]

    def in_steps_of(self, granularity: int) -> frozenset[int]:
        """The dirty bits of a bitmap of another granularity that covers the same."""
        return frozenset(
            granule
            for bit in self.dirty
            for granule in range(
                bit * self.granularity // granularity,
                -(-(bit + 1) * self.granularity // granularity),
            )
        )


def build_chain(directory: Path, names: Sequence[str], shares: Collection[int]) -> list[Path]:
    """Create a chain of images with these names, the root first, with data in each.

    Every combination of states above the root is in it, and *shares* says with which states of the
    root: 0 to 3 are a fourth of them each.
    """
    directory.mkdir(parents=True)
    images: list[Path] = []
    for number, name in enumerate(names):
        below = images[-1] if images else None
        image = directory / f"{name}.qcow2"
        create(image, *(() if below else (DISK,)), backing=below.name if below else None)
        qemu_io(image, *(f"write -q -P {number + 1} {at} {size}" for at, size in _written(number)))
        images.append(image)
    for number, image in enumerate(images):
        _store(image, number, _situations(len(images), shares))
    return images


def _written(number: int) -> tuple[tuple[int, int], ...]:
    """Where image *number* has data: places and lengths."""
    return ((number * 768 * KIB, 300 * KIB), (3 << 20, 1 << 20))


def clusters_with_data(number: int) -> frozenset[int]:
    """The numbers of the clusters that image *number* has data for."""
    return frozenset(
        cluster
        for at, size in _written(number)
        for cluster in range(at // CLUSTER, -(-(at + size) // CLUSTER))
    )


def _situations(images: int, shares: Collection[int]) -> list[tuple[str, tuple[BitmapState, ...]]]:
    """Combinations of states, with a name that shows each, the root's state first."""
    return [
        ("".join(_LETTERS[state] for state in states), states)
        for states in itertools.product(STATES, repeat=images)
        if set(states) != {BitmapState.ABSENT}
        # No two combinations that differ in the root alone are of the same share.
        and sum(map(STATES.index, states)) % len(STATES) in shares
    ]


def _store(image: Path, number: int, situations: list[tuple[str, tuple[BitmapState, ...]]]) -> None:
    bitmaps = [
        _bitmap(name, number, states[number])
        for name, states in situations
        if states[number] is not BitmapState.ABSENT
    ]
    with WritablePort(image) as port:
        replace_bitmaps(port, bitmaps)
    for name, states in situations:
        if states[number] is BitmapState.IN_USE:
            mark_bitmap_in_use(image, name)


def _bitmap(name: str, number: int, state: BitmapState) -> StoredBitmap:
    random_ = random.Random(f"{name} {number}")
    granularity = random_.choice(GRANULARITIES)
    # Some have no bits: one that is disabled as well is a tombstone.
    count = random_.choice((0, 1, 5))
    starts = sorted(random_.sample(range(DISK // granularity), count))
    bits = BitSet.from_ranges([(at * granularity, granularity) for at in starts], DISK, granularity)
    flags = BitmapFlag(0) if state is BitmapState.DISABLED else BitmapFlag.AUTO
    return StoredBitmap(name, bits, flags)


def copied_to(directory: Path, images: Sequence[Path]) -> list[Path]:
    """The same chain once more."""
    shutil.copytree(images[0].parent, directory)
    return [directory / image.name for image in images]


def bitmaps_of(image: Path) -> dict[str, Found]:
    """The bitmaps of a closed image."""
    with FileReadable(image) as readable:
        parsed = Qcow2Image(readable)
        found = {}
        for entry in read_directory(parsed):
            state = state_of(parsed, entry)
            dirty = granules(read_bits(parsed, entry)) if state is not BitmapState.IN_USE else ()
            found[entry.name] = Found(state, entry.granularity, frozenset(dirty))
        return found


def passing(images: Sequence[Path]) -> set[str]:
    """The checkpoints that a backup of this chain, root first, would take for complete."""
    layers = [bitmaps_of(image) for image in reversed(images)]
    names = {name for layer in layers for name in layer}
    absent = Found(BitmapState.ABSENT, 0, frozenset())
    return {
        name
        for name in names
        if chain_test([layer.get(name, absent).state for layer in layers]).passes
    }
