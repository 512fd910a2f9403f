# SPDX-License-Identifier: Apache-2.0
"""Stored refcounts: what the writes for new and for released clusters make of them."""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from chainmerge.engines.metadata.allocation import (
    Allocation,
    Demand,
    NewBlocks,
    allocate,
    stored_free_space,
)
from chainmerge.engines.metadata.counting import (
    blocks_raised,
    link_writes,
    lowered_refcounts,
    new_refcount_blocks,
    new_refcount_table,
    raised_refcounts,
    table_with_new_blocks,
)
from chainmerge.engines.metadata.refcount_blocks import Write, pack_refcounts, refcount_writes
from chainmerge.engines.metadata.writes import Piece, gathered
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import read_refcount_table, read_refcounts, unpack_refcounts
from chainmerge.qcow2.runs import Runs, runs_of
from tests.support.crash import RecordingPort
from tests.support.refcounts import (
    CLUSTER,
    TABLE_ENTRIES,
    Usage,
    demands,
    image_of,
    image_with_refcounts,
    usages,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# There are no processes in this, so there can be many examples.
many = settings(max_examples=4 * settings().max_examples)


@given(order=st.integers(0, 6), data=st.data())
def test_refcounts_are_packed_as_they_are_unpacked(order: int, data: st.DataObject) -> None:
    highest = (1 << (1 << order)) - 1
    counts = data.draw(st.lists(st.integers(0, highest), min_size=64, max_size=64))
    packed = pack_refcounts(np.array(counts, dtype=np.uint64), order)
    assert len(packed) == 64 << order >> 3
    assert unpack_refcounts(packed, order).tolist() == counts


@given(usage=usages(), data=st.data())
def test_writes_change_the_refcounts_asked_for_and_no_others(
    usage: Usage, data: st.DataObject
) -> None:
    image = Qcow2Image(BytesReadable("usage", image_of(usage)))
    total = TABLE_ENTRIES * usage.entries
    before = read_refcounts(image, 0, total)
    described = [
        index * usage.entries + entry
        for index in sorted(usage.present)
        for entry in range(usage.entries)
    ]
    chosen = data.draw(st.sets(st.sampled_from(described), max_size=40)) if described else set()
    clusters = np.array(sorted(chosen), dtype=np.int64)
    counts = np.arange(len(clusters), dtype=np.uint64) % 3
    port = RecordingPort(image.readable.read(0, image.readable.size))
    table = read_refcount_table(image)
    for offset, part in refcount_writes(port, image.header, table, clusters, counts):
        assert offset % 512 == len(part) % 512 == 0
        port.write(offset, part)
    before[clusters] = counts
    assert (read_refcounts(Qcow2Image(port), 0, total) == before).all()


def write_all(port: RecordingPort, writes: Iterable[Write]) -> None:
    """Make the writes, each of whole sectors."""
    for offset, data in writes:
        assert offset % 512 == len(data) % 512 == 0
        port.write(offset, data)


def with_header_counted(usage: Usage) -> Usage:
    """The same usage, but for the first cluster, in which the image's own header stands."""
    first, *others = usage.blocks or [None]
    _, *rest = first or [False] * usage.entries
    return Usage(usage.refcount_order, [[True, *rest], *others])


@many
@given(usage=usages().map(with_header_counted), demand=demands)
def test_what_is_counted_and_released_again_leaves_the_refcounts_as_they_were(
    usage: Usage, demand: Demand
) -> None:
    port = RecordingPort(image_of(usage))
    image = Qcow2Image(port)
    header, table = image.header, read_refcount_table(image)
    # Further than any demand reaches.
    total = 2 * TABLE_ENTRIES * usage.entries
    before = read_refcounts(image, 0, total)
    found = allocate(stored_free_space(image), demand)
    assert found.end <= total
    everything = found.everything.expanded()

    def filled() -> Iterator[Piece]:
        yield from new_refcount_blocks(header, found)
        if found.table_start is not None:
            yield new_refcount_table(header, table, found)

    write_all(port, gathered(filled(), CLUSTER))
    assert (read_refcounts(image, 0, total) == before).all()

    write_all(port, raised_refcounts(port, header, table, found))
    expected = before.copy()
    described = everything[np.isin(everything // usage.entries, sorted(usage.present))]
    expected[described] = 1
    assert (read_refcounts(image, 0, total) == expected).all()
    assert bool(len(blocks_raised(header, found))) == bool(len(described))

    write_all(port, link_writes(port, header, found))
    if found.table_start is not None:
        field = struct.pack(">QI", found.table_start * CLUSTER, found.table_clusters)
        port.write(48, field)
    image = Qcow2Image(port)
    new_table = read_refcount_table(image)
    assert (new_table == table_with_new_blocks(header, table, found)).all()
    expected[everything] = 1
    assert (read_refcounts(image, 0, total) == expected).all()

    write_all(port, lowered_refcounts(port, header, new_table, found.everything))
    assert (read_refcounts(image, 0, total) == before).all()
    new_blocks = bool(len(found.blocks.index))
    event(f"new table: {found.table_start is not None}; new blocks: {new_blocks}")


def test_new_blocks_are_linked_sector_by_sector_and_others_left() -> None:
    blocks = [[1] * 64 if index in {1, 100} else None for index in range(256)]
    port = RecordingPort(image_with_refcounts(6, blocks, tables_at=1, table_clusters=4))
    header = Qcow2Image(port).header
    expected = read_refcount_table(Qcow2Image(port))
    new = NewBlocks(np.array([0, 63, 64, 255]), np.array([900, 901, 902, 903]))
    none = runs_of([])
    found = Allocation(none, none.start, new, None, 0, runs_of(new.cluster))
    writes = list(link_writes(port, header, found))
    places = [(offset - header.refcount_table_offset, len(data)) for offset, data in writes]
    assert places == [(0, 512), (512, 512), (3 * 512, 512)]
    write_all(port, writes)
    expected[new.index] = new.cluster * CLUSTER
    assert (read_refcount_table(Qcow2Image(port)) == expected).all()


# Lowering


@st.composite
def released_runs(draw: st.DrawFn, end: int) -> list[tuple[int, int]]:
    """Runs (start, length) in no order, some of them again and again."""
    start = st.one_of(st.integers(0, end), st.integers(0, min(20, end)))
    length = st.one_of(st.integers(1, 5), st.integers(1, end))
    runs = draw(st.lists(st.tuples(start, length), max_size=12))
    repeated = draw(st.lists(st.sampled_from(runs), max_size=6)) if runs else []
    return draw(st.permutations(runs + repeated))


@many
@given(data=st.data(), order=st.integers(0, 6))
def test_refcounts_fall_by_one_for_each_time_that_a_cluster_is_released(
    data: st.DataObject, order: int
) -> None:
    entries = CLUSTER * 8 >> order
    highest = (1 << (1 << order)) - 1
    choice = data.draw(st.randoms(use_true_random=False))
    some = sorted({0, 1, min(2, highest), min(5, highest), highest})
    blocks = [
        [choice.choice(some) for _ in range(entries)] if present else None
        for present in data.draw(st.lists(st.booleans(), max_size=4))
    ]
    # Also what no block describes, and what the table has no place for, can be named.
    end = (len(blocks) + 1) * entries
    runs = [*data.draw(released_runs(end)), (TABLE_ENTRIES * entries - 1, 2)]
    released = Runs(
        np.array([start for start, _ in runs], dtype=np.int64),
        np.array([length for _, length in runs], dtype=np.int64),
    )

    port = RecordingPort(image_with_refcounts(order, blocks, tables_at=1))
    image = Qcow2Image(port)
    table = read_refcount_table(image)
    expected = read_refcounts(image, 0, end).tolist()
    times = Counter(at for start, length in runs for at in range(start, start + length))
    for cluster, count in times.items():
        if cluster < end and count <= expected[cluster]:
            expected[cluster] -= count

    writes = list(lowered_refcounts(port, image.header, table, released))
    assert len(writes) <= sum(block is not None for block in blocks)
    write_all(port, writes)
    assert read_refcounts(image, 0, end).tolist() == expected
    event(f"something is named twice: {max(times.values()) > 1}")


def test_refcounts_are_lowered_in_the_blocks_of_the_table_that_is_given() -> None:
    content = image_with_refcounts(4, [[3] * 256, None], tables_at=1)
    port = RecordingPort(content + pack_refcounts(np.full(256, 7, dtype=np.uint64), 4))
    image = Qcow2Image(port)
    # As after a switch to a new table, of which the header that was read does not know.
    table = read_refcount_table(image)
    table[1] = len(content)
    write_all(port, lowered_refcounts(port, image.header, table, runs_of([255, 256, 257])))
    assert read_refcounts(image, 254, 2).tolist() == [3, 2]
    assert unpack_refcounts(port.read(len(content), CLUSTER), 4)[:3].tolist() == [6, 6, 7]
