# SPDX-License-Identifier: Apache-2.0
"""The native commit: everything new into free clusters, then one sector switches to it.

========  ==========================================================================
FILL      guest data; L2 tables, L1 table, bitmaps, refcount blocks and table: whole
          clusters that are free in the image. Data also goes to parts of its clusters that
          hold none, and (in place) over data that the images above hide. Copied data is read back
          from the storage where that was requested
COUNT     refcounts of the new clusters, in the refcount blocks there are
LINK      new refcount blocks into the refcount table, where that is not new
          then the new tree is verified, read through the sector that is to be written
SWITCH    the first 512 bytes: the image is the old one until here, the new one from here
RELEASE   refcounts of what only the old tree used
========  ==========================================================================

Each step ends with a flush. Before SWITCH nothing that the image's header leads to changes,
except for refcounts that rise and data that the images above hide; so in whatever state a crash
leaves it, the guest's view through top is the right one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.arrays import I64Array, U64Array
from chainmerge.chain.layers import layer_of_qcow2
from chainmerge.chain.view import GuestView, Resolved, joined_resolved
from chainmerge.engines.metadata.allocation import stored_free_space as free_space_of
from chainmerge.engines.metadata.bitmap_set import place_bitmap_set as place_bitmaps
from chainmerge.engines.metadata.counting import (
    link_writes,
    lowered_refcounts,
    new_refcount_blocks,
    new_refcount_table,
    raised_refcounts,
)
from chainmerge.engines.metadata.errors import ReleaseFailed, SwitchUnknown
from chainmerge.engines.metadata.header import HeaderWrite, compose_header, content_of
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.metadata.steps import (
    Port,
    StepName,
    require_stored,
    reserve,
    reserve_holes,
)
from chainmerge.engines.metadata.writes import Piece, gathered, whole_clusters
from chainmerge.engines.native.decisions import (
    Change,
    MappedDisk,
    find_wanted,
    new_entries,
    old_hosts,
    place_data,
)
from chainmerge.engines.native.errors import MergeNotWritten, cause_of
from chainmerge.engines.native.moves import (
    Moves,
    Segments,
    by_source,
    by_target,
    concatenated_moves,
    items_of,
    moves_into,
    nothing_there,
    places_of_data,
    segments_of,
    with_zeros_to,
)
from chainmerge.engines.native.origins import TracedView, trace_of
from chainmerge.engines.native.survey import (
    NewTree,
    PlacedTree,
    given_up,
    l2_tables_of,
    place_tree,
    released_clusters,
)
from chainmerge.engines.native.windows import (
    changed_windows,
    read_old_entries,
    read_tables,
)
from chainmerge.engines.native.zeroes import ViewWithZeroes, ZeroRanges
from chainmerge.errors import ChainmergeError, Failed, Refused
from chainmerge.options import Direction, Placement
from chainmerge.qcow2.header import Header
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import COPIED
from chainmerge.qcow2.readable import Overlaid
from chainmerge.qcow2.refcounts import end_of_use, read_refcount_table, read_refcounts
from chainmerge.qcow2.runs import Runs, runs_of, split_runs
from chainmerge.storage.file_space import space_of, united
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from chainmerge.storage.transfer.copying import Transfer

# Clusters whose data is put into the order of its sources at once.
_CLUSTERS_AT_ONCE = 1 << 20

BeforeSwitch = Callable[[Qcow2Image, GuestView], None]
"""Is given the new base, as it will be once its first sector is written, and the guest's view
of it; raises where something is not as it should be."""


class Backing(Struct, frozen=True):
    """The backing file that an image shall have: as its header names it; None for none."""

    name: str | None
    format: str | None


class Commit(Struct, frozen=True):
    """A merge of images into the one below them (commit) or above them (pull).

    Attributes:
        image: What is written, read through the port; checked. What is leaked in it stays so.
        chain: The view of the whole chain, from the root to top.
        base_index: Which of its layers base is.
        tree: What the image gets.
        zeroes: What of the merged images' data is known to be zeros; None for nothing.
        backing: The backing file of the result; None if it stays.
        placement: Where data goes that base has a cluster for.
        shares_extents: Whether the file system shares what is copied, so that data takes no
            space that could be reserved.
        instead: What takes the place of the images that are merged, where none is.
    """

    image: Qcow2Image
    chain: GuestView
    base_index: int
    tree: NewTree
    zeroes: ZeroRanges | None
    backing: Backing | None
    placement: Placement
    shares_extents: bool
    instead: GuestView | None = None

    @property
    def disk(self) -> MappedDisk:
        """The image and its size after the merge."""
        return self.tree.disk

    @property
    def result(self) -> int:
        """Which of the chain's layers is written."""
        pulls = self.disk.direction is Direction.PULL
        return len(self.chain.layers) - 1 if pulls else self.base_index

    @property
    def merged(self) -> GuestView:
        """The images that are merged into it."""
        if self.instead is not None:
            return self.instead
        merged = merged_layers(self.chain, self.base_index, self.disk.direction)
        return merged if self.zeroes is None else ViewWithZeroes(merged.layers, self.zeroes)

    @property
    def changes_nothing(self) -> bool:
        """Whether no byte of metadata has to change."""
        return self.tree.changes_nothing and self.backing is None

    def moves_of(self, segments: Segments, merged: Resolved) -> Moves:
        """Where the bytes of *segments* come from; *merged* is what the merged images say."""
        if self.disk.direction is Direction.COMMIT:
            return moves_into(segments, merged, self.base_index + 1, self._own_view)
        # Of a unit of which top decides a part, that part comes from top.
        start, end = merged.start, merged.end
        size = min(end, self.chain.virtual_size)
        whole = joined_resolved(list(self.chain.resolve(start, size)))
        return moves_into(segments, with_zeros_to(whole, end), 0, nothing_there)

    def _own_view(self, start: int, end: int) -> Resolved:
        own = GuestView(self.chain.layers[: self.base_index + 1])
        return joined_resolved(list(own.resolve(start, end)))


def merged_layers(chain: GuestView, base_index: int, direction: Direction) -> GuestView:
    """The images that are merged into the one that is written."""
    if direction is Direction.PULL:
        return GuestView(chain.layers[base_index:-1])
    return GuestView(chain.layers[base_index + 1 :])


class CommitOutcome(Struct, frozen=True):
    """What a commit did, in bytes.

    Attributes:
        required_size: What base's file had to have for it.
        moved: Guest data that was written.
        header: Base's header now.
    """

    required_size: int
    moved: int
    header: Header


class _Mapping(Struct, frozen=True):
    """The new mapping, written to clusters that nothing leads to yet.

    Attributes:
        l1: The new L1 table.
        released: Host clusters that it does not use any more, once for each reference.
        origins: What was moved where.
    """

    l1: U64Array
    released: list[Runs]
    origins: list[Moves]


def commit_natively(
    port: Port, job: Commit, transfer: Transfer, before_switch: BeforeSwitch
) -> CommitOutcome:
    """Write the merge and switch to it.

    Args:
        port: Base's file or device. The caller holds the locks.
        job: What to write.
        transfer: Moves data into the port.
        before_switch: Verifies the new tree while the old one still stands.

    Raises:
        NotEnoughSpace, RefcountTableFull, HeaderFull: nothing was changed.
        MergeNotWritten, Interrupted: base is the old image.
        SwitchUnknown: base is the old image or the new one.
        ReleaseFailed: base is the new image, and has leaked clusters.
    """
    placed = place_tree(job.tree, free_space_of(job.image))
    head = _new_head(job, placed)
    old_size = port.size
    cluster_size = job.disk.header.cluster_size
    required = placed.allocation.end * cluster_size
    try:
        taken = placed.metadata if job.shares_extents else placed.allocation.everything
        reserve(port, required, _ranges(taken, cluster_size))
        _reserve_in_place(port, job)
        with _step(port, StepName.FILL):
            if not port.is_block_device and port.size < required:
                port.truncate_to(required)
            mapping = _write_mapping(port, job, placed, transfer)
            _write(port, _other_clusters(job, placed, mapping.l1), cluster_size)
            for offset, data in head.beyond:
                port.write(offset, data)
            port.flush()
            transfer.verify()
        _count(port, job, placed)
        port.forget_cached()
        switched = _verify(port, job, head, mapping, before_switch)
    except BaseException:
        _undo(port, placed, old_size)
        raise
    if not job.changes_nothing:
        _switch(port, head)
        _release(Qcow2Image(port, switched), port, job, placed, mapping)
    return CommitOutcome(required, job.tree.mapping.written, switched)


def _reserve_in_place(port: Port, job: Commit) -> None:
    """Have space for what is written into holes of the file, in clusters that stay.

    Preallocated images are full of such holes. Where the file system shares what moves, it
    takes none of its space.

    Raises NotEnoughSpace: the file is what it was.
    """
    if job.shares_extents or not job.tree.mapping.in_place or not isinstance(port, FileReadable):
        return
    space = space_of(port)
    if space is not None:
        reserve_holes(port, space.holes(united(job.tree.mapping.in_place)))


# FILL


def _write_mapping(port: Port, job: Commit, placed: PlacedTree, transfer: Transfer) -> _Mapping:
    header = job.disk.header
    l1 = np.zeros(max(job.tree.l1_entries, header.l1_size), dtype=np.uint64)
    l1[: header.l1_size] = job.image.l1
    mapping = _Mapping(l1, [], [])
    data, tables = placed.data, placed.tables
    for batch in _batches(job):
        wanted = sum(int(np.count_nonzero(change.fresh)) for _, change in batch)
        for_batch, data = split_runs(data, wanted)
        hosts = _assign_hosts(batch, for_batch.expanded(), header.cluster_size)
        _move(job, batch, hosts, transfer, mapping)
        for (_, change), host in zip(batch, hosts, strict=True):
            indexes = l2_tables_of(change, header.l2_entries)
            for_tables, tables = split_runs(tables, len(indexes))
            piece = _new_tables(job, change, host, indexes, for_tables.expanded())
            _write(port, [piece], header.cluster_size)
            mapping.released.extend(given_up(job.image, job.disk.header, change, indexes))
            l1[indexes] = piece[0].astype(np.uint64) * np.uint64(header.cluster_size)
            l1[indexes] |= np.uint64(COPIED)
    assert not data.total
    assert not tables.total
    return mapping


def _batches(job: Commit) -> Iterator[list[tuple[Resolved, Change]]]:
    """Windows of changes, as many as are put into the order of their sources together."""
    batch: list[tuple[Resolved, Change]] = []
    clusters = 0
    for window in changed_windows(job.merged, job.disk):
        wanted = find_wanted(job.disk, read_old_entries(job.image, window), window)
        change = place_data(wanted, job.disk, job.placement)
        if not len(change):
            continue
        batch.append((window, change))
        clusters += len(change) + len(window)
        if clusters >= _CLUSTERS_AT_ONCE:
            yield batch
            batch, clusters = [], 0
    if batch:
        yield batch


def _assign_hosts(
    batch: Sequence[tuple[Resolved, Change]], clusters: I64Array, cluster_size: int
) -> list[U64Array]:
    """File offsets of all host clusters, fresh ones in the order of where their data is now."""
    places = [places_of_data(change, above, cluster_size) for above, change in batch]
    order = np.lexsort(
        (np.concatenate([host for _, _, host in places]), np.concatenate([p for _, p, _ in places]))
    )
    assigned = np.empty(len(order), dtype=np.uint64)
    assigned[order] = clusters.astype(np.uint64) * np.uint64(cluster_size)
    hosts = []
    used = 0
    for (fresh, _, _), (_, change) in zip(places, batch, strict=True):
        host = old_hosts(change)
        host[fresh] = assigned[used : used + len(fresh)]
        used += len(fresh)
        hosts.append(host)
    return hosts


def _move(
    job: Commit,
    batch: Sequence[tuple[Resolved, Change]],
    hosts: Sequence[U64Array],
    transfer: Transfer,
    mapping: _Mapping,
) -> None:
    """Move a batch's data in the order of its sources.

    For what goes to fresh clusters that is the order of its targets too.
    """
    header = job.disk.header
    new: list[Moves] = []
    in_place: list[Moves] = []
    for (window, change), host in zip(batch, hosts, strict=True):
        above = window
        if window.end == job.disk.size_after:
            above = with_zeros_to(window, job.disk.clusters_after * header.cluster_size)
        for chosen, moves in ((change.fresh, new), (change.reused, in_place)):
            segments = segments_of(change, chosen, host, header)
            if len(segments.guest):
                moves.append(job.moves_of(segments, above))
    for parts, in_order in ((new, by_target), (in_place, by_source)):
        if parts:
            moved = in_order(concatenated_moves(parts))
            transfer.move(items_of(moved, job.chain))
            mapping.origins.append(moved)


def _new_tables(
    job: Commit,
    change: Change,
    hosts: U64Array,
    indexes: I64Array,
    clusters: I64Array,
) -> Piece:
    """The L2 tables in which entries change."""
    header = job.disk.header
    words = read_tables(job.image, indexes)
    entries, subclusters = new_entries(change, hosts, header)
    row = np.searchsorted(indexes, change.cluster // header.l2_entries)
    column = change.cluster % header.l2_entries
    remapped = change.remapped
    row, column = row[remapped], column[remapped]
    if header.extended_l2:
        words[row, 2 * column] = entries[remapped]
        words[row, 2 * column + 1] = subclusters[remapped]
    else:
        words[row, column] = entries[remapped]
    return clusters, words.astype(">u8").view(np.uint8).reshape(len(indexes), header.cluster_size)


def _other_clusters(job: Commit, placed: PlacedTree, l1: U64Array) -> Iterator[Piece]:
    """Everything but guest data and L2 tables."""
    header, allocation = job.disk.header, placed.allocation
    if placed.l1_start is not None:
        rows = whole_clusters(l1.astype(">u8").tobytes(), header.cluster_size)
        yield placed.l1_start + np.arange(len(rows), dtype=np.int64), rows
    if job.tree.bitmaps is not None:
        yield from place_bitmaps(job.tree.bitmaps, placed.bitmaps).pieces()
    yield from new_refcount_blocks(header, allocation)
    if allocation.table_start is not None:
        yield new_refcount_table(header, read_refcount_table(job.image), allocation)


def _new_head(job: Commit, placed: PlacedTree) -> HeaderWrite:
    header, allocation = job.disk.header, placed.allocation
    content = replace(content_of(header), virtual_size=job.disk.size_after)
    if job.backing is not None:
        content = replace(content, backing_name=job.backing.name, backing_format=job.backing.format)
    if placed.l1_start is not None:
        content = replace(
            content,
            l1_size=job.tree.l1_entries,
            l1_table_offset=placed.l1_start * header.cluster_size,
        )
    if job.tree.bitmaps is not None:
        extension = place_bitmaps(job.tree.bitmaps, placed.bitmaps).extension
        content = replace(content, bitmaps=extension, bitmaps_trusted=extension is not None)
    if allocation.table_start is not None:
        content = replace(
            content,
            refcount_table_offset=allocation.table_start * header.cluster_size,
            refcount_table_clusters=allocation.table_clusters,
        )
    cluster = job.image.readable.read(0, header.cluster_size)
    return compose_header(job.image.name, cluster, header, content)


def _write(port: Port, pieces: Sequence[Piece] | Iterator[Piece], cluster_size: int) -> None:
    for offset, data in gathered(iter(pieces), cluster_size):
        port.write(offset, data)


# COUNT, LINK


def _count(port: Port, job: Commit, placed: PlacedTree) -> None:
    header, allocation = job.disk.header, placed.allocation
    table = read_refcount_table(job.image)
    with _step(port, StepName.COUNT):
        for offset, data in raised_refcounts(port, header, table, allocation):
            port.write(offset, data)
        port.flush()
    if len(allocation.blocks.index) and allocation.table_start is None:
        with _step(port, StepName.LINK):
            for offset, data in link_writes(port, header, allocation):
                port.write(offset, data)
            port.flush()


# Verification


def _verify(
    port: Port, job: Commit, head: HeaderWrite, mapping: _Mapping, before_switch: BeforeSwitch
) -> Header:
    """Have the new image verified; returns its header."""
    image = Qcow2Image(Overlaid(port, 0, head.sector))
    layers = list(job.chain.layers)
    layers[job.result] = layer_of_qcow2(image, port)
    origins = trace_of(mapping.origins)
    before_switch(image, TracedView(tuple(layers), job.base_index, job.result, origins))
    return image.header


# SWITCH, RELEASE


def _switch(port: Port, head: HeaderWrite) -> None:
    try:
        port.write(0, head.sector)
        port.flush()
        require_stored(port, [(0, head.sector)])
    except (OSError, Failed) as error:
        raise SwitchUnknown(port.name, cause_of(error, port.name)) from error


def _release(
    image: Qcow2Image, port: Port, job: Commit, placed: PlacedTree, mapping: _Mapping
) -> None:
    """Give back what only the old tree used, and on a file system its space too."""
    everything = released_clusters(job.image, job.tree, placed, mapping.released)
    try:
        table = read_refcount_table(image)
        for offset, data in lowered_refcounts(port, image.header, table, everything):
            port.write(offset, data)
        port.flush()
    except (OSError, Failed, Refused) as error:
        raise ReleaseFailed(port.name, cause_of(error, port.name)) from error
    if not port.is_block_device:
        # The merge is complete; space that cannot be given back is only that.
        with contextlib.suppress(ChainmergeError):
            _punch(port, image, everything)


def _punch(port: Port, image: Qcow2Image, released: Runs) -> None:
    """Give the space of clusters back to the file system that are free now."""
    cluster_size = image.header.cluster_size
    for start, length in _free_parts(image, released):
        port.punch(start * cluster_size, length * cluster_size)


def cut_to_image_end(port: Port, image: Qcow2Image) -> None:
    """Make a regular file end where its image does.

    Raises:
        Failed: the file is as it was.
    """
    end = end_of_use(image)
    if end < port.size:
        port.truncate_to(end)


def punch_free(port: Port) -> None:
    """Give the space of all clusters of a regular file back that are free.

    Raises:
        Failed: some of it is given back.
    """
    image = Qcow2Image(port)
    clusters = port.size // image.header.cluster_size
    _punch(port, image, Runs(np.zeros(1, dtype=np.int64), np.array([clusters])))


def _free_parts(image: Qcow2Image, released: Runs) -> Iterator[tuple[int, int]]:
    order = np.argsort(released.start, kind="stable")
    done = 0
    for start, length in zip(
        released.start[order].tolist(), released.length[order].tolist(), strict=True
    ):
        first, end = max(start, done), start + length
        done = max(done, end)
        for at in range(first, end, _CLUSTERS_AT_ONCE):
            count = min(_CLUSTERS_AT_ONCE, end - at)
            free = np.flatnonzero(read_refcounts(image, at, count) == 0)
            runs = runs_of(free + at)
            yield from zip(runs.start.tolist(), runs.length.tolist(), strict=True)


# When it fails


@contextlib.contextmanager
def _step(port: Port, step: StepName) -> Iterator[None]:
    try:
        yield
    except (OSError, Failed, Refused) as error:
        raise MergeNotWritten(port.name, step, cause_of(error, port.name)) from error


def _undo(port: Port, placed: PlacedTree, old_size: int) -> None:
    """Give back what was taken, as far as the storage lets us; what stays is leaked.

    Refcount blocks that the table names already stay: they are in use.
    """
    with contextlib.suppress(ChainmergeError):
        reclaim_leaks(port, placed.allocation.everything)
        if port.is_block_device:
            return
        image = Qcow2Image(port)
        cluster_size = image.header.cluster_size
        everything = placed.allocation.everything
        free = 0
        for start, length in _free_parts(image, everything):
            port.punch(start * cluster_size, length * cluster_size)
            free += length
        if free == everything.total and port.size > old_size:
            port.truncate_to(old_size)


def _ranges(runs: Runs, cluster_size: int) -> list[tuple[int, int]]:
    return [
        (start * cluster_size, length * cluster_size)
        for start, length in zip(runs.start.tolist(), runs.length.tolist(), strict=True)
    ]
