# SPDX-License-Identifier: Apache-2.0
"""Images of the formats that only QEMU reads, with data, and what qemu-img says they show."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from tests.support.qemu import create, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

KIB: Final = 1 << 10
MIB: Final = 1 << 20
DISK: Final = 8 * MIB


class Kind(Struct, frozen=True):
    """A format, and how images of it are made."""

    format: str
    options: str = ""

    @property
    def name(self) -> str:
        """For the name of a test."""
        return "-".join(filter(None, (self.format, self.options.partition("=")[2])))


KINDS: Final = (
    Kind("vmdk", "subformat=monolithicSparse"),
    Kind("vmdk", "subformat=monolithicFlat"),
    Kind("vmdk", "subformat=twoGbMaxExtentSparse"),
    Kind("vmdk", "subformat=twoGbMaxExtentFlat"),
    Kind("vmdk", "subformat=streamOptimized"),
    Kind("vdi"),
    Kind("vdi", "static=on"),
    Kind("vhdx", "subformat=dynamic"),
    Kind("vhdx", "subformat=fixed"),
    Kind("vpc", "subformat=dynamic"),
    Kind("vpc", "subformat=fixed"),
    Kind("qed"),
    Kind("parallels"),
)
"""Every format that a chain may stand on, in its ways of keeping data."""

FEW_KINDS: Final = (KINDS[0], KINDS[2], KINDS[5], KINDS[7])
"""One of each of those that people have."""

WRITES: Final = (
    "write -q -P 0x11 0 1M",
    "write -q -P 0x22 3M 100k",
    "write -q -P 0x33 7M 1M",
)


def foreign_image(directory: Path, kind: Kind, name: str = "root") -> Path:
    """An image with data at its beginning, in the middle and at its end, and zeros between."""
    source = create(directory / f"{name}.source", DISK, fmt="raw")
    qemu_io(source, *WRITES, fmt="raw")
    image = directory / f"{name}.{kind.format}"
    options = ["-o", kind.options] if kind.options else []
    qemu_img("convert", "-f", "raw", "-O", kind.format, *options, source, image)
    source.unlink()
    return image


def virtual_size(image: Path, fmt: str) -> int:
    """Bytes of the guest's disk, as qemu-img says of an image of that format."""
    return int(json.loads(qemu_img("info", "--output=json", "-f", fmt, image))["virtual-size"])
