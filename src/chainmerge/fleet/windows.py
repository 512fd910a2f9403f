# SPDX-License-Identifier: Apache-2.0
"""When jobs may start: windows by the clock on the wall, as people set them.

So a window from 22:00 to 05:00 is an hour shorter or longer in the nights in which the clock is
changed, and one within the hour that is left out then does not open that night.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import time
    from collections.abc import Iterable


def is_open(windows: Iterable[str], at: time.struct_time) -> bool:
    """Whether jobs with these windows may start at a local time; without a window always.

    Args:
        windows: such as ``22:00-05:00``: from its first minute until before its last one. One
            whose ends are the same is a whole day.
        at: what the clock on the wall shows.
    """
    of_today = at.tm_hour * 60 + at.tm_min
    spans = [tuple(map(_minute, window.split("-"))) for window in windows]
    return not spans or any(_is_within(of_today, start, end) for start, end in spans)


def _minute(clock: str) -> int:
    hours, minutes = clock.split(":")
    return int(hours) * 60 + int(minutes)


def _is_within(minute: int, start: int, end: int) -> bool:
    if start < end:
        return start <= minute < end
    return minute >= start or minute < end
