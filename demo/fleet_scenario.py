# SPDX-License-Identifier: Apache-2.0
"""The chains of the fleet's demo: on each host's own storage, and on one that all of them reach."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Final

from tests.support.qemu import qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.fleet import Host

HOSTS: Final = ("h0", "h1", "h2")
CHAINS: Final = 50
SHARED_LIMIT: Final = 3
RATE: Final = "2M"
_DISK: Final = "64M"
_LENGTHS: Final = (2, 3, 4)


def build_chains(hosts: Sequence[Host], shared: Path, count: int) -> list[Path]:
    """Make so many chains, every fourth one on the shared storage; return their tops.

    Beside each top lies a copy of what its guest sees, where no scan looks for images of chains:
    its name ends in ``.expected``.
    """
    tops = []
    lengths = cycle(_LENGTHS)
    for number in range(count):
        host = hosts[number % len(hosts)]
        place = shared if number % 4 == 3 else host.images
        tops.append(_chain(place, f"vm{number:02}", next(lengths)))
    return tops


def _chain(place: Path, name: str, images: int) -> Path:
    base, top = place / f"{name}.base", place / f"{name}.top"
    qemu_img("create", "-q", "-f", "qcow2", base, _DISK)
    qemu_io(base, "write -q -P 1 0 2M")
    below = base
    for number in range(images - 1):
        above = top if number == images - 2 else place / f"{name}.{number}"
        qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, above)
        qemu_io(above, f"write -q -P {number + 2} {number + 1}M 2M")
        below = above
    qemu_img("convert", "-O", "raw", top, top.with_suffix(".expected"))
    return top
