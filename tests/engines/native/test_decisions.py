# SPDX-License-Identifier: Apache-2.0
"""Only clusters of which the merged images say anything are looked at, and that is enough."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.chain.view import NO_LAYER, Resolved
from chainmerge.engines.native.decisions import (
    MappedDisk,
    OldEntries,
    WantedClusters,
    find_wanted,
    touched_clusters,
)
from chainmerge.options import Direction
from chainmerge.qcow2.extents import Extents, Kind
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import COMPRESSED, COPIED, ZERO_FLAG
from chainmerge.qcow2.readable import BytesReadable
from tests.support import qemu
from tests.support.images import KIB, SECTOR

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.qcow2.header import Header

FIRST, CLUSTERS, BEHIND = 40, 24, 4
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "version 2": {"compat": "0.10"},
    "subclusters": {"extended_l2": "on"},
}
CLUSTER = 16 * KIB
ENTRIES = [
    0,
    ZERO_FLAG,
    16 * CLUSTER | COPIED,
    16 * CLUSTER,
    16 * CLUSTER | COPIED | ZERO_FLAG,
    16 * CLUSTER | COMPRESSED,
]


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Header]:
    directory: Path = tmp_path_factory.mktemp("images")
    found = {}
    for name, options in KINDS.items():
        size = (FIRST + CLUSTERS - BEHIND) * CLUSTER
        path = qemu.create(directory / f"{name}.qcow2", size, cluster_size=CLUSTER, **options)
        found[name] = Qcow2Image(BytesReadable(name, path.read_bytes())).header
    return found


@st.composite
def windows(draw: st.DrawFn) -> Resolved:
    """Runs of any kind, also within clusters, most of them open; a disk can end within one too."""
    sectors = CLUSTERS * CLUSTER // SECTOR - draw(st.sampled_from([0, 3, 40]))
    cuts = sorted(draw(st.sets(st.integers(1, sectors - 1), max_size=12)))
    bounds = FIRST * CLUSTER + np.array([0, *cuts, sectors], dtype=np.int64) * SECTOR
    runs = len(bounds) - 1
    one = st.just(Kind.UNALLOCATED) | st.sampled_from(Kind)
    kinds = draw(st.lists(one, min_size=runs, max_size=runs))
    extents = Extents(
        bounds[:-1].astype(np.uint64),
        np.diff(bounds).astype(np.uint64),
        np.array(kinds, dtype=np.uint8),
        np.zeros(runs, dtype=np.uint64),
        np.zeros(runs, dtype=np.uint32),
    )
    return Resolved(extents, np.full(runs, NO_LAYER, dtype=np.int32))


def columns(wanted: WantedClusters) -> dict[str, list[int]]:
    names = ("cluster", "entry", "old_data", "old_zero", "written", "data", "zero")
    return {name: getattr(wanted, name).tolist() for name in names}


@given(
    above=windows(),
    kind=st.sampled_from(sorted(KINDS)),
    direction=st.sampled_from(Direction),
    entries=st.lists(st.sampled_from(ENTRIES), min_size=CLUSTERS, max_size=CLUSTERS),
    seed=st.integers(0, 2**32 - 1),
    backing_end=st.integers(0, (FIRST + CLUSTERS) * CLUSTER),
)
def test_the_clusters_that_are_touched_tell_all(
    headers: dict[str, Header],
    above: Resolved,
    kind: str,
    direction: Direction,
    entries: list[int],
    seed: int,
    backing_end: int,
) -> None:
    header = headers[kind]
    disk = MappedDisk(header, (FIRST + CLUSTERS) * CLUSTER, backing_end, direction)
    cluster = np.arange(FIRST, FIRST + CLUSTERS, dtype=np.int64)
    stored = np.array(entries, dtype=np.uint64)
    units = np.random.default_rng(seed).integers(0, 2**32, (2, CLUSTERS), dtype=np.uint64)
    # No unit is both data and zeros.
    subclusters = (units[0] | (units[1] & ~units[0]) << np.uint64(32)) * np.uint64(
        header.extended_l2
    )

    def decided(chosen: np.ndarray) -> dict[str, list[int]]:
        words = subclusters[chosen - FIRST] if header.extended_l2 else None
        old = OldEntries(chosen, stored[chosen - FIRST], words)
        return columns(find_wanted(disk, old, above))

    assert decided(touched_clusters(header, above)) == decided(cluster)


@given(above=windows())
def test_touched_is_what_a_run_that_is_not_open_reaches_into(
    headers: dict[str, Header], above: Resolved
) -> None:
    expected: set[int] = set()
    for guest, length, kind in zip(
        above.guest.tolist(), above.length.tolist(), above.kind.tolist(), strict=True
    ):
        if kind != Kind.UNALLOCATED:
            expected |= set(range(guest // CLUSTER, (guest + length - 1) // CLUSTER + 1))
    assert touched_clusters(headers["plain"], above).tolist() == sorted(expected)
