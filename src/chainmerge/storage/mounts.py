# SPDX-License-Identifier: Apache-2.0
"""Which file system a place is on, found without accessing the place: a dead one would hang."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

_TABLE: Final = Path("/proc/self/mountinfo")
# A space, tab, newline or backslash in a path is written as three octal digits (proc(5)).
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


class Mounts(Struct, frozen=True):
    """What is mounted where.

    Attributes:
        file_systems: The file system on each mount point, as ``major:minor``.
    """

    file_systems: Mapping[str, str]

    def file_system_of(self, path: str) -> str:
        """The file system of an absolute path without symbolic links; empty if nobody knows."""
        while path not in self.file_systems and path != os.path.dirname(path):  # noqa: PTH120
            path = os.path.dirname(path)  # noqa: PTH120
        return self.file_systems.get(path, "")


class MountedFrom(Struct, frozen=True):
    """A file system that is mounted somewhere.

    Attributes:
        kind: What the kernel calls it, such as ``ext4`` or ``nfs4``.
        source: What it is mounted from: a device, a server's directory, or any word.
    """

    kind: str
    source: str


def mounts(table: Path = _TABLE) -> Mounts:
    """What this process sees mounted now; nothing where the kernel does not tell."""
    # Of several mounts on one point, the last one is seen.
    return Mounts(
        {point: fields[2].decode("ascii", "replace") for point, fields in _mount_points(table)}
    )


def mounted_from(path: str, table: Path = _TABLE) -> MountedFrom | None:
    """The file system of an absolute path without symbolic links; None if nobody knows."""
    found = dict(_mount_points(table))
    while path not in found and path != os.path.dirname(path):  # noqa: PTH120
        path = os.path.dirname(path)  # noqa: PTH120
    # Optional fields stand before a lone hyphen (proc(5)).
    _, hyphen, rest = b" ".join(found.get(path, ())).partition(b" - ")
    words = rest.split()
    if not hyphen or len(words) < 2:
        return None
    return MountedFrom(_unescaped(words[0]), _unescaped(words[1]))


def _mount_points(table: Path) -> Iterator[tuple[str, list[bytes]]]:
    """Each mount point, with the fields of its line."""
    try:
        lines = table.read_bytes().splitlines()
    except OSError:
        return
    for fields in (line.split() for line in lines):
        if len(fields) > 4:
            yield _unescaped(fields[4]), fields


def _unescaped(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda digits: bytes([int(digits[1], 8) & 0xFF]), field))
