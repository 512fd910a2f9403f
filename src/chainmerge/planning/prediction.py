# SPDX-License-Identifier: Apache-2.0
"""How long a merge will take, from how long others took on the same storage. Pure.

A merge takes some time whatever it moves, some for each byte, and some for each cluster that it
allocates. How much of each is found from the earlier merges, so that the relative error is least:
by least absolute deviations, as one merge that had to share the disk must not count for all others.
No part is below zero. How far those merges are from what this says of them is how far the next one
may be.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from msgspec import Struct

from chainmerge.planning.workload import Effort

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]

FEWEST_MERGES: Final = 4
"""Fewer say nothing."""
_MERGES_A_PART: Final = 2
_ROUNDS: Final = 30
_LEAST_ERROR: Final = 0.01
_PRICE_OF_A_PART: Final = 0.01
_SHORTEST: Final = 0.001
_LEAST_SPREAD: Final = 0.1
_BEYOND: Final = 0.1


class Measured(Struct, frozen=True):
    """What an earlier merge had to do, and the seconds that it took."""

    effort: Effort
    seconds: float


class TimeRange(Struct, frozen=True):
    """Seconds: the most likely ones, and what eight of ten merges lie between."""

    likely: float
    low: float
    high: float


def predicted_duration(effort: Effort, earlier: Sequence[Measured]) -> TimeRange | None:
    """How long a merge takes; None if there were too few to tell."""
    if len(earlier) < FEWEST_MERGES:
        return None
    rows = np.array([_row_of(one.effort) for one in earlier])
    seconds = np.maximum(np.array([one.seconds for one in earlier]), _SHORTEST)
    costs = _costs(rows, seconds)
    # Before they are compared: a cost of zero in all parts would fit nothing.
    ratios = seconds / np.maximum(rows @ costs, _SHORTEST)
    expected = max(float(np.array(_row_of(effort)) @ costs), _SHORTEST)
    # Those that it was drawn from lie nearer to it than the next one does.
    beyond = max(0.0, (_BEYOND * (len(ratios) + 1) - 1) / len(ratios))
    low, middle, high = np.quantile(ratios, (beyond, 0.5, 1 - beyond))
    return TimeRange(
        likely=expected * float(middle),
        low=expected * float(min(low, middle * (1 - _LEAST_SPREAD))),
        high=expected * float(max(high, middle * (1 + _LEAST_SPREAD))),
    )


def _row_of(effort: Effort) -> tuple[float, float, float]:
    return 1.0, float(effort.bytes_copied), float(effort.clusters)


def _costs(rows: Floats, seconds: Floats) -> Floats:
    """The cost of each part, of those that explain the merges best; the others cost nothing."""
    best = np.zeros(rows.shape[1])
    least = np.inf
    for parts in _possible_parts(rows):
        found = _fitted(rows[:, parts], seconds)
        if (found < 0).any():
            continue
        costs = np.zeros(rows.shape[1])
        costs[list(parts)] = found
        error = float(np.abs(rows @ costs / seconds - 1).mean()) + _PRICE_OF_A_PART * len(parts)
        if error < least:
            best, least = costs, error
    return best


def _possible_parts(rows: Floats) -> Iterator[tuple[int, ...]]:
    """Those that the number of merges can tell apart, in which they differ at all."""
    told = [part for part in range(rows.shape[1]) if part == 0 or np.ptp(rows[:, part]) > 0]
    most = max(1, len(rows) // _MERGES_A_PART)
    for count in range(1, min(most, len(told)) + 1):
        yield from itertools.combinations(told, count)


def _fitted(rows: Floats, seconds: Floats) -> Floats:
    """The costs with the least absolute relative error, by weighed least squares."""
    scale = rows.max(axis=0)
    relative = rows / scale / seconds[:, None]
    weights = np.ones(len(rows))
    costs = np.zeros(rows.shape[1])
    for _ in range(_ROUNDS):
        costs = np.linalg.lstsq(relative * weights[:, None], weights, rcond=None)[0]
        errors = np.abs(relative @ costs - 1)
        weights = 1 / np.sqrt(np.maximum(errors, _LEAST_ERROR))
    found: Floats = costs / scale
    return found
