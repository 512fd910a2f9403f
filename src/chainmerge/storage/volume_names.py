# SPDX-License-Identifier: Apache-2.0
"""The names under ``/dev`` that a logical volume has wherever, and whenever, it is active.

``/dev/GROUP/VOLUME`` and ``/dev/mapper/NAME``, where NAME joins the two by a dash, and a dash
within one of them is doubled. No name of a volume begins with a dash, as LVM sees to. The number
of its node (``/dev/dm-5``) is another volume's after the next boot.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_DEVICES: Final = Path("/dev")
_MAPPER: Final = _DEVICES / "mapper"
# What else has directories there, in which no names of volumes are.
_OF_OTHERS: Final = frozenset({"disk", "block", "char", "shm", "mqueue", "pts", "fd", "mapper"})


def volume_path(mapper_name: str) -> Path | None:
    """``/dev/GROUP/VOLUME`` of a volume by its name in the device mapper; None if it is no such."""
    for dashes in re.finditer("-+", mapper_name):
        if len(dashes[0]) % 2:
            group, volume = mapper_name[: dashes.end() - 1], mapper_name[dashes.end() :]
            return _DEVICES / group.replace("--", "-") / volume.replace("--", "-")
    return None


def mapper_name_in(path: Path) -> str | None:
    """The name in the device mapper that a path spells, whatever is there; None if it is no such.

    Links are not followed: the volume may be gone, and another one have its node.
    """
    place, name = os.path.split(os.path.abspath(path))  # noqa: PTH100 (links are not followed)
    if not name:
        return None
    if place == str(_MAPPER):
        return name if volume_path(name) is not None else None
    group = os.path.relpath(place, _DEVICES)
    if "/" in group or group.startswith(".") or group in _OF_OTHERS:
        return None
    return f"{group.replace('-', '--')}-{name.replace('-', '--')}"


def is_device_name(path: Path) -> bool:
    """Whether a path lies where the system makes the names of its devices, and takes them away."""
    return path.is_relative_to(_DEVICES)
