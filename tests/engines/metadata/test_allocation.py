# SPDX-License-Identifier: Apache-2.0
"""Where new clusters go: free ones, the lowest, with a refcount block for each."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from chainmerge.engines.metadata import allocation
from chainmerge.engines.metadata.allocation import (
    Allocation,
    Demand,
    FreeSpace,
    allocate,
    counted_free_space,
    stored_free_space,
)
from chainmerge.engines.metadata.counting import (
    lowered_refcounts,
    new_refcount_blocks,
    raised_refcounts,
)
from chainmerge.engines.metadata.errors import RefcountTableFull
from chainmerge.engines.metadata.refcount_blocks import refcount_writes
from chainmerge.qcow2.check import check_with_references, computed_refcounts
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import read_refcount_table
from chainmerge.qcow2.references import ReferenceCounts
from chainmerge.qcow2.runs import Runs, joined_runs, runs_of, runs_within, split_runs, without_runs
from tests.support import qemu
from tests.support.crash import RecordingPort
from tests.support.refcounts import (
    CLUSTER,
    TABLE_ENTRIES,
    Usage,
    demands,
    image_of,
    usages,
)

if TYPE_CHECKING:
    import random
    from pathlib import Path

MIB = 1 << 20
# There are no processes in this, so there can be many examples.
many = settings(max_examples=4 * settings().max_examples)


def opened(content: bytes) -> Qcow2Image:
    return Qcow2Image(BytesReadable("usage", content))


def space_of(usage: Usage) -> FreeSpace:
    return stored_free_space(opened(image_of(usage)))


def pieces_of(demand: Demand, found: Allocation) -> list[range]:
    pieces = [
        range(start, start + length)
        for start, length in zip(found.contiguous.tolist(), demand.contiguous, strict=True)
    ]
    if found.table_start is not None:
        pieces.append(range(found.table_start, found.table_start + found.table_clusters))
    return pieces


@many
@given(usage=usages(), demand=demands, window=st.sampled_from((64, 1000, 1 << 20)))
def test_what_is_found_is_free_and_can_be_counted(
    usage: Usage, demand: Demand, window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Small windows, so that runs go on from one to the next.
        patch.setattr(allocation, "_WINDOW_CLUSTERS", window)
        found = allocate(space_of(usage), demand)

    single = found.scattered.expanded().tolist() + found.blocks.cluster.tolist()
    together = [cluster for piece in pieces_of(demand, found) for cluster in piece]
    everything = single + together
    assert found.scattered.total == demand.scattered
    assert sorted(everything) == found.everything.expanded().tolist()
    assert len(set(everything)) == len(everything)
    assert not usage.used & set(everything)

    # As low as it can be: nothing free lies below a single cluster.
    if single:
        passed = set(range(max(single))) - usage.used - set(everything)
        assert not passed

    # Just the missing blocks are new, and every new cluster has one.
    present = usage.present
    needed = {cluster // usage.entries for cluster in everything}
    assert set(found.blocks.index.tolist()) == needed - present
    homes = dict(zip(found.blocks.index.tolist(), found.blocks.cluster.tolist(), strict=True))
    if found.table_start is None:
        assert all(home // usage.entries in {index} | present for index, home in homes.items())
        assert not needed or max(needed) < 64
        event("blocks in the old table" if homes else "no new blocks")
    else:
        entries = found.table_clusters * CLUSTER // 8
        assert max(needed | present) < entries
        grown = max(needed) >= 64
        tight = entries - CLUSTER // 8 <= max(needed | present)
        assert tight or not grown
        event("a longer table" if grown else "a table of the same length")


@given(usage=usages(), length=st.integers(2, 150))
def test_a_piece_goes_to_the_lowest_gap_that_holds_it(usage: Usage, length: int) -> None:
    found = allocate(space_of(usage), Demand(0, (length,)))
    (start,) = found.contiguous.tolist()
    used = usage.used
    for lower in range(start):
        assert used & set(range(lower, lower + length))


@dataclass(frozen=True)
class Placement:
    """An allocation cluster by cluster."""

    scattered: list[int]
    contiguous: list[int]
    blocks: dict[int, int]
    table_start: int | None
    table_clusters: int
    everything: list[int]


def placement_of(found: Allocation) -> Placement:
    return Placement(
        scattered=found.scattered.expanded().tolist(),
        contiguous=found.contiguous.tolist(),
        blocks=dict(zip(found.blocks.index.tolist(), found.blocks.cluster.tolist(), strict=True)),
        table_start=found.table_start,
        table_clusters=found.table_clusters,
        everything=found.everything.expanded().tolist(),
    )


def placed_naively(usage: Usage, demand: Demand) -> Placement:
    """What docs/metadata-rewrite.md says, with a byte for each cluster."""
    end = TABLE_ENTRIES * usage.entries + 4096
    table_clusters = block_count = 0
    table_entries = TABLE_ENTRIES
    while True:
        free = bytearray(b"\1" * end)
        for cluster in usage.used:
            free[cluster] = 0
        pieces = list(demand.contiguous) + [table_clusters] * (table_clusters > 0)
        starts = [0] * len(pieces)
        taken: set[int] = set()
        for number in sorted(range(len(pieces)), key=lambda number: -pieces[number]):
            starts[number] = start = free.find(b"\1" * pieces[number])
            free[start : start + pieces[number]] = bytes(pieces[number])
            taken |= set(range(start, start + pieces[number]))
        lowest = (cluster for cluster in range(end) if free[cluster])
        single = list(islice(lowest, demand.scattered + block_count))
        touched = {cluster // usage.entries for cluster in [*single, *taken]}
        missing = sorted(touched - usage.present)
        if len(missing) > block_count:
            block_count = len(missing)
            continue
        if missing and missing[-1] >= table_entries:
            table_clusters = missing[-1] // TABLE_ENTRIES + 1
            table_entries = table_clusters * TABLE_ENTRIES
            block_count = 0
            continue
        homes: dict[int, int] = {}
        for index in missing:
            own = [cluster for cluster in single if cluster // usage.entries == index]
            if own:
                homes[index] = own[0]
        homeless = [index for index in missing if index not in homes]
        spare = [
            cluster
            for cluster in single
            if cluster not in homes.values()
            and (table_clusters or cluster // usage.entries in usage.present)
        ]
        if len(spare) < len(homeless):
            table_clusters, block_count = 1, 0
            continue
        homes |= zip(homeless, spare[len(spare) - len(homeless) :], strict=True)
        return Placement(
            scattered=[cluster for cluster in single if cluster not in homes.values()],
            contiguous=starts[: len(demand.contiguous)],
            blocks={index: homes[index] for index in missing},
            table_start=starts[-1] if table_clusters else None,
            table_clusters=table_clusters,
            everything=sorted([*single, *taken]),
        )


@many
@given(usage=usages(), demand=demands, window=st.sampled_from((64, 1000, 1 << 20)))
def test_runs_are_placed_as_single_clusters_would_be(
    usage: Usage, demand: Demand, window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_WINDOW_CLUSTERS", window)
        found = allocate(space_of(usage), demand)
    assert placement_of(found) == placed_naively(usage, demand)
    if found.table_start is not None:
        event("a new table")
    if (found.blocks.index != found.blocks.cluster // usage.entries).any():
        event("a block that another one counts")


@many
@given(
    usage=usages(),
    demand=demands,
    leaked=st.randoms(use_true_random=False),
    known=st.integers(0, 65 * 256),
)
def test_a_plan_finds_what_is_free_once_leaks_are_given_back(
    usage: Usage, demand: Demand, leaked: random.Random, known: int
) -> None:
    leaking = opened(image_of(usage))
    counts = np.zeros(known, dtype=np.uint16)
    # Only clusters of the file can be in use: behind it, every refcount is a leak.
    counts[[at for at in usage.used if at < known and leaked.random() < 0.8]] = 1
    references = ReferenceCounts(CLUSTER, counts, complete=True)
    reclaimed = Usage(
        usage.refcount_order,
        [
            block and (references.of(index * usage.entries, usage.entries) != 0).tolist()
            for index, block in enumerate(usage.blocks)
        ],
    )
    found = placement_of(allocate(counted_free_space(leaking, references), demand))
    assert found == placement_of(allocate(space_of(reclaimed), demand))
    event(f"leaks are used: {bool(usage.used & set(found.everything))}")


def test_leaked_clusters_of_a_real_image_are_free_for_a_plan(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "i.qcow2", MIB)
    qemu.qemu_io(path, "write -q 0 256k")
    end = path.stat().st_size >> 16
    port = RecordingPort(path.read_bytes().ljust((end + 5) << 16, b"\0"))
    image = Qcow2Image(port)
    leaked = np.arange(end, end + 4)
    ones = np.ones(4, dtype=np.uint64)
    writes = refcount_writes(port, image.header, read_refcount_table(image), leaked, ones)
    for offset, data in writes:
        port.write(offset, data)
    image = Qcow2Image(port)
    report, references = check_with_references(image)
    assert report.only_leaks
    assert report.leaks == 4
    planned = allocate(counted_free_space(image, references), Demand(1, (2,)))
    assert planned.contiguous.tolist() == [end]
    assert planned.scattered.expanded().tolist() == [end + 2]
    assert allocate(stored_free_space(image), Demand(1, (2,))).contiguous.tolist() == [end + 4]


def test_memory_goes_by_runs_and_not_by_clusters(tmp_path: Path) -> None:
    image = Qcow2Image(BytesReadable("small", qemu.create(tmp_path / "i.qcow2", MIB).read_bytes()))
    readable, header, table = image.readable, image.header, read_refcount_table(image)
    references = computed_refcounts(image)
    wanted = 160_000_000
    tracemalloc.start()
    try:
        for space in (stored_free_space(image), counted_free_space(image, references)):
            found = allocate(space, Demand(wanted, (1000,)))
            assert found.scattered.total == wanted
            assert len(found.blocks.index) == wanted // 32768
            half, rest = split_runs(found.scattered, wanted // 2)
            assert half.total == rest.total == wanted // 2
            # Of what is written, all is made and none is kept.
            raised = [offset for offset, _ in raised_refcounts(readable, header, table, found)]
            assert len(raised) == 1
            blocks = islice(new_refcount_blocks(header, found), 100)
            assert sum(len(rows) for _, rows in blocks) == 100
            lowered = lowered_refcounts(readable, header, table, found.everything)
            assert not list(lowered)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_a_table_beyond_what_qemu_reads_is_refused() -> None:
    full = Usage(6, [[True] * 64] * 64)
    assert allocate(space_of(full), Demand(1, ())).table_clusters == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MAX_REFCOUNT_TABLE_BYTES", CLUSTER)
        with pytest.raises(RefcountTableFull):
            allocate(space_of(full), Demand(1, ()))


# Runs

cluster_sets = st.sets(st.integers(0, 60))


@given(cluster_sets)
def test_runs_are_what_they_are_made_of(clusters: set[int]) -> None:
    runs = runs_of(sorted(clusters))
    pairs = list(zip(runs.start.tolist(), runs.length.tolist(), strict=True))
    made_of = [at for start, length in pairs for at in range(start, start + length)]
    assert made_of == sorted(clusters)
    assert all(start + length < after for (start, length), (after, _) in pairwise(pairs))


def clusters_in(runs: Runs) -> list[int]:
    """The clusters of the runs, which are what runs have to be."""
    assert (runs.length > 0).all()
    assert (runs.start[1:] >= runs.end[:-1]).all()
    assert runs.start.dtype == runs.length.dtype == np.int64
    expanded: list[int] = runs.expanded().tolist()
    assert runs.total == len(expanded)
    return expanded


@st.composite
def touching_runs(draw: st.DrawFn) -> Runs:
    """Runs that are cut where they need not be."""
    clusters = sorted(draw(cluster_sets))
    cuts = draw(st.sets(st.sampled_from(clusters))) if clusters else set()
    whole = runs_of(clusters)
    starts = sorted(cuts | set(whole.start.tolist()))
    ends = sorted((cuts | set(whole.end.tolist())) - set(whole.start.tolist()))
    start = np.array(starts, dtype=np.int64)
    return Runs(start, np.array(ends, dtype=np.int64) - start)


@many
@given(runs=touching_runs(), removed=touching_runs(), count=st.integers(-1, 70))
def test_runs_are_split_joined_and_cut_as_their_clusters_are(
    runs: Runs, removed: Runs, count: int
) -> None:
    clusters = clusters_in(runs)
    first, rest = split_runs(runs, count)
    assert clusters_in(first) == clusters[: max(0, count)]
    assert clusters_in(rest) == clusters[max(0, count) :]

    left = without_runs(runs, removed)
    assert clusters_in(left) == sorted(set(clusters) - set(clusters_in(removed)))
    joined = joined_runs([removed, left])
    assert clusters_in(joined) == sorted(set(clusters) | set(clusters_in(removed)))
    assert (joined.start[1:] > joined.end[:-1]).all()

    within = runs_within(runs, count, count + 20)
    assert clusters_in(within) == [at for at in clusters if count <= at < count + 20]
