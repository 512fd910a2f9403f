# SPDX-License-Identifier: Apache-2.0
"""The guest's view of a chain of images: which layer decides what, and the content itself.

The rules are QEMU's: the topmost layer that says anything about a byte decides it,
and a layer that is shorter than the one above reads as zeros past its end, whatever
longer layers below it hold there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import I32Array, IndexArray, U8Array, U32Array, U64Array
from chainmerge.arithmetic.distinct import distinct
from chainmerge.chain.layers import Layer
from chainmerge.qcow2.extents import Extents, Kind, concatenated_extents, follows_guest
from chainmerge.qcow2.header import MAX_CLUSTER_BITS
from chainmerge.qcow2.mapping import DEFAULT_WINDOW

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NO_LAYER = -1

# What all layers together say about one piece of the disk is held at a time: so many runs, and
# no more than one portion of one layer beyond that. To decide among them takes below 80 MiB.
RUNS_AT_ONCE = 256 << 10

# A piece ends where clusters of every size end, so that none is read or unpacked twice.
PIECE_ALIGNMENT = 1 << MAX_CLUSTER_BITS


class Resolved(Struct, frozen=True):
    """Which layer decides which run of the guest's disk, without gaps."""

    extents: Extents
    """The runs as the deciding layer has them. UNALLOCATED is where no layer says anything,
    ZERO also past the end of a layer that is shorter than the one above."""
    layer: I32Array
    """Index of the layer that holds the data, from the root at 0; -1 where it reads as zeros.
    Host offsets belong to this layer's file and mean nothing where it is -1."""

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.layer)

    @property
    def guest(self) -> U64Array:
        """Bytes."""
        return self.extents.guest

    @property
    def length(self) -> U64Array:
        """Bytes."""
        return self.extents.length

    @property
    def kind(self) -> U8Array:
        """Values of :class:`Kind`."""
        return self.extents.kind

    @property
    def host(self) -> U64Array:
        """As in :class:`Extents`."""
        return self.extents.host

    @property
    def csize(self) -> U32Array:
        """As in :class:`Extents`."""
        return self.extents.csize

    @property
    def start(self) -> int:
        """First guest byte."""
        return self.extents.start

    @property
    def end(self) -> int:
        """Guest byte after the last one."""
        return self.extents.end

    def clipped(self, start: int, end: int) -> Resolved:
        """The part from guest byte *start* to *end*, both within what this covers."""
        extents = self.extents.clipped(start, end)
        first = int(np.searchsorted(self.guest, np.uint64(start), "right")) - 1
        first = max(first, 0)
        return Resolved(extents, self.layer[first : first + len(extents)])

    def take(self, chosen: IndexArray) -> Resolved:
        """The runs at the given positions."""
        return Resolved(self.extents.take(chosen), self.layer[chosen])

    def cut_at(self, bounds: U64Array) -> Resolved:
        """The same in the runs that start at *bounds*, which hold all of its own starts."""
        index = np.searchsorted(self.guest, bounds, "right") - 1
        return Resolved(self.extents.cut_at(bounds), self.layer[index])


class GuestView(Struct, frozen=True):
    """What the guest sees of a chain."""

    layers: tuple[Layer, ...]
    """From the root up; the last one is the top."""

    @property
    def virtual_size(self) -> int:
        """Bytes: the top's."""
        return self.layers[-1].virtual_size

    def resolve(self, start: int = 0, end: int | None = None) -> Iterator[Resolved]:
        """Yield which layer decides what, from guest byte *start* to *end*.

        Past the end of the top everything is ZERO. Memory in use is bounded, whatever the
        sizes of the images; runs may be split between one yield and the next.

        Raises:
            FormatError: a layer's tables are damaged.
        """
        end = self.virtual_size if end is None else end
        if start >= end:
            return
        if len(self.layers) == 1:
            for extents in _to_the_end(self.layers[0], start, end, DEFAULT_WINDOW):
                yield _as_resolved(extents, 0)
            return
        at, width = start, end - start
        while at < end:
            runs = self._resolve_piece(at, min(at + width, end))
            yield runs
            # Where there was little to say, the next piece may be larger; where a piece had to be
            # shortened, layers were read that are read again in the next one.
            width = (runs.end - at) * (2 if len(runs) < RUNS_AT_ONCE // 8 else 1)
            at = runs.end

    def _resolve_piece(self, at: int, upto: int) -> Resolved:
        """Which layer decides what, from guest byte *at* to *upto* or, with many runs, less far.

        Layers are read one after the other from the top down, each for the whole piece: what
        that costs is a matter of how much they say. To stop each layer wherever another one's
        tables end takes (number of layers) x (tables of the disk) steps.
        """
        said: list[Resolved] = []
        count = 0
        for index in range(len(self.layers) - 1, -1, -1):
            for extents in _to_the_end(self.layers[index], at, upto, DEFAULT_WINDOW):
                if extents.start >= upto:
                    break
                claims = _claims(extents.clipped(at, min(upto, extents.end)), index)
                if not len(claims):
                    continue
                said.append(claims)
                count += len(claims)
                if count > RUNS_AT_ONCE:
                    runs = _uppermost(said, at, upto)
                    upto = _affordable_end(runs)
                    said = [_decided(runs.clipped(at, upto))]
                    count = len(said[0])
        return _uppermost(said, at, upto)

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly *length* bytes from guest byte *offset*; zeros past the top's end.

        Raises:
            FormatError: a layer's tables or its compressed data are damaged, or a layer that
                decides part of this is encrypted.
        """
        return b"".join(self.read_runs(runs) for runs in self.resolve(offset, offset + length))

    def read_runs(self, runs: Resolved) -> bytes:
        """Return the content of *runs*, which :meth:`resolve` gave, as one piece.

        Raises:
            FormatError: as :meth:`read`.
        """
        content = bytearray(runs.end - runs.start)
        # Overlays with smaller clusters cut a compressed cluster into many runs.
        unpacked: tuple[int, int, int] | None = None
        cluster = b""
        for index in np.flatnonzero(runs.layer != NO_LAYER).tolist():
            number, host = int(runs.layer[index]), int(runs.host[index])
            guest, length = int(runs.guest[index]), int(runs.length[index])
            layer = self.layers[number]
            if runs.kind[index] == Kind.COMPRESSED:
                csize = int(runs.csize[index])
                if unpacked != (number, host, csize):
                    cluster = layer.read_compressed(host, csize)
                    unpacked = (number, host, csize)
                within = guest % layer.cluster_size
                data = cluster[within : within + length]
            else:
                data = layer.read_data(host, length)
            content[guest - runs.start : guest - runs.start + length] = data
        return bytes(content)


def _to_the_end(layer: Layer, start: int, end: int, window: int) -> Iterator[Extents]:
    """What a layer says about *start* to *end*, with zeros past its own end."""
    layer_end = min(end, layer.virtual_size)
    if start < layer_end:
        yield from layer.iter_extents(start, layer_end, window)
    if layer_end < end:
        yield Extents.single(max(start, layer_end), end, Kind.ZERO)


def _as_resolved(extents: Extents, index: int) -> Resolved:
    has_data = (extents.kind == Kind.DATA) | (extents.kind == Kind.COMPRESSED)
    return Resolved(extents, np.where(has_data, np.int32(index), np.int32(NO_LAYER)))


def _claims(extents: Extents, index: int) -> Resolved:
    """What the layer with *index* decides if those above it do not; with gaps."""
    return _decided(_as_resolved(extents, index))


def _decided(runs: Resolved) -> Resolved:
    """The runs about which a layer says something; with gaps."""
    return runs.take(np.flatnonzero(runs.kind != Kind.UNALLOCATED))


def _uppermost(said: Sequence[Resolved], at: int, upto: int) -> Resolved:
    """Who decides what from guest byte *at* to *upto*.

    Args:
        said: what layers, or groups of them, decide, from the upper to the lower one; within
            the range, each part ascending and disjoint.
        at: first guest byte.
        upto: guest byte after the last one.
    """
    nobody = Resolved(Extents.single(at, upto, Kind.UNALLOCATED), np.array([NO_LAYER], np.int32))
    # From the lowest up, so that the highest index wins.
    claims = joined_resolved([nobody, *reversed(said)])
    claimed_end = claims.guest + claims.length
    bounds = distinct(np.concatenate([claims.guest, claimed_end]))
    winner = _last_covering(
        np.searchsorted(bounds, claims.guest), np.searchsorted(bounds, claimed_end), len(bounds) - 1
    )
    heads = np.concatenate([[0], np.flatnonzero(winner[1:] != winner[:-1]) + 1])
    winner = winner[heads]
    guest, end = bounds[heads], bounds[np.append(heads[1:], len(bounds) - 1)]
    kind = claims.kind[winner]
    moved = np.where(follows_guest(kind), guest - claims.guest[winner], np.uint64(0))
    extents = Extents(guest, end - guest, kind, claims.host[winner] + moved, claims.csize[winner])
    return _coalesced(Resolved(extents, claims.layer[winner]))


def joined_resolved(parts: Sequence[Resolved]) -> Resolved:
    """All runs of *parts*, one part after the other."""
    return Resolved(
        concatenated_extents([part.extents for part in parts]),
        np.concatenate([part.layer for part in parts]),
    )


def _last_covering(first: IndexArray, behind: IndexArray, slots: int) -> IndexArray:
    """For each of a number of slots, which is the last range that covers it.

    Takes time in proportion to ranges + slots * log(slots), however much the ranges overlap: a
    range is the union of two that are as long as a power of two, and those of one length are
    taken apart together into those of half of it.

    Args:
        first: the first slot of each range.
        behind: the slot behind its last one; no range is empty.
        slots: their number. Each is covered by some range.

    Returns:
        Indexes of ranges, one for each slot.
    """
    order = np.frexp(behind - first)[1] - 1  # of the largest power of two within the length
    last = np.full(slots, -1, np.intp)
    for exponent in range(int(order.max()), -1, -1):
        length = 1 << exponent
        halves = last.copy()
        np.maximum(halves[length:], last[:-length], out=halves[length:])
        last = halves
        ranges = np.flatnonzero(order == exponent)
        np.maximum.at(last, first[ranges], ranges)
        np.maximum.at(last, behind[ranges] - length, ranges)
    return last


def _affordable_end(runs: Resolved) -> int:
    """Where a piece of the disk must end for half of the runs to be held at a time."""
    most = RUNS_AT_ONCE // 2
    if len(runs) <= most:
        return runs.end
    wanted = int(runs.guest[most]) // PIECE_ALIGNMENT * PIECE_ALIGNMENT
    least = (runs.start // PIECE_ALIGNMENT + 1) * PIECE_ALIGNMENT
    return min(max(wanted, least), runs.end)


def _coalesced(runs: Resolved) -> Resolved:
    """Join neighbours that continue each other in the same layer."""
    joins = runs.extents.continues() & (runs.layer[1:] == runs.layer[:-1])
    heads = np.concatenate([[0], np.flatnonzero(~joins) + 1])
    return Resolved(runs.extents.joined_at(heads), runs.layer[heads])


def in_step(a: Iterator[Resolved], b: Iterator[Resolved]) -> Iterator[tuple[Resolved, Resolved]]:
    """Walk through two views of the same range, in pairs that cover the same part of it."""
    ours, theirs = next(a, None), next(b, None)
    while ours is not None and theirs is not None:
        at, upto = max(ours.start, theirs.start), min(ours.end, theirs.end)
        yield ours.clipped(at, upto), theirs.clipped(at, upto)
        if ours.end == upto:
            ours = next(a, None)
        if theirs.end == upto:
            theirs = next(b, None)
