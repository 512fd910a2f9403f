# SPDX-License-Identifier: Apache-2.0
"""Durations as people type them: ``7d``, ``12h``, ``4w``."""

from __future__ import annotations

import math
import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

SECONDS_IN: Final[Mapping[str, int]] = MappingProxyType(
    {"w": 604_800, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
)
"""By the letter that stands for a unit, the largest first."""

_DURATION: Final = re.compile(r"(\d{1,12})([wdhms])", re.IGNORECASE | re.ASCII)


def seconds_of(text: str) -> int | None:
    """The seconds that *text* stands for; None if it is not a duration."""
    match = _DURATION.fullmatch(text)
    if match is None:
        return None
    number, unit = match.groups()
    return int(number) * SECONDS_IN[unit.lower()]


def spelled_duration(seconds: float) -> str:
    """A duration as :func:`seconds_of` reads it, in the largest unit that gives a whole number.

    A part of a second counts as a whole one.
    """
    whole = math.ceil(seconds)
    unit = next(unit for unit, size in SECONDS_IN.items() if whole % size == 0)
    return f"{whole // SECONDS_IN[unit]}{unit}"
