# SPDX-License-Identifier: Apache-2.0
"""The first byte at which two views differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.arithmetic.distinct import distinct
from chainmerge.chain.layers import Layer, OpenFile, Qcow2Layer, stored_ranges
from chainmerge.chain.view import NO_LAYER, GuestView, Resolved, in_step
from chainmerge.errors import Interrupted
from chainmerge.qcow2.extents import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.arithmetic.arrays import IndexArray
    from chainmerge.chain.opening import OpenChain
    from chainmerge.qcow2.readable import Readable

COMPARE_BLOCK = 4 << 20


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
                    raise Interrupted("the comparison was stopped; it changes nothing")
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
        and next(stored_ranges(layer.source, host, host + length), None) is None
    )


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


def base_shows_all(opened: OpenChain, base_index: int, should_stop: Callable[[], bool]) -> bool:
    """Whether the chain up to base shows what all of it shows, as far as that reaches.

    Raises FormatError, Interrupted.
    """
    below, whole = opened.view(0, base_index + 1), opened.view()
    end = whole.virtual_size
    return first_difference(below, whole, 0, end, should_stop=should_stop) is None


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
