# SPDX-License-Identifier: Apache-2.0
"""Building what the benchmarks work on, each image once, and copying it for each round."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from tests.support.qemu import create, qemu_img, qemu_io, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from benchmarks.harness import Settings

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40
CLUSTER: Final = 64 * KIB

# Commands for one process; the length of an argument list is limited.
_BATCH: Final = 2000


def random_clusters(count: int, disk_size: int, seed: int) -> list[int]:
    """Offsets of distinct clusters of a disk, in random order, the same for the same seed."""
    return [
        number * CLUSTER
        for number in random.Random(seed).sample(range(disk_size // CLUSTER), count)
    ]


def write_clusters(image: Path, offsets: Iterable[int], *options: str) -> None:
    """Write one cluster at each offset, in this order."""
    numbered = list(enumerate(offsets))
    for start in range(0, len(numbered), _BATCH):
        commands = (
            f"write -q -P {1 + number % 255} {offset} {CLUSTER}"
            for number, offset in numbered[start : start + _BATCH]
        )
        qemu_io(image, *commands, options=options)


def let_stand_on(top: Path, base: Path) -> None:
    """Write another backing name into top; nothing is read or compared."""
    qemu_img("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, top)


def fresh_copy(template: Path, place: Path) -> None:
    """Put a copy of *template* at *place*: a new file, so that nothing of an old one is left."""
    place.unlink(missing_ok=True)
    run("cp", "--reflink=auto", "--sparse=always", template, place)


def program_loader(settings: Settings) -> Callable[[], None]:
    """What has all programs in memory again after caches were dropped: a merge of nothing.

    What is measured is work on images; starting the programs has a benchmark of its own.
    """
    place = settings.scratch / "loader"
    place.mkdir()
    base = create(place / "base.qcow2", MIB)
    top = create(place / "top.qcow2", backing=base)

    def load() -> None:
        run(*settings.merge(top))
        qemu_img("commit", "-q", "-d", top)

    return load
