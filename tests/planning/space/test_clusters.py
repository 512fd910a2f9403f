# SPDX-License-Identifier: Apache-2.0
"""Which clusters of a file are in use, and where new ones go."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.planning.space.clusters import HostLayout, layout_of, place_clusters, release
from tests.planning.space.sizes import clusters_in, runs_from

CLUSTER_SETS = st.sets(st.integers(0, 60))


def layout_with(used: set[int], blocks: int = 64) -> HostLayout:
    """A file of clusters of 512 bytes, 64 to a refcount block, with so many blocks."""
    refcounts = np.array([cluster in used for cluster in range(70)], np.uint64)
    windows = [refcounts[:13], refcounts[13:50], refcounts[50:]]
    return layout_of(windows, np.arange(64) < blocks, 512, 64)


@given(CLUSTER_SETS, CLUSTER_SETS)
def test_layouts_are_sets_of_clusters(used: set[int], given_back: set[int]) -> None:
    layout = layout_with(used)
    assert clusters_in(layout.free) == set(range(layout.end)) - used
    assert layout.end == max(used, default=-1) + 1
    after = release(layout, runs_from(used & given_back))
    left = used - given_back
    assert after.end == max(left, default=-1) + 1
    assert clusters_in(after.free) == set(range(after.end)) - left


@given(CLUSTER_SETS, st.lists(st.integers(1, 9), max_size=5), st.integers(0, 9))
def test_first_fit_takes_the_lowest_places(used: set[int], pieces: list[int], singles: int) -> None:
    after, taken = place_clusters(layout_with(used), pieces, singles)
    expected: set[int] = set()
    for size in [*sorted(pieces, reverse=True), *([1] * singles)]:
        taken_now = used | expected
        start = next(s for s in count() if not taken_now & set(range(s, s + size)))
        expected |= set(range(start, start + size))
    assert clusters_in(taken) == expected
    assert clusters_in(after.free) == set(range(after.end)) - used - expected
    assert after.end == max(used | expected, default=-1) + 1


@pytest.mark.parametrize(
    ("piece", "blocks", "table_clusters"),
    # Clusters 0 and 1 are in use, and block 0 describes clusters 0 to 63.
    [(61, 0, 0), (62, 0, 0), (63, 1, 0), (62 * 64, 62, 0), (64 * 64, 65, 2)],
)
def test_new_clusters_need_refcounts(piece: int, blocks: int, table_clusters: int) -> None:
    after, taken = place_clusters(layout_with({0, 1}, blocks=1), [piece], 0)
    assert taken.total == piece + blocks + table_clusters
    assert len(after.blocks) == 64 * max(1, table_clusters)
    assert np.count_nonzero(after.blocks) == 1 + blocks


@given(CLUSTER_SETS, st.lists(st.integers(1, 7), max_size=40))
def test_what_is_usable_is_used_before_the_end_moves(used: set[int], requests: list[int]) -> None:
    """QEMU's search: upward, in one piece, without coming back."""
    layout, taken, position = layout_with(used), set(used), 0
    for size in requests:
        position = next(s for s in count(position) if not taken & set(range(s, s + size)))
        taken |= set(range(position, position + size))
        position += size
    behind = len([cluster for cluster in taken if cluster >= layout.end])
    assert behind <= max(0, sum(requests) - layout.usable(max(requests, default=1)))
