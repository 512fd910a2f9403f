# SPDX-License-Identifier: Apache-2.0
"""Where new clusters go: free ones, the lowest, with a refcount block for each."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from chainmerge.engines.metadata import allocation
from chainmerge.engines.metadata.allocation import (
    Allocation,
    Demand,
    allocate,
    runs_of,
    stored_free_space,
)
from chainmerge.engines.metadata.errors import RefcountTableFull
from chainmerge.engines.metadata.refcount_blocks import pack_refcounts, refcount_writes
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import read_refcount_table, read_refcounts, unpack_refcounts
from tests.support.crash import RecordingPort

CLUSTER = 512
# There are no processes in this, so there can be many examples.
many = settings(max_examples=4 * settings().max_examples)


@dataclass(frozen=True)
class Usage:
    """Which clusters are in use, refcount block by block; None for a block that is absent."""

    refcount_order: int
    blocks: list[list[bool] | None]

    @property
    def entries(self) -> int:
        return CLUSTER * 8 >> self.refcount_order

    @property
    def used(self) -> set[int]:
        return {
            index * self.entries + entry
            for index, block in enumerate(self.blocks)
            for entry, used in enumerate(block or [])
            if used
        }


def image_of(usage: Usage) -> Qcow2Image:
    """An image that has a header, refcounts and a small L1 table, and nothing that they count.

    Its tables stand behind everything that its refcounts describe.
    """
    end = 64 * usage.entries + 16
    header = bytearray(CLUSTER)
    struct.pack_into(
        ">4sIQIIQIIQQIIQ", header, 0,
        b"QFI\xfb", 3, 0, 0, 9, 512, 0, 1, end * CLUSTER, (end + 1) * CLUSTER, 1, 0, 0,
    )  # fmt: skip
    struct.pack_into(">QQQII", header, 72, 0, 0, 0, usage.refcount_order, 104)
    table = np.zeros(CLUSTER // 8, dtype=">u8")
    blocks = b""
    for index, block in enumerate(usage.blocks):
        if block is not None:
            table[index] = (end + 2) * CLUSTER + len(blocks)
            counts = np.array(block, dtype=np.uint64)
            blocks += pack_refcounts(counts, usage.refcount_order)
    content = bytes(header).ljust((end + 1) * CLUSTER, b"\0") + table.tobytes() + blocks
    return Qcow2Image(BytesReadable("usage", content))


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    order = draw(st.sampled_from((6, 5, 4)))
    entries = CLUSTER * 8 >> order
    blocks: list[list[bool] | None] = []
    full_up = draw(st.sampled_from((0, 0, 0, 62, 64)))
    blocks += [[True] * entries] * full_up
    for _ in range(draw(st.integers(0, min(6, 64 - full_up)))):
        kind = draw(st.sampled_from(("absent", "full", "random", "holes")))
        if kind == "absent":
            blocks.append(None)
        elif kind == "full":
            blocks.append([True] * entries)
        elif kind == "random":
            random = draw(st.randoms(use_true_random=False))
            blocks.append([random.random() < 0.7 for _ in range(entries)])
        else:
            hole = draw(st.integers(0, entries - 1))
            length = draw(st.integers(1, 20))
            blocks.append([not hole <= entry < hole + length for entry in range(entries)])
    return Usage(order, blocks)


demands = st.builds(
    Demand,
    scattered=st.integers(0, 300),
    contiguous=st.lists(st.integers(2, 150), max_size=6).map(tuple),
)


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
        found = allocate(stored_free_space(image_of(usage)), demand)

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
    present = {index for index, block in enumerate(usage.blocks) if block is not None}
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
    found = allocate(stored_free_space(image_of(usage)), Demand(0, (length,)))
    (start,) = found.contiguous.tolist()
    used = usage.used
    for lower in range(start):
        assert used & set(range(lower, lower + length))


def test_a_table_beyond_what_qemu_reads_is_refused() -> None:
    full = Usage(6, [[True] * 64] * 64)
    assert allocate(stored_free_space(image_of(full)), Demand(1, ())).table_clusters == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MAX_REFCOUNT_TABLE_BYTES", CLUSTER)
        with pytest.raises(RefcountTableFull):
            allocate(stored_free_space(image_of(full)), Demand(1, ()))


# Refcounts


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
    image = image_of(usage)
    present = [index for index, block in enumerate(usage.blocks) if block is not None]
    total = 64 * usage.entries
    before = read_refcounts(image, 0, total)
    described = [
        index * usage.entries + entry for index in present for entry in range(usage.entries)
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


@given(st.sets(st.integers(0, 100)))
def test_runs_are_what_they_are_made_of(clusters: set[int]) -> None:
    runs = runs_of(sorted(clusters))
    pairs = list(zip(runs.start.tolist(), runs.length.tolist(), strict=True))
    made_of = [at for start, length in pairs for at in range(start, start + length)]
    assert made_of == sorted(clusters)
    assert all(start + length < after for (start, length), (after, _) in pairwise(pairs))
