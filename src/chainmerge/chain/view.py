# SPDX-License-Identifier: Apache-2.0
"""The guest's view of a chain of images: which layer decides what, and the content itself.

The rules are QEMU's: the topmost layer that says anything about a byte decides it,
and a layer that is shorter than the one above reads as zeros past its end, whatever
longer layers below it hold there.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from chainmerge.errors import Interrupted
from chainmerge.qcow2.compression import decompress_cluster
from chainmerge.qcow2.errors import EncryptedContent
from chainmerge.qcow2.extents import (
    Extents,
    IndexArray,
    Kind,
    U8Array,
    U32Array,
    U64Array,
    concatenated,
    distinct,
    follows_guest,
)
from chainmerge.qcow2.header import MAX_CLUSTER_BITS, SECTOR
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import DEFAULT_WINDOW, iter_extents
from chainmerge.qcow2.readable import Readable
from chainmerge.qcow2.remembered import Walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


I32Array: TypeAlias = npt.NDArray[np.int32]

NO_LAYER = -1
COMPARE_BLOCK = 4 << 20
# What all layers together say about one piece of the disk is held at a time: so many runs, and
# no more than one portion of one layer beyond that. To decide among them takes below 80 MiB.
RUNS_AT_ONCE = 256 << 10
# A piece ends where clusters of every size end, so that none is read or unpacked twice.
PIECE_ALIGNMENT = 1 << MAX_CLUSTER_BITS
RAW_EXTENTS_AT_ONCE = 16 << 10


class Layer(Protocol):
    """One image of a chain, without its backing file."""

    @property
    def name(self) -> str:
        """What messages call the image."""

    @property
    def virtual_size(self) -> int:
        """Bytes of the guest's disk as this image has it."""

    @property
    def source(self) -> Readable:
        """The file that host offsets refer to."""

    def iter_extents(self, start: int, end: int, window: int) -> Iterator[Extents]:
        """As :func:`chainmerge.qcow2.mapping.iter_extents`."""

    def read_data(self, host: int, length: int) -> bytes:
        """Read DATA from the file."""

    def read_compressed(self, host: int, csize: int) -> bytes:
        """Read a COMPRESSED cluster as a whole."""

    @property
    def cluster_size(self) -> int:
        """Bytes; guest offsets of compressed clusters are multiples of it."""


@runtime_checkable
class OpenFile(Protocol):
    """A readable that is a file of the operating system."""

    @property
    def fd(self) -> int:
        """The open file."""

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode, equal for all names of one file."""


@dataclass(frozen=True, slots=True)
class Qcow2Layer:
    """A qcow2 image as a layer."""

    image: Qcow2Image
    source: Readable
    walk: Walk = iter_extents
    """How the image's tables are read."""

    @property
    def name(self) -> str:
        """What messages call the image."""
        return self.image.name

    @property
    def virtual_size(self) -> int:
        """Bytes of the guest's disk as this image has it."""
        return self.image.header.virtual_size

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.image.header.cluster_size

    def iter_extents(self, start: int, end: int, window: int) -> Iterator[Extents]:
        """What the image's tables say."""
        return self.walk(self.image, start, end, window=window)

    def read_data(self, host: int, length: int) -> bytes:
        """Read uncompressed clusters.

        Raises:
            EncryptedContent: what would be read is not the guest's data.
        """
        self._refuse_encrypted()
        return self.source.read(host, length)

    def read_compressed(self, host: int, csize: int) -> bytes:
        """Read one compressed cluster.

        Raises:
            DecompressionFailed: it is damaged.
            EncryptedContent: what would be read is not the guest's data.
        """
        self._refuse_encrypted()
        return decompress_cluster(self.image, host, self.source.read(host, csize))

    def _refuse_encrypted(self) -> None:
        if self.image.header.encrypted:
            raise EncryptedContent(self.image.name)


@dataclass(frozen=True, slots=True)
class RawLayer:
    """A raw image as a layer: data where the file has some, zeros where it has holes."""

    source: Readable

    @property
    def name(self) -> str:
        """What messages call the image."""
        return self.source.name

    @property
    def virtual_size(self) -> int:
        """Bytes; QEMU counts the last sector of a raw file as a whole one."""
        return -(-self.source.size // SECTOR) * SECTOR

    @property
    def cluster_size(self) -> int:
        """Raw images have sectors."""
        return SECTOR

    def iter_extents(self, start: int, end: int, window: int) -> Iterator[Extents]:
        """DATA and ZERO extents; *window* is not used."""
        del window
        end = min(end, self.virtual_size)
        batch: list[tuple[int, int]] = []
        done = start
        for extent_start, extent_end in _data_ranges(self.source, start, end):
            batch.append((extent_start, extent_end))
            if len(batch) == RAW_EXTENTS_AT_ONCE:
                yield _raw_extents(batch, done, extent_end)
                batch, done = [], extent_end
        if done < end:
            yield _raw_extents(batch, done, end)

    def read_data(self, host: int, length: int) -> bytes:
        """Read from the file."""
        return self.source.read(host, length)

    def read_compressed(self, host: int, csize: int) -> bytes:
        """Nothing in a raw image is compressed."""
        raise AssertionError(f"{self.name}: raw images are not compressed ({host}, {csize})")


def layer_of_qcow2(image: Qcow2Image, data: Readable, walk: Walk = iter_extents) -> Layer:
    """A qcow2 image whose clusters are in *data*: its own file, or its external data file."""
    return Qcow2Layer(image, data, walk)


def layer_of_raw(readable: Readable) -> Layer:
    """A raw image."""
    return RawLayer(readable)


@dataclass(frozen=True, slots=True)
class Resolved:
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


@dataclass(frozen=True, slots=True)
class GuestView:
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
        that costs is a matter of how much they say. To stop with each layer wherever another
        one's tables end takes (number of layers) x (tables of the disk) steps.
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


def first_difference(
    a: GuestView,
    b: GuestView,
    start: int = 0,
    end: int | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> int | None:
    """Find the first guest byte at which two views differ.

    What both views take from the same place of the same file, and what is zeros in both
    (no data, or a hole of the file), is not read.

    Args:
        a: one view.
        b: the other one. Where a view has ended, it counts as zeros.
        start: first guest byte to look at.
        end: guest byte after the last one; the end of the longer view if None.
        progress: called with the guest byte up to which the views are known to be equal.
        should_stop: asked before every block.

    Returns:
        Its guest offset, or None if there is none.

    Raises:
        FormatError: see :meth:`GuestView.read`.
        Interrupted: *should_stop* said so.
    """
    end = max(a.virtual_size, b.virtual_size) if end is None else end
    ours_by_layer, theirs_by_layer = _file_numbers(a, b)
    for ours, theirs in in_step(a.resolve(start, end), b.resolve(start, end)):
        for low, high in _unequal_ranges(ours, ours_by_layer, theirs, theirs_by_layer):
            if _are_holes(a, ours.clipped(low, high), b, theirs.clipped(low, high)):
                continue
            for at in range(low, high, COMPARE_BLOCK):
                if should_stop is not None and should_stop():
                    raise Interrupted("the comparison was stopped, it changes nothing")
                upto = min(at + COMPARE_BLOCK, high)
                found = _compare_block(a, ours.clipped(at, upto), b, theirs.clipped(at, upto))
                if found is not None:
                    return at + found
                if progress is not None:
                    progress(upto)
        if progress is not None:
            progress(ours.end)
    return None


def _compare_block(a: GuestView, ours: Resolved, b: GuestView, theirs: Resolved) -> int | None:
    """Offset of the first difference from the start of the block, if there is one."""
    if _are_holes(a, ours, b, theirs):
        return None
    left, right = a.read_runs(ours), b.read_runs(theirs)
    if left == right:
        return None
    unequal = np.frombuffer(left, np.uint8) != np.frombuffer(right, np.uint8)
    return int(np.argmax(unequal))


def _are_holes(a: GuestView, ours: Resolved, b: GuestView, theirs: Resolved) -> bool:
    return _is_all_holes(a, ours) and _is_all_holes(b, theirs)


def _is_all_holes(view: GuestView, runs: Resolved) -> bool:
    """Whether there is nothing to read: no data, or data clusters that the file has no data for.

    Preallocated images map terabytes to holes. QEMU trusts SEEK_DATA in the same way.
    """
    data = np.flatnonzero(runs.layer != NO_LAYER).tolist()
    return all(
        runs.kind[index] == Kind.DATA
        and _is_hole(
            view.layers[int(runs.layer[index])], int(runs.host[index]), int(runs.length[index])
        )
        for index in data
    )


def _is_hole(layer: Layer, host: int, length: int) -> bool:
    if isinstance(layer, Qcow2Layer) and layer.image.header.encrypted:
        return False
    return (
        isinstance(layer.source, OpenFile)
        and next(_data_ranges(layer.source, host, host + length), None) is None
    )


def _data_ranges(source: Readable, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and end of what is not known to be a hole of the file, ascending and disjoint.

    Other than :func:`chainmerge.storage.extents.raw_data_extents` this looks at a part of the
    file only, and takes what is not a file of the operating system for data as a whole.
    """
    end = min(end, source.size)
    while start < end:
        data, hole = start, end
        if isinstance(source, OpenFile):
            try:
                data = os.lseek(source.fd, start, os.SEEK_DATA)
                hole = os.lseek(source.fd, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end of the file
                    return
                # What the file system cannot tell may be data; reading it tells what is wrong.
        if data >= end:
            return
        hole = min(hole, end) if hole > data else end
        yield data, hole
        start = hole


def _raw_extents(data: Sequence[tuple[int, int]], start: int, end: int) -> Extents:
    """DATA at the given ranges, ZERO elsewhere from *start* to *end*."""
    edges = np.array([start, *chain.from_iterable(data), end], np.uint64)
    length = np.diff(edges)
    kind = np.full(len(length), Kind.ZERO, np.uint8)
    kind[1::2] = Kind.DATA
    host = np.where(kind == Kind.DATA, edges[:-1], np.uint64(0))
    extents = Extents(edges[:-1], length, kind, host, np.zeros(len(length), np.uint32))
    return extents.take(np.flatnonzero(length))


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
    claims = joined([nobody, *reversed(said)])
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


def joined(parts: Sequence[Resolved]) -> Resolved:
    """All runs of *parts*, one part after the other."""
    return Resolved(
        concatenated([part.extents for part in parts]),
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


def _unequal_ranges(
    ours: Resolved, our_files: IndexArray, theirs: Resolved, their_files: IndexArray
) -> list[tuple[int, int]]:
    """Ranges of guest bytes for which the tables do not tell that both views are the same.

    The files are those of :func:`_file_numbers`.
    """
    bounds = distinct(np.concatenate([ours.guest, theirs.guest]))
    left, right = ours.cut_at(bounds), theirs.cut_at(bounds)
    both_zero = (left.layer == NO_LAYER) & (right.layer == NO_LAYER)
    same_place = (left.layer != NO_LAYER) & (right.layer != NO_LAYER)
    same_place &= our_files[left.layer] == their_files[right.layer]
    same_place &= (left.kind == right.kind) & (left.host == right.host)
    same_place &= left.csize == right.csize
    steps = np.diff((~(both_zero | same_place)).astype(np.int8), prepend=0, append=0)
    edges = np.append(bounds, np.uint64(ours.end))
    starts = edges[np.flatnonzero(steps == 1)]
    ends = edges[np.flatnonzero(steps == -1)]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _file_numbers(a: GuestView, b: GuestView) -> tuple[IndexArray, IndexArray]:
    """For each layer of *a* and each of *b* a number, the same where the file is the same one."""
    numbers: dict[tuple[int, ...], int] = {}
    for layer in (*a.layers, *b.layers):
        numbers.setdefault(_identity(layer.source), len(numbers))
    ours, theirs = (
        np.array([numbers[_identity(layer.source)] for layer in view.layers], np.intp)
        for view in (a, b)
    )
    return ours, theirs


def _identity(source: Readable) -> tuple[int, ...]:
    return source.identity if isinstance(source, OpenFile) else (id(source),)
