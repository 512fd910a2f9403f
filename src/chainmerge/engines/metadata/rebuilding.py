# SPDX-License-Identifier: Apache-2.0
"""Giving an image new refcounts, and its bitmaps with them, in one switch.

For images whose refcounts are wrong, or whose bitmaps contradict what else is in them. New
refcounts are counted from the L1 and L2 tables, which have to be sound, and written to
clusters that nothing uses; the old ones are not looked at. The order is

==========  ==========================================================================
FILL        new bitmaps, refcount blocks and refcount table
DISTRUST    COPIED flags of clusters that are used more than once are cleared
SWITCH      the first 512 bytes of the image: new refcounts and bitmaps; it is not dirty
            and not corrupt any more
TRUST       COPIED flags of clusters that are used once are set
==========  ==========================================================================

A kill before the switch leaves an image as damaged as it was, after it a sound one in which
some flags are missing: QEMU copies such a cluster when it is written to. The same repair
mends both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from msgspec.structs import replace

from chainmerge.arithmetic.distinct import distinct
from chainmerge.chain.errors import ImageDamaged
from chainmerge.engines.metadata.allocation import Allocation, FreeSpace, allocate_with_all_blocks
from chainmerge.engines.metadata.bitmap_set import (
    PlacedBitmapSet,
    StoredBitmap,
    lay_out,
    place_bitmap_set,
)
from chainmerge.engines.metadata.counting import new_refcount_table
from chainmerge.engines.metadata.header import HeaderWrite, compose_header, content_of
from chainmerge.engines.metadata.leaks import with_kept
from chainmerge.engines.metadata.refcount_blocks import Write, pack_refcounts
from chainmerge.engines.metadata.replacement import MetadataRewrite, RewriteOutcome, ranges_of
from chainmerge.engines.metadata.salvage import (
    Tables,
    clusters_of_bitmap,
    directory_clusters,
    old_refcounts,
    tables_of,
)
from chainmerge.engines.metadata.steps import Port, Step, StepName, reserve, write_steps
from chainmerge.engines.metadata.writes import Piece, gathered, whole_clusters
from chainmerge.qcow2.bitmaps import read_directory
from chainmerge.qcow2.check import check
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.features import Incompatible
from chainmerge.qcow2.gather import read_pieces
from chainmerge.qcow2.header import SECTOR, Header
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import COMPRESSED, COPIED, OFFSET_MASK
from chainmerge.qcow2.refcounts import refcounts_per_block
from chainmerge.qcow2.runs import NO_RUNS, Runs, runs_of, runs_within
from chainmerge.qcow2.table_errors import TooLittleMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from chainmerge.arithmetic.arrays import BoolArray, U64Array
    from chainmerge.qcow2.readable import Readable
    from chainmerge.qcow2.runs import Clusters

_MARKS: Final = Incompatible.DIRTY | Incompatible.CORRUPT
_TABLE_BYTES_AT_ONCE: Final = 4 << 20
_CLUSTERS_AT_ONCE: Final = 1 << 20


def plan_rebuild(
    readable: Readable, tables: Tables, bitmaps: Sequence[StoredBitmap], kept: Runs = NO_RUNS
) -> MetadataRewrite:
    """Decide how to give an image new refcounts, and *bitmaps* for its bitmaps.

    Args:
        readable: The image.
        tables: What :func:`chainmerge.engines.metadata.salvage.tables_of` says of it; sound.
        bitmaps: All bitmaps that it is to have; none that it has stays in its clusters.
        kept: Clusters that stay marked used though nothing uses them.

    Raises:
        BitmapSetUnfit: the image cannot hold this set.
        HeaderFull: one sector write cannot switch to it.
        RefcountTableFull: the refcounts take more than QEMU reads.
    """
    tables = replace(tables, counts=with_kept(tables.counts, kept))
    header = tables.image.header
    layout = lay_out(readable.name, header, bitmaps)
    space = _free_space(readable, tables)
    allocation = allocate_with_all_blocks(space, layout.demand, _blocks_in_use(tables))
    placed = place_bitmap_set(layout, allocation)
    head = _header_write(readable, header, placed, allocation)
    return MetadataRewrite(
        image=readable.name,
        required_size=allocation.end * header.cluster_size,
        allocated=allocation.everything,
        released=np.zeros(0, np.int64),
        cluster_size=header.cluster_size,
        steps=tuple(_steps(readable, tables, placed, allocation, head)),
    )


def rebuild(port: Port, bitmaps: Sequence[StoredBitmap], kept: Runs = NO_RUNS) -> RewriteOutcome:
    """Give a closed image new refcounts, counted from its tables, and *bitmaps*.

    What nothing uses is free afterwards, except for the *kept* clusters. The bits of *bitmaps* are
    to be in memory already. Raises what :func:`plan_rebuild` raises, and:

    Raises:
        ImageDamaged: the tables contradict each other; nothing was written.
        NotEnoughSpace: there is no room for the new refcounts.
        RewriteFailed: the image is as damaged as before.
        SwitchUnknown: it is, or it has been repaired.
        ReleaseFailed: it is repaired, except for COPIED flags.
    """
    tables = tables_of(port)
    if not tables.sound:
        raise ImageDamaged(port.name, len(tables.problems), tables.problems[0])
    rewrite = plan_rebuild(port, tables, bitmaps, kept)
    reserve(port, rewrite.required_size, ranges_of(rewrite.allocated, rewrite.cluster_size))
    return RewriteOutcome(rewrite.required_size, write_steps(port, rewrite.steps), ())


def clear_marks(port: Port) -> None:
    """Take the dirty bit and the corrupt bit from an image in which nothing is wrong.

    Raises:
        ImageDamaged: something is.
        RewriteFailed, SwitchUnknown
    """
    image = Qcow2Image(port)
    report = check(image)
    if not report.sound:
        raise ImageDamaged(image.name, report.corruptions + report.overlaps, report.messages[0])
    content = content_of(image.header)
    content = replace(content, incompatible=content.incompatible & ~_MARKS)
    cluster = port.read(0, image.header.cluster_size)
    head = compose_header(image.name, cluster, image.header, content)
    steps = [
        Step(StepName.FILL, lambda: head.beyond),
        Step(StepName.SWITCH, lambda: [(0, head.sector)]),
    ]
    write_steps(port, steps)


def _free_space(readable: Readable, tables: Tables) -> FreeSpace:
    """What nothing uses, old refcounts and bitmaps included: these count until the switch."""
    header = tables.image.header
    try:
        taken = np.zeros(len(tables.counts), np.bool_)
    except MemoryError as error:
        raise TooLittleMemory(readable.name, len(tables.counts)) from error
    old = old_refcounts(readable, header.cluster_size)
    taken[old.table] = True
    taken[old.block] = True
    for clusters in _old_bitmaps(tables.image):
        taken[clusters[clusters < len(taken)]] = True

    def uses(first: int, count: int) -> U64Array:
        used = tables.counts[first : first + count] != 0
        result: U64Array = (used | taken[first : first + count]).astype(np.uint64)
        return result

    return FreeSpace(readable.name, header, np.zeros(0, np.uint64), len(taken), uses)


def _old_bitmaps(image: Qcow2Image) -> Iterator[Clusters]:
    try:
        entries = read_directory(image)
    except FormatError:
        return
    yield directory_clusters(image)
    for entry in entries:
        clusters = clusters_of_bitmap(image, entry)
        if clusters is not None:
            yield clusters


def _blocks_in_use(tables: Tables) -> Clusters:
    """Indexes of the refcount blocks that count anything."""
    entries = refcounts_per_block(tables.image.header)
    at_once = max(1, _CLUSTERS_AT_ONCE // entries) * entries
    found = [np.zeros(0, np.int64)]
    for first in range(0, len(tables.counts), at_once):
        used = np.flatnonzero(tables.counts[first : first + at_once]) + first
        found.append(distinct(used // entries))
    return np.concatenate(found)


def _header_write(
    readable: Readable, header: Header, placed: PlacedBitmapSet, allocation: Allocation
) -> HeaderWrite:
    assert allocation.table_start is not None
    content = replace(
        content_of(header),
        bitmaps=placed.extension,
        bitmaps_trusted=placed.extension is not None,
        refcount_table_offset=allocation.table_start * header.cluster_size,
        refcount_table_clusters=allocation.table_clusters,
        incompatible=header.incompatible & ~_MARKS,
    )
    cluster = readable.read(0, header.cluster_size)
    return compose_header(readable.name, cluster, header, content)


def _steps(
    readable: Readable,
    tables: Tables,
    placed: PlacedBitmapSet,
    allocation: Allocation,
    head: HeaderWrite,
) -> Iterator[Step]:
    header = tables.image.header

    def fill() -> Iterator[Write]:
        pieces = _new_clusters(tables, placed, allocation)
        yield from gathered(pieces, header.cluster_size)
        yield from head.beyond

    yield Step(StepName.FILL, fill)
    yield Step(StepName.DISTRUST, lambda: _flag_writes(readable, tables, _untrue))
    yield Step(StepName.SWITCH, lambda: [(0, head.sector)])
    yield Step(StepName.TRUST, lambda: _flag_writes(readable, tables, _missing))


def _new_clusters(
    tables: Tables, placed: PlacedBitmapSet, allocation: Allocation
) -> Iterator[Piece]:
    header = tables.image.header
    yield from placed.pieces()
    entries = refcounts_per_block(header)
    blocks = allocation.blocks
    for index, cluster in zip(blocks.index.tolist(), blocks.cluster.tolist(), strict=True):
        first = index * entries
        refcounts = np.zeros(entries, np.uint64)
        known = tables.counts[first : first + entries]
        refcounts[: len(known)] = known
        new = runs_within(allocation.everything, first, first + entries).expanded()
        refcounts[new - first] = 1
        data = pack_refcounts(refcounts, header.refcount_order)
        yield np.array([cluster]), whole_clusters(data, header.cluster_size)
    yield new_refcount_table(header, np.zeros(0, np.uint64), allocation)


# COPIED flags


def _untrue(entries: U64Array, is_single: BoolArray) -> BoolArray:
    """Which entries say that their cluster is theirs alone, and are wrong."""
    wrong: BoolArray = (entries & np.uint64(COPIED) != 0) & ~is_single
    return wrong


def _missing(entries: U64Array, is_single: BoolArray) -> BoolArray:
    """Which entries do not say that their cluster is theirs alone, though it is."""
    wrong: BoolArray = (entries & np.uint64(COPIED) == 0) & is_single
    return wrong


def _flag_writes(
    readable: Readable,
    tables: Tables,
    wrong: Callable[[U64Array, BoolArray], BoolArray],
) -> Iterator[Write]:
    """Writes that toggle the COPIED flag of those active entries that are *wrong*.

    Whole sectors of tables: an entry lies in one of them.
    """
    header = tables.image.header
    l1 = tables.image.l1.astype(np.uint64)
    hosts = (l1 & np.uint64(OFFSET_MASK)) >> np.uint64(header.cluster_bits)
    changed = wrong(l1, tables.counts[hosts.astype(np.int64)] == 1) & (hosts != 0)
    yield from _toggled(readable, header.l1_table_offset, l1, changed)
    for offset, table in _l2_tables(readable, tables):
        changed = np.zeros(len(table), np.bool_)
        stride = 2 if header.extended_l2 else 1
        changed[::stride] = _wrong_l2(header, tables, table[::stride], wrong)
        yield from _toggled(readable, offset, table, changed)


def _l2_tables(readable: Readable, tables: Tables) -> Iterator[tuple[int, U64Array]]:
    """The active L2 tables, each once: file offset, and the 64-bit words of it."""
    cluster_size = tables.image.header.cluster_size
    offsets = distinct(tables.image.l1.astype(np.uint64) & np.uint64(OFFSET_MASK))
    offsets = offsets[offsets != 0]
    at_once = max(1, _TABLE_BYTES_AT_ONCE // cluster_size)
    for start in range(0, len(offsets), at_once):
        part = offsets[start : start + at_once]
        data = read_pieces(readable, part, cluster_size)
        words = np.frombuffer(data, ">u8").astype(np.uint64).reshape(len(part), -1)
        yield from zip(part.tolist(), words, strict=True)


def count_doubles(readable: Readable, tables: Tables) -> int:
    """How many guest clusters are stored where another one is, and no snapshot explains it.

    One of two lost its data when its entry came to lead there; which one cannot be told.
    """
    header = tables.image.header
    if header.snapshot_count or header.external_data_file:
        return 0
    stride = 2 if header.extended_l2 else 1
    return sum(
        int(np.count_nonzero(_wrong_l2(header, tables, table[::stride], _shared)))
        for _, table in _l2_tables(readable, tables)
    )


def _shared(entries: U64Array, is_single: BoolArray) -> BoolArray:
    del entries
    shared: BoolArray = ~is_single
    return shared


def _wrong_l2(
    header: Header,
    tables: Tables,
    entries: U64Array,
    wrong: Callable[[U64Array, BoolArray], BoolArray],
) -> BoolArray:
    plain: BoolArray = entries & np.uint64(COMPRESSED) == 0
    hosts = (entries & np.uint64(OFFSET_MASK)) >> np.uint64(header.cluster_bits)
    plain &= hosts != 0
    if header.external_data_file:
        # The clusters of that file have no refcounts; each counts as used once.
        plain &= wrong(entries, np.ones(len(entries), np.bool_))
        return plain
    counts = tables.counts[np.where(plain, hosts, np.uint64(0)).astype(np.int64)]
    plain &= wrong(entries, counts == 1)
    return plain


def _toggled(
    readable: Readable, offset: int, entries: U64Array, changed: npt.NDArray[Any]
) -> Iterator[Write]:
    where = np.flatnonzero(changed)
    if not len(where):
        return
    per_sector = SECTOR // 8
    sectors = runs_of(distinct(where // per_sector))
    new = np.where(changed, entries ^ np.uint64(COPIED), entries)
    for first, count in zip(sectors.start.tolist(), sectors.length.tolist(), strict=True):
        at, end = first * SECTOR, (first + count) * SECTOR
        words = new[first * per_sector : (first + count) * per_sector].astype(">u8").tobytes()
        # An L1 table may end within a sector.
        rest = readable.read(offset + at + len(words), end - at - len(words))
        yield offset + at, words + rest
