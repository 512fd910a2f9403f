# SPDX-License-Identifier: Apache-2.0
"""What the situations of the zoo are made with, by QEMU's tools and by a change of single bytes."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any, Final

from chainmerge import ScanOptions
from tests.support import surgery
from tests.support.images import MIB
from tests.support.qemu import create, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

DISK: Final = 16 * MIB
DAY: Final = 86_400
BACKING_FORMAT_EXTENSION: Final = 0xE2792ACA


def chain(directory: Path, name: str, length: int, **options: Any) -> list[Path]:
    """A chain in which each image holds two MiB of its own, half of them over the one below."""
    images: list[Path] = []
    for number in range(length):
        path = directory / f"{name}{number}.qcow2"
        if images:
            create(path, backing=images[-1].name, **options)
        else:
            create(path, DISK, **options)
        qemu_io(path, f"write -P {number + 1} {number % 8}M 2M")
        images.append(path)
    return images


def small(**chosen: int | bool) -> ScanOptions:
    """Thresholds that small images reach."""
    return ScanOptions(cache=False, **chosen)  # type: ignore[arg-type]


def age(image: Path, days: int) -> None:
    """Have an image be written so many days ago."""
    then = image.stat().st_mtime - days * DAY
    os.utime(image, (then, then))


def touch_upwards(home: Path) -> None:
    """Have images be written in the order of their names, as guests write to them."""
    for image in sorted(home.glob("*.qcow2")):
        os.utime(image)


def base_is_older_than(base: Path, *overlays: Path) -> None:
    """What was exchanged has its old time, and its overlays have been made anew."""
    age(base, 1)
    for overlay in overlays:
        shutil.copy2(overlay, overlay.with_suffix(".new"))
        overlay.with_suffix(".new").replace(overlay)


def copied(image: Path) -> None:
    """Put a copy in an image's place, as a restore does."""
    copy = image.with_suffix(".copy")
    shutil.copy2(image, copy)
    copy.replace(image)


def undeclare(image: Path) -> None:
    """Take the extension that names the format of the backing file out of a header."""
    place = surgery.extension_at(image, BACKING_FORMAT_EXTENSION) - 8
    surgery.put_bytes(image, place, (0x12345678).to_bytes(4))


def lose_refcounts(image: Path) -> None:
    """Have the first refcount block count nothing."""
    table = surgery.REFCOUNT_OFFSET.get(image)
    block = int.from_bytes(surgery.get_bytes(image, table, 8))
    surgery.put_bytes(image, block, bytes(65536))


def lose_directory(image: Path) -> None:
    """Have the directory of bitmaps be where none can be."""
    qemu_img("bitmap", "--add", image, "daily")
    # Behind the number of bitmaps, a reserved field and the size of the directory.
    place = surgery.extension_at(image, surgery.BITMAPS_EXTENSION) + 16
    surgery.put_bytes(image, place, (7).to_bytes(8))
