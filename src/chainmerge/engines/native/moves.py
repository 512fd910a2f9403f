# SPDX-License-Identifier: Apache-2.0
"""Which bytes go where: the changed clusters of base cut into pieces of one origin each."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import (
    BoolArray,
    I32Array,
    IndexArray,
    U8Array,
    U32Array,
    U64Array,
)
from chainmerge.arithmetic.distinct import distinct
from chainmerge.chain.view import NO_LAYER, Resolved, joined_resolved
from chainmerge.qcow2.extents import Extents, Kind
from chainmerge.storage.transfer.copying import Produced, Stretch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chainmerge.chain.view import GuestView
    from chainmerge.engines.native.decisions import Change
    from chainmerge.qcow2.header import Header

_UNPACKED_CLUSTERS = 64


class Segments(Struct, frozen=True):
    """Runs of the guest's disk and where they go in base's file: arrays of equal length, in bytes.

    Ascending by guest offset, disjoint.
    """

    guest: U64Array
    length: U64Array
    target: U64Array


class Moves(Struct, frozen=True):
    """Pieces that come from one place each: arrays of equal length.

    Attributes:
        target: File offset in base.
        length: Bytes.
        kind: DATA, COMPRESSED, or ZERO for zeros.
        layer: Index in the chain, from the root at 0, of the image that has it; -1 for zeros.
        host: File offset there; of COMPRESSED where the cluster's data starts.
        csize: As in :class:`chainmerge.qcow2.extents.Extents`.
        guest: Guest offset.
    """

    target: U64Array
    length: U64Array
    kind: U8Array
    layer: I32Array
    host: U64Array
    csize: U32Array
    guest: U64Array

    def __len__(self) -> int:
        """Return the number of pieces."""
        return len(self.target)

    def take(self, chosen: IndexArray | BoolArray) -> Moves:
        """Some of the pieces."""
        return Moves(
            self.target[chosen],
            self.length[chosen],
            self.kind[chosen],
            self.layer[chosen],
            self.host[chosen],
            self.csize[chosen],
            self.guest[chosen],
        )


def places_of_data(
    change: Change, above: Resolved, cluster_size: int
) -> tuple[IndexArray, I32Array, U64Array]:
    """Positions of the fresh clusters, and where above their first byte lies: layer and offset."""
    fresh = np.flatnonzero(change.fresh)
    guest = change.cluster[fresh].astype(np.uint64) * np.uint64(cluster_size)
    run = np.searchsorted(above.guest, guest, "right") - 1
    moved = np.where(above.kind[run] == Kind.DATA, guest - above.guest[run], np.uint64(0))
    return fresh, above.layer[run], above.host[run] + moved


def segments_of(change: Change, chosen: BoolArray, hosts: U64Array, header: Header) -> Segments:
    """The units that are written, as runs of the disk.

    Args:
        change: The clusters.
        chosen: Which of them.
        hosts: File offset of each one's host cluster.
        header: Base's.
    """
    written = np.flatnonzero(chosen & (change.copied != 0))
    guest = change.cluster[written].astype(np.uint64) << np.uint64(header.cluster_bits)
    target = hosts[written]
    if header.extended_l2:
        octets = change.copied[written].astype("<u4").view(np.uint8).reshape(-1, 4)
        cluster, unit = np.nonzero(np.unpackbits(octets, axis=1, bitorder="little"))
        within = unit.astype(np.uint64) * np.uint64(header.subcluster_size)
        guest, target = guest[cluster] + within, target[cluster] + within
    size = np.uint64(header.subcluster_size)
    if not len(guest):
        return Segments(guest, guest, target)
    breaks = (guest[1:] != guest[:-1] + size) | (target[1:] != target[:-1] + size)
    heads = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    length = np.diff(np.append(heads, len(guest))).astype(np.uint64) * size
    return Segments(guest[heads], length, target[heads])


def moves_into(
    segments: Segments,
    above: Resolved,
    first_layer: int,
    below: Callable[[int, int], Resolved],
) -> Moves:
    """Cut segments into pieces of one origin.

    Args:
        segments: What is written.
        above: What the images above base say of all of it.
        first_layer: Index in the chain of the lowest of these images.
        below: What base's own view is from one guest byte to another, asked only where it is
            needed.
    """
    pieces, is_open = _crossed(segments, above, first_layer)
    if not is_open.any():
        return pieces
    opened = np.flatnonzero(is_open)
    gaps = Segments(pieces.guest[opened], pieces.length[opened], pieces.target[opened])
    start, end = int(gaps.guest[0]), int(gaps.guest[-1] + gaps.length[-1])
    filled, nothing = _crossed(gaps, below(start, end), 0)
    filled.kind[nothing] = Kind.ZERO
    return concatenated_moves([pieces.take(~is_open), filled])


def nothing_there(start: int, end: int) -> Resolved:
    """A view of nothing."""
    extents = Extents.single(start, end, Kind.ZERO)
    return Resolved(extents, np.array([NO_LAYER], dtype=np.int32))


def _crossed(segments: Segments, runs: Resolved, first_layer: int) -> tuple[Moves, BoolArray]:
    """Segments cut at the bounds of *runs*, and which pieces these leave open."""
    ends = segments.guest + segments.length
    cuts: U64Array = distinct(np.concatenate([segments.guest, ends, runs.guest]))
    segment = np.searchsorted(segments.guest, cuts, "right") - 1
    inside = segment >= 0
    inside[inside] = cuts[inside] < ends[segment[inside]]
    lengths = np.diff(cuts, append=cuts[-1:])[inside]
    guest, segment = cuts[inside], segment[inside]
    run = np.searchsorted(runs.guest, guest, "right") - 1
    kind = runs.kind[run]
    is_open = kind == Kind.UNALLOCATED
    has_data = runs.layer[run] != NO_LAYER
    kind = np.where(has_data | is_open, kind, np.uint8(Kind.ZERO))
    moved = np.where(kind == Kind.DATA, guest - runs.guest[run], np.uint64(0))
    moves = Moves(
        target=segments.target[segment] + (guest - segments.guest[segment]),
        length=lengths,
        kind=kind.astype(np.uint8),
        layer=np.where(has_data, runs.layer[run] + first_layer, NO_LAYER).astype(np.int32),
        host=np.where(has_data, runs.host[run] + moved, np.uint64(0)),
        csize=runs.csize[run],
        guest=guest,
    )
    return moves, is_open


def concatenated_moves(parts: Sequence[Moves]) -> Moves:
    """The pieces of several windows together."""
    if len(parts) == 1:
        return parts[0]
    return Moves(
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([part.kind for part in parts]),
        np.concatenate([part.layer for part in parts]),
        np.concatenate([part.host for part in parts]),
        np.concatenate([part.csize for part in parts]),
        np.concatenate([part.guest for part in parts]),
    )


def by_target(moves: Moves) -> Moves:
    """In the order of where they go, those that continue each other joined."""
    return _coalesced(moves.take(np.argsort(moves.target, kind="stable")))


def by_source(moves: Moves) -> Moves:
    """In the order of where they come from, those that continue each other joined."""
    return _coalesced(moves.take(np.lexsort((moves.host, moves.layer))))


def _coalesced(moves: Moves) -> Moves:
    if len(moves) < 2:
        return moves
    plain = moves.kind != Kind.COMPRESSED
    joins = plain[1:] & (moves.kind[1:] == moves.kind[:-1]) & (moves.layer[1:] == moves.layer[:-1])
    ends = moves.target + moves.length
    joins &= moves.target[1:] == ends[:-1]
    host_ends = moves.host + np.where(moves.kind == Kind.DATA, moves.length, np.uint64(0))
    joins &= moves.host[1:] == host_ends[:-1]
    heads = np.concatenate([[0], np.flatnonzero(~joins) + 1])
    joined_resolved = moves.take(heads)
    length = np.add.reduceat(moves.length, heads)
    return Moves(
        joined_resolved.target,
        length,
        joined_resolved.kind,
        joined_resolved.layer,
        joined_resolved.host,
        joined_resolved.csize,
        joined_resolved.guest,
    )


def items_of(moves: Moves, chain: GuestView) -> Iterator[Stretch | Produced]:
    """The pieces as what :mod:`chainmerge.storage.transfer.copying` moves, in their order."""

    @lru_cache(maxsize=_UNPACKED_CLUSTERS)
    def unpacked(layer: int, host: int, csize: int) -> bytes:
        return chain.layers[layer].read_compressed(host, csize)

    def producer(layer: int, host: int, csize: int, guest: int, length: int) -> Callable[[], bytes]:
        within = guest % chain.layers[layer].cluster_size
        return lambda: unpacked(layer, host, csize)[within : within + length]

    columns = zip(
        moves.target.tolist(),
        moves.length.tolist(),
        moves.kind.tolist(),
        moves.layer.tolist(),
        moves.host.tolist(),
        moves.csize.tolist(),
        moves.guest.tolist(),
        strict=True,
    )
    for target, length, kind, layer, host, csize, guest in columns:
        if kind == Kind.COMPRESSED:
            yield Produced(target, length, producer(layer, host, csize, guest, length))
        elif layer == NO_LAYER:
            yield Stretch(target, length, None, 0)
        else:
            yield Stretch(target, length, chain.layers[layer].source, host)


def with_zeros_to(above: Resolved, end: int) -> Resolved:
    """The same with zeros from where it ends to guest byte *end*."""
    if above.end >= end:
        return above
    return joined_resolved([above, nothing_there(above.end, end)])
