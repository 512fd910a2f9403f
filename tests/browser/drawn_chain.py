# SPDX-License-Identifier: Apache-2.0
"""Chains in which there is something of everything that is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.support.images import GIB
from tests.support.qemu import create, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

_WRITES: Final = (
    ("base.qcow2", (("0", "96M"), ("2G", "64M"), ("5G", "80M"))),
    ("monday.qcow2", (("32M", "64M"), ("3G", "96M"))),
    ("tuesday.qcow2", (("0", "48M"), ("3G", "32M"), ("6G", "64M"))),
    ("wednesday.qcow2", (("1G", "96M"), ("5G", "64M"))),
    ("active.qcow2", (("16M", "32M"), ("7G", "48M"))),
)
"""Of each image, from the root up, what is written: where it begins, and how much."""


def build_chain(directory: Path) -> list[Path]:
    """A chain of five images, with a checkpoint that can be used, a stale and a broken one."""
    images: list[Path] = []
    for name, writes in _WRITES:
        path = directory / name
        create(path, 8 * GIB) if not images else create(path, backing=images[-1])
        if name == "base.qcow2":
            qemu_img("bitmap", "--add", path, "last-year")
        if len(images) >= 3:
            qemu_img("bitmap", "--add", path, "weekly")
        if len(images) in {1, 4}:
            qemu_img("bitmap", "--add", path, "nightly")
        qemu_io(path, *(f"write -q -P 1 {start} {length}" for start, length in writes))
        images.append(path)
    return images
