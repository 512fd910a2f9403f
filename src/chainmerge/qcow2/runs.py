# SPDX-License-Identifier: Apache-2.0
"""Runs of clusters: arithmetic on sets of cluster numbers, as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import I64Array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.arithmetic.arrays import BoolArray

Clusters: TypeAlias = I64Array
"""Cluster numbers (file offset / cluster size), or counts of clusters."""

NO_CLUSTERS: Final[Clusters] = np.zeros(0, dtype=np.int64)


class Runs(Struct, frozen=True):
    """Runs of clusters: int64 arrays of equal length, ascending and disjoint.

    Runs may touch, and none is empty.

    Attributes:
        start: First cluster of each run.
        length: Number of clusters in each run.
    """

    start: Clusters
    length: Clusters

    @property
    def total(self) -> int:
        """The number of clusters in all runs."""
        return int(self.length.sum())

    @property
    def end(self) -> Clusters:
        """The cluster behind each run."""
        end: Clusters = self.start + self.length
        return end

    def expanded(self) -> Clusters:
        """Every cluster, int64[total], ascending."""
        before = np.cumsum(self.length) - self.length
        expanded: Clusters = np.repeat(self.start - before, self.length)
        expanded += np.arange(len(expanded), dtype=np.int64)
        return expanded


NO_RUNS: Final = Runs(NO_CLUSTERS, NO_CLUSTERS)


def single_run(start: int, length: int) -> Runs:
    """One run, also an empty one."""
    return Runs(np.array([start], dtype=np.int64), np.array([length], dtype=np.int64))


def runs_where(condition: BoolArray, first: int) -> Runs:
    """Runs of the clusters from *first* on for which *condition* (bool[clusters]) holds."""
    padded = np.concatenate(([False], condition, [False]))
    edges = np.flatnonzero(padded[1:] != padded[:-1]).astype(np.int64)
    return Runs(edges[0::2] + first, edges[1::2] - edges[0::2])


def runs_of(clusters: Sequence[int] | Clusters) -> Runs:
    """Ascending cluster numbers as runs."""
    values = np.asarray(clusters, dtype=np.int64)
    breaks = np.flatnonzero(np.diff(values) != 1) + 1
    first = np.concatenate(([0], breaks)) if len(values) else breaks
    lengths = np.diff(np.concatenate((first, [len(values)]))) if len(values) else breaks
    return Runs(values[first], lengths)


def joined_runs(parts: Sequence[Runs]) -> Runs:
    """All clusters of the parts; runs that touch or overlap become one.

    The runs of a part may be in any order here, and some of them empty.
    """
    every = _concatenated(parts)
    kept = every.length > 0
    # Only how many runs are open matters, so that starts and ends need not stay in pairs.
    starts, ends = np.sort(every.start[kept]), np.sort(every.end[kept])
    if not len(starts):
        return NO_RUNS
    gaps = starts[1:] > ends[:-1]
    first = starts[np.concatenate(([True], gaps))]
    return Runs(first, ends[np.concatenate((gaps, [True]))] - first)


def split_runs(runs: Runs, count: int) -> tuple[Runs, Runs]:
    """The first *count* clusters of the runs, or all if there are fewer, and the rest."""
    before = np.cumsum(runs.length) - runs.length
    within = np.clip(count - before, 0, runs.length)
    return (
        _without_empty(Runs(runs.start, within)),
        _without_empty(Runs(runs.start + within, runs.length - within)),
    )


def without_runs(runs: Runs, removed: Runs) -> Runs:
    """The clusters of *runs* that are not in *removed*."""
    gap_starts = np.concatenate(([0], removed.end))
    gap_ends = np.append(removed.start, np.iinfo(np.int64).max)
    # Each run together with each gap that it reaches into.
    low = np.searchsorted(gap_ends, runs.start, "right")
    high = np.searchsorted(gap_starts, runs.end, "left")
    pairs = np.maximum(high - low, 0)
    run = np.repeat(np.arange(len(pairs)), pairs)
    gap = Runs(low, pairs).expanded()
    start = np.maximum(runs.start[run], gap_starts[gap])
    end = np.minimum(runs.end[run], gap_ends[gap])
    return _without_empty(Runs(start, end - start))


def runs_in_both(runs: Runs, others: Runs) -> Runs:
    """The clusters that are in *runs* and in *others*."""
    return without_runs(runs, without_runs(runs, others))


def runs_within(runs: Runs, start: int, end: int) -> Runs:
    """The clusters of *runs* from *start* up to *end*, which is not included."""
    low = int(np.searchsorted(runs.end, start, "right"))
    high = int(np.searchsorted(runs.start, end, "left"))
    first = np.maximum(runs.start[low:high], start)
    return Runs(first, np.minimum(runs.end[low:high], end) - first)


def _concatenated(parts: Sequence[Runs]) -> Runs:
    return Runs(
        np.concatenate([NO_RUNS.start, *(part.start for part in parts)]),
        np.concatenate([NO_RUNS.length, *(part.length for part in parts)]),
    )


def _without_empty(runs: Runs) -> Runs:
    kept = runs.length > 0
    return Runs(runs.start[kept], runs.length[kept])
