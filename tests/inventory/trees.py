# SPDX-License-Identifier: Apache-2.0
"""Random trees of images with checkpoints, and what QEMU says of them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    content,
    create,
    dirty_ranges,
    info_of_chain,
    qemu_img,
    qemu_io,
)

KIB: Final = 1 << 10
DISK: Final = 2 << 20
GRAIN: Final = 64 * KIB
DAY: Final = 86_400

Bits = frozenset[int]
"""Dirty granules of a checkpoint, by their numbers."""


@dataclass(frozen=True)
class View:
    """What an image shows, and the checkpoints that a backup from there could use."""

    shown: bytes
    checkpoints: dict[str, Bits]


@dataclass(frozen=True)
class Tree:
    """A chain, from the root up, and the other images that stand on it, by what they stand on."""

    directory: Path
    chain: tuple[Path, ...]
    others: tuple[tuple[Path, int], ...]

    @property
    def leaf(self) -> Path:
        return self.chain[-1]

    @property
    def branching(self) -> frozenset[int]:
        """The images of the chain that others stand on."""
        return frozenset(index for _, index in self.others)


def random_tree(directory: Path, seed: int, now: float) -> Tree:
    """The same for the same seed. Each snapshot is a day older than the one above it."""
    rng = random.Random(seed)
    count = rng.randint(3, 7)
    chain: list[Path] = []
    others: list[tuple[Path, int]] = []
    recording: list[str] = []
    root_format = "raw" if rng.random() < 0.15 else "qcow2"
    for number in range(count):
        below = chain[-1] if chain else None
        image = _image(directory, f"s{number}", below, root_format, rng, recording)
        chain.append(image)
        if number < count - 1 and rng.random() < 0.15:
            other = _image(directory, f"other{number}", image, root_format, rng, list(recording))
            others.append((other, number))
    for number, image in enumerate(chain[:-1]):
        written = now - (count - 1 - number) * DAY
        os.utime(image, (written, written))
    return Tree(directory, tuple(chain), tuple(others))


def _image(
    directory: Path,
    name: str,
    below: Path | None,
    root_format: str,
    rng: random.Random,
    recording: list[str],
) -> Path:
    """An image on *below*, in which checkpoints go on, mostly, and perhaps one begins."""
    is_root = below is None
    fmt = root_format if is_root else "qcow2"
    image = directory / f"{name}.{fmt}"
    if below is None:
        create(image, DISK, fmt=fmt)
    else:
        create(image, backing=below.name, backing_format=below.suffix[1:])
    if fmt == "qcow2":
        if rng.random() < 0.45:
            recording.append(f"cp-{name}")
        for checkpoint in recording:
            if rng.random() < 0.9:
                qemu_img("bitmap", "--add", "-g", str(GRAIN), image, checkpoint)
            # One that is there and does not record spoils the chain as well.
            if rng.random() < 0.1 and checkpoint in bitmap_names(image):
                qemu_img("bitmap", "--disable", image, checkpoint)
    writes = []
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(DISK // GRAIN)
        length = rng.randint(1, min(6, DISK // GRAIN - start))
        # Zeros hide what is below, too.
        what = "-z" if rng.random() < 0.15 else f"-P {rng.randint(1, 255)}"
        writes.append(f"write {what} {start * GRAIN} {length * GRAIN}")
    qemu_io(image, *writes, fmt=fmt)
    return image


def view_of(image: Path) -> View:
    """What QEMU shows of an image, and the union of the bits of each checkpoint that passes.

    As libvirt judges them: valid in the image and in those below without a gap, and absent from
    all others down to the root.
    """
    images = [image.parent / one["filename"] for one in info_of_chain_names(image)]
    states = [states_in(one) for one in images]
    checkpoints = {}
    for name in states[0]:
        run = 0
        while run < len(states) and states[run].get(name):
            run += 1
        if run and not any(name in below for below in states[run:]):
            checkpoints[name] = frozenset().union(*(granules(one, name) for one in images[:run]))
    fmt = "raw" if image.suffix == ".raw" else "qcow2"
    return View(content(image, fmt), checkpoints)


def info_of_chain_names(image: Path) -> list[dict[str, str]]:
    if image.suffix == ".raw":
        return [{"filename": str(image)}]
    return info_of_chain(image)


def states_in(image: Path) -> dict[str, bool]:
    """The bitmaps of an image, and whether each is valid."""
    return {name: one["flags"] == ["auto"] for name, one in bitmap_names(image).items()}


def granules(image: Path, name: str) -> Bits:
    return frozenset(
        number
        for dirty in dirty_ranges(image, name)
        for number in range(dirty.start // GRAIN, -(-(dirty.start + dirty.length) // GRAIN))
    )


def assert_all_clean(directory: Path) -> None:
    for image in directory.glob("*.qcow2"):
        assert_clean(image)
