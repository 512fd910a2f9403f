# SPDX-License-Identifier: Apache-2.0
"""How large the disk of an image is that only QEMU reads: QEMU itself says that."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from chainmerge.chain.allowed_places import reached, resolved
from chainmerge.chain.foreign.extents import NotUnderstood, extents_of
from chainmerge.chain.foreign.formats import (
    FOREIGN_FORMATS,
    LIMITS_TO_LOOK,
    not_started,
    opened_for_qemu,
    unreadable,
)
from chainmerge.chain.reading import open_image
from chainmerge.errors import ChainmergeError

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.chain.allowed_places import AllowedPlaces
    from chainmerge.chain.model import ImageInfo

_PROGRAM: Final = "qemu-img"
_TIMEOUT_SECONDS: Final = 60.0
_SECTOR: Final = 512
# QEMU's own bound is 2**63 - 2**30; what is larger than this has other reasons.
_LARGEST_DISK: Final = 1 << 60


def sized_by_qemu(image: ImageInfo, allowed: AllowedPlaces) -> ImageInfo:
    """The same image with the size of its disk, if it is of a format that a chain may stand on.

    Where the size cannot be had, ``size_problem`` says why, and whoever asks for it is told.

    Args:
        image: the lowest one of a chain.
        allowed: where it may keep data in other files.
    """
    if image.format not in FOREIGN_FORMATS:
        return image
    try:
        known = replace(image, extents=_extents(image, allowed))
        return replace(known, guest_size=_size_of(known))
    except ChainmergeError as error:
        note = f"its size is not known: {error.sentence}"
        return replace(image, size_problem=error, notes=(*image.notes, note))


def _extents(image: ImageInfo, allowed: AllowedPlaces) -> tuple[Path, ...]:
    if image.format != "vmdk":
        return ()

    def why_not_allowed(path: Path) -> str | None:
        if allowed.names(path):
            return None
        outside = [one for one in (reached(path), resolved(path)) if not allowed.holds(one)]
        return f"which is {outside[0]}, outside of the allowed directories" if outside else None

    with open_image(image) as readable:
        try:
            return extents_of(image.real_path, readable, why_not_allowed)
        except NotUnderstood as error:
            raise unreadable(image, str(error)) from error


def _size_of(image: ImageInfo) -> int:
    """Bytes of the guest's disk. Raises ForeignUnreadable and what opening raises."""
    told = _told_by_qemu(image)
    if told.get("format") != image.format:
        raise unreadable(image, "QEMU takes it for an image of another format")
    if told.get("backing-filename"):
        raise unreadable(image, "it has a backing file of its own")
    size = told.get("virtual-size")
    if not isinstance(size, int) or not 0 <= size <= _LARGEST_DISK or size % _SECTOR:
        raise unreadable(image, f"its disk is said to have {size} bytes")
    return size


def _told_by_qemu(image: ImageInfo) -> dict[str, Any]:
    program = shutil.which(_PROGRAM)
    if program is None:
        raise unreadable(image, f"{_PROGRAM}, which reads it, is not installed")
    with opened_for_qemu(image) as name:
        try:
            done = subprocess.run(
                [*LIMITS_TO_LOOK, program, "info", "--output=json", name.filename],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=name.descriptors,
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            reason = f"{_PROGRAM} info did not end within {_TIMEOUT_SECONDS:.0f} s"
            raise unreadable(image, reason) from error
        except OSError as error:
            raise not_started(image, _PROGRAM, error) from error
    if done.returncode != 0:
        raise unreadable(image, name.said(done.stderr))
    try:
        told = json.loads(done.stdout)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise unreadable(image, f"{_PROGRAM} info does not answer in JSON")
    return told
