# SPDX-License-Identifier: Apache-2.0
"""Zeros that are stored as data: found once, then treated as zeros.

A guest that fills its disk with zeros, or a tool that does not know of holes, leaves data
clusters that hold nothing. Looking for them takes reading all the data that moves, so it is only
done on request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import U64Array
from chainmerge.arithmetic.distinct import distinct
from chainmerge.arithmetic.rounding import round_up
from chainmerge.chain.view import NO_LAYER, GuestView, Resolved
from chainmerge.qcow2.extents import Extents, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.chain.layers import Layer

_READ_BYTES = 4 << 20


class ZeroRanges(Struct, frozen=True):
    """Ranges of the guest's disk: arrays of equal length, in bytes, ascending and disjoint."""

    start: U64Array
    end: U64Array

    @property
    def total(self) -> int:
        """Bytes in all ranges."""
        return int((self.end - self.start).sum())


def find_zeroes(view: GuestView, unit: int, before_each_read: Callable[[], None]) -> ZeroRanges:
    """Where the data of a view is zeros, in whole units. Reads all of its data.

    Args:
        view: The images that are merged.
        unit: Bytes; the unit in which the image that is written maps the disk.
        before_each_read: Called often; may raise to stop the search.

    Raises:
        ReadFailed, FormatError: the data cannot be read.
    """
    starts: list[U64Array] = []
    for runs in view.resolve():
        for index in np.flatnonzero(runs.kind == Kind.DATA).tolist():
            layer = view.layers[int(runs.layer[index])]
            guest, host = int(runs.guest[index]), int(runs.host[index])
            end = guest + int(runs.length[index])
            first = round_up(guest, unit)
            if end == view.virtual_size:
                # The last unit need not be a whole one.
                end = round_up(end, unit)
            whole = max(0, (end - first) // unit * unit)
            place = host + first - guest
            starts.extend(_zero_units(layer, first, place, whole, unit, before_each_read))
    found = np.concatenate(starts) if starts else np.zeros(0, dtype=np.uint64)
    return _as_ranges(found, unit)


def _zero_units(
    layer: Layer,
    guest: int,
    host: int,
    length: int,
    unit: int,
    before_each_read: Callable[[], None],
) -> Iterator[U64Array]:
    """Guest offsets of units that hold nothing but zeros."""
    step = max(unit, _READ_BYTES // unit * unit)
    for at in range(0, length, step):
        before_each_read()
        data = layer.read_data(host + at, min(step, length - at))
        rows = np.frombuffer(data, dtype=np.uint64).reshape(-1, unit // 8)
        zero = np.flatnonzero(~rows.any(axis=1)).astype(np.uint64)
        if len(zero):
            yield np.uint64(guest + at) + zero * np.uint64(unit)


def _as_ranges(starts: U64Array, unit: int) -> ZeroRanges:
    if not len(starts):
        return ZeroRanges(starts, starts)
    breaks = np.flatnonzero(starts[1:] != starts[:-1] + np.uint64(unit))
    heads = np.concatenate([[0], breaks + 1])
    tails = np.concatenate([breaks, [len(starts) - 1]])
    return ZeroRanges(starts[heads], starts[tails] + np.uint64(unit))


class ViewWithZeroes(GuestView, frozen=True):
    """A view in which some data is known to be zeros.

    Attributes:
        zeroes: Where.
    """

    zeroes: ZeroRanges

    def resolve(self, start: int = 0, end: int | None = None) -> Iterator[Resolved]:
        """As :meth:`GuestView.resolve`, with ZERO where the data is zeros."""
        for runs in GuestView(self.layers).resolve(start, end):
            yield _with_zeroes(runs, self.zeroes)


def _with_zeroes(runs: Resolved, zeroes: ZeroRanges) -> Resolved:
    low = np.searchsorted(zeroes.end, np.uint64(runs.start), "right")
    high = np.searchsorted(zeroes.start, np.uint64(runs.end), "left")
    if low >= high:
        return runs
    starts, ends = zeroes.start[low:high], zeroes.end[low:high]
    bounds = np.concatenate([runs.guest, starts, ends])
    inside = (bounds >= np.uint64(runs.start)) & (bounds < np.uint64(runs.end))
    cut = runs.cut_at(distinct(bounds[inside]))
    extents = cut.extents
    place = np.searchsorted(starts, extents.guest, "right") - 1
    zero = (place >= 0) & (extents.guest < ends[place]) & (extents.kind == Kind.DATA)
    changed = Extents(
        extents.guest,
        extents.length,
        np.where(zero, np.uint8(Kind.ZERO), extents.kind),
        np.where(zero, np.uint64(0), extents.host),
        extents.csize,
    )
    return Resolved(changed, np.where(zero, np.int32(NO_LAYER), cut.layer))
