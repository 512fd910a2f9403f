# SPDX-License-Identifier: Apache-2.0
"""Which file system a place is on, found without accessing the place: a dead one would hang."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
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


def mounts(table: Path = _TABLE) -> Mounts:
    """What this process sees mounted now; nothing where the kernel does not tell."""
    try:
        lines = table.read_bytes().splitlines()
    except OSError:
        return Mounts({})
    found = {}
    # Of several mounts on one point, the last one is seen.
    for fields in (line.split() for line in lines):
        if len(fields) > 4:
            found[_unescaped(fields[4])] = fields[2].decode("ascii", "replace")
    return Mounts(found)


def _unescaped(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda digits: bytes([int(digits[1], 8) & 0xFF]), field))
