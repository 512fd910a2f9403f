# SPDX-License-Identifier: Apache-2.0
"""When chains and storage reach their limits, from how they grew from scan to scan. Pure.

The growth is the median of what lies between any two scans (Theil and Sen), so that one that was
made while much was copied, or a merge, does not count. What is thinned out or deleted as fast as it
grows has no growth.
"""

from __future__ import annotations

import itertools
from statistics import median
from typing import TYPE_CHECKING, Final

from chainmerge.documents.trends import Forecast, Limited

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.records.history import Level, ScanLine

FEWEST_SCANS: Final = 4
"""Fewer say nothing, and neither do those of less than a day."""
_DAY: Final = 86_400
_LOOKED_BACK: Final = 60 * _DAY
_LOOKED_AHEAD: Final = 365 * _DAY
_MOST_POINTS: Final = 100


def forecasts(scans: Sequence[ScanLine], most_images: int) -> tuple[Forecast, ...]:
    """What reaches its limit within a year; the first comes first.

    Args:
        scans: of the same places, the oldest first; the last one says how it is now.
        most_images: the limit of chains.
    """
    if not scans:
        return ()
    found = (_forecast(level, scans, most_images) for level in scans[-1].levels)
    return tuple(sorted((one for one in found if one is not None), key=_order))


def _forecast(level: Level, scans: Sequence[ScanLine], most_images: int) -> Forecast | None:
    now = scans[-1].at
    limit = most_images if level.kind == Limited.CHAIN else level.limit
    points = _thinned(list(_points_of(level, scans, now - _LOOKED_BACK)))
    if len(points) < FEWEST_SCANS or points[-1][0] - points[0][0] < _DAY or level.value >= limit:
        return None
    growth = median(
        (after[1] - before[1]) / (after[0] - before[0])
        for before, after in itertools.combinations(points, 2)
    )
    if growth <= 0:
        return None
    left = (limit - level.value) / growth
    if left > _LOOKED_AHEAD:
        return None
    return Forecast(
        Limited(level.kind),
        level.name,
        level.path,
        level.value,
        limit,
        now + round(left),
        len(points),
    )


def _points_of(level: Level, scans: Sequence[ScanLine], since: int) -> Iterator[tuple[int, int]]:
    """When it had which value, in the order of time; each moment once, as clocks are set back."""
    found = {
        scan.at: one.value
        for scan in scans
        for one in scan.levels
        if scan.at >= since and (one.kind, one.name) == (level.kind, level.name)
    }
    yield from sorted(found.items())


def _thinned(points: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Of many points some, evenly, the last one included: each is compared with each."""
    step = -(-len(points) // _MOST_POINTS) if points else 1
    return points[(len(points) - 1) % step :: step] if points else points


def _order(forecast: Forecast) -> tuple[int, str, str]:
    return forecast.reached_at, forecast.kind, forecast.name
