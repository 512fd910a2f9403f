# SPDX-License-Identifier: Apache-2.0
"""Sizes as people type them: ``65536``, ``64K``, ``100M``, ``2G``."""

from __future__ import annotations

import re
from typing import Final

_SIZE: Final = re.compile(r"(\d+)([kmgtpe]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_SHIFTS: Final = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_MOST_DIGITS: Final = 19
"""More of them are larger than any size that is one, and slow to convert."""
_TOO_LARGE: Final = 1 << 64


def bytes_of(text: str) -> int | None:
    """The bytes that *text* stands for, as QEMU's tools read it; None if it is not a size.

    What is larger than any image can be may come back as another number that is so as well.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    number, unit = match.groups()
    return _TOO_LARGE if len(number) > _MOST_DIGITS else int(number) << _SHIFTS[unit.lower()]
