# SPDX-License-Identifier: Apache-2.0
"""Numbers as they stand in sentences."""

from __future__ import annotations

from typing import Final

_VOWELS: Final = "aeiou"


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless it is one: ``1 bitmap``, ``2 entries``."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in _VOWELS:
        return f"{number} {noun[:-1]}ies"
    return f"{number} {noun}s"
