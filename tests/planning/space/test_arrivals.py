# SPDX-License-Identifier: Apache-2.0
"""What arrives in base, counted by runs and cluster by cluster."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.planning.space.arrivals import (
    Arrivals,
    BaseFacts,
    count_arrivals,
)
from chainmerge.qcow2.mapping import COPIED, Extents, Kind
from tests.planning.space.sizes import MIB, clusters_in, header_of, runs_from
from tests.support.qemu import create

if TYPE_CHECKING:
    from chainmerge.qcow2.header import Header


SECTORS = 1024
# A multiple of every cluster size, so that a cluster of the guest is one of the file.
FIRST_HOST = 8 * MIB


@dataclass(frozen=True)
class Cells:
    """Kinds by sector, and runs made of them in windows."""

    kinds: list[int]
    hosts: list[int]
    cuts: list[int]

    def windows(self) -> list[Extents]:
        bounds = [0, *sorted(self.cuts), len(self.kinds)]
        return [self._window(first, end) for first, end in pairwise(bounds) if first < end]

    def _window(self, first: int, end: int) -> Extents:
        sectors = np.arange(first, end, dtype=np.uint64)
        return Extents(
            sectors * np.uint64(512),
            np.full(len(sectors), 512, np.uint64),
            np.array(self.kinds[first:end], np.uint8),
            np.array(self.hosts[first:end], np.uint64),
            np.zeros(len(sectors), np.uint32),
        ).coalesced()


@st.composite
def cells(draw: st.DrawFn, unit: int, sectors: int, cluster: int = 1) -> Cells:
    """Runs of kinds that end at multiples of *unit* sectors, in windows of whole clusters."""
    runs = draw(st.lists(st.tuples(st.sampled_from(Kind), st.integers(1, 300)), max_size=12))
    kinds = [kind for kind, length in runs for _ in range(unit * length)]
    kinds = [*kinds, *([Kind.UNALLOCATED] * sectors)][:sectors]
    hosts = [
        FIRST_HOST + number * 512 if kind in (Kind.DATA, Kind.ZERO_ALLOCATED) else 0
        for number, kind in enumerate(kinds)
    ]
    cuts = draw(
        st.lists(st.integers(0, sectors // cluster).map(lambda at: at * cluster), max_size=4)
    )
    return Cells(kinds, hosts, [cut for cut in cuts if cut < sectors])


@dataclass(frozen=True)
class BaseShape:
    cluster_size: int
    extended: str = "off"
    compat: str = "1.1"


@pytest.fixture(scope="module")
def headers() -> dict[BaseShape, Header]:
    shapes = [
        BaseShape(512),
        BaseShape(4096),
        BaseShape(65536),
        BaseShape(131072),
        BaseShape(16384, "on"),
        BaseShape(131072, "on"),
        BaseShape(16384, "off", "0.10"),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        return {shape: header_of(made(Path(scratch) / str(shape), shape)) for shape in shapes}


def made(path: Path, shape: BaseShape) -> Path:
    return create(
        path,
        SECTORS * 512,
        cluster_size=shape.cluster_size,
        extended_l2=shape.extended,
        compat=shape.compat,
    )


@given(data=st.data())
def test_arrivals_are_those_of_a_cluster_by_cluster_count(
    data: st.DataObject, headers: dict[BaseShape, Header]
) -> None:
    header = headers[data.draw(st.sampled_from(list(headers)))]
    backing = data.draw(st.sampled_from([None, SECTORS * 512, SECTORS * 1024]))
    top_sectors = data.draw(st.sampled_from([SECTORS, SECTORS - 3, SECTORS // 2, SECTORS + 777]))
    if header.version < 3:
        top_sectors = min(top_sectors, SECTORS)
    moved = data.draw(cells(1, top_sectors))
    present = data.draw(cells(header.subcluster_size // 512, SECTORS, header.cluster_size // 512))
    shared = data.draw(st.sets(st.integers(0, 2)))
    first_host = FIRST_HOST // header.cluster_size
    hosts = {first_host + number for number in shared}
    l1 = np.array(
        [data.draw(st.sampled_from([0, 1 << 9, COPIED | 1 << 9])) for _ in range(3)], ">u8"
    )
    facts = BaseFacts("base", header, backing, runs_from(hosts))

    counted = count_arrivals(facts, l1, moved.windows(), present.windows(), top_sectors * 512)

    assert counted == expected_arrivals(facts, l1, moved, present, counted.largest)


def expected_arrivals(
    facts: BaseFacts, l1: Any, moved: Cells, present: Cells, largest: int
) -> Arrivals:
    header = facts.header
    per_cluster = header.cluster_size // 512
    granule = min(max(header.cluster_size, 4096), 65536)
    per_unit = max(granule, header.cluster_size) // 512
    top = len(moved.kinds)
    data: set[int] = set()
    zeros: set[int] = set()
    for first in range(0, top, per_unit):
        kinds = moved.kinds[first : first + per_unit]
        clusters = {s // per_cluster for s in range(first, min(first + per_unit, top))}
        if (
            all(kind in (Kind.ZERO, Kind.ZERO_ALLOCATED) for kind in kinds)
            and len(kinds) == per_unit
        ):
            zeros |= clusters
        elif any(kind != Kind.UNALLOCATED for kind in kinds):
            data |= clusters
    places: dict[int, int] = {}
    for sector, (kind, host) in enumerate(zip(present.kinds, present.hosts, strict=True)):
        if kind in (Kind.DATA, Kind.ZERO_ALLOCATED):
            places.setdefault(sector // per_cluster, host // header.cluster_size)
    shared = clusters_in(facts.shared)
    own = {cluster for cluster, host in places.items() if host not in shared}
    zeros_are_data = header.cluster_size > 65536 or (header.version < 3 and facts.backing_size)
    tables = {cluster // header.l2_entries for cluster in data | zeros}
    if facts.backing_size and header.virtual_size < min(top * 512, facts.backing_size):
        grown = range(SECTORS // per_cluster, -(-top // per_cluster))
        tables |= {cluster // header.l2_entries for cluster in grown}
    likely = len(data - own)
    overwritten = [places[cluster] + 1 for cluster in data | zeros if cluster in places]
    return Arrivals(
        likely + (len(zeros - own) if zeros_are_data else 0),
        likely,
        len([index for index in tables if index >= len(l1) or not int(l1[index]) & COPIED]),
        largest,
        max(overwritten, default=0),
    )
