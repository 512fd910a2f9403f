# SPDX-License-Identifier: Apache-2.0
"""A merge into a raw image: data and zeros straight to where the guest has them.

A raw image has no tables that could be switched, so this is always in place. The images
above hide every byte that is written until the merge is done, so the guest's view through
top never changes, and a run that was interrupted is simply done again.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.distinct import distinct
from chainmerge.chain.layers import layer_of_raw
from chainmerge.chain.view import NO_LAYER, GuestView, Resolved, joined_resolved
from chainmerge.engines.metadata.errors import NotEnoughSpace
from chainmerge.engines.metadata.steps import StepName
from chainmerge.engines.native.errors import MergeNotWritten, cause_of
from chainmerge.engines.native.moves import Segments, by_source, items_of, moves_into
from chainmerge.engines.native.origins import TracedView, trace_of
from chainmerge.errors import Failed, Refused
from chainmerge.qcow2.extents import Kind
from chainmerge.storage.file_space import ByteRanges, united

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chainmerge.arithmetic.arrays import I64Array
    from chainmerge.engines.metadata.steps import Port
    from chainmerge.engines.native.moves import Moves
    from chainmerge.storage.transfer.copying import Transfer


class RawCommit(Struct, frozen=True):
    """A merge of the images above a raw base down into it.

    Attributes:
        chain: The view of the whole chain, from the root to top.
        base_index: Which of its layers base is.
        size_after: Bytes of the guest's disk after the merge.
    """

    chain: GuestView
    base_index: int
    size_after: int


def commit_to_raw(
    port: Port, job: RawCommit, transfer: Transfer, at_the_end: Callable[[GuestView], None]
) -> int:
    """Write the merge; returns how many bytes of guest data that was.

    Args:
        port: Base's file or device. The caller holds the locks.
        job: What to write.
        transfer: Moves data into the port.
        at_the_end: Verifies base's view.

    Raises:
        NotEnoughSpace: a device is too small; nothing was changed.
        MergeNotWritten, Interrupted: base may hold a part of the data, which top hides.
    """
    if port.is_block_device and port.size < job.size_after:
        raise NotEnoughSpace(port.name, job.size_after - port.size)
    moved = 0
    origins: list[Moves] = []
    with _writing(port):
        if port.size < job.size_after:
            port.truncate_to(job.size_after)
        above = GuestView(job.chain.layers[job.base_index + 1 :])
        own = None if port.is_block_device else GuestView((job.chain.layers[job.base_index],))
        for runs in above.resolve():
            segments = _to_write(runs, own)
            if not len(segments.guest):
                continue
            moves = by_source(moves_into(segments, runs, job.base_index + 1, _never_asked))
            transfer.move(items_of(moves, job.chain))
            origins.append(moves)
            moved += int(moves.length.sum())
        port.flush()
        transfer.verify()
    port.forget_cached()
    layers = list(job.chain.layers)
    layers[job.base_index] = layer_of_raw(port)
    at_the_end(TracedView(tuple(layers), job.base_index, job.base_index, trace_of(origins)))
    return moved


def data_ranges(above: GuestView, kinds: Sequence[Kind]) -> ByteRanges:
    """Where a raw image is going to be written with what *above* has of these kinds."""
    starts: list[tuple[I64Array, I64Array]] = []
    for runs in above.resolve():
        chosen = np.isin(runs.kind, [int(kind) for kind in kinds])
        start = runs.guest[chosen].astype(np.int64)
        starts.append((start, start + runs.length[chosen].astype(np.int64)))
    return united(starts)


def _to_write(runs: Resolved, own: GuestView | None) -> Segments:
    """What the images above say anything about, without zeros where a file has holes.

    Args:
        runs: What they say.
        own: Base's own view as it was, of a file. A device may have been extended since.
    """
    said = runs.kind != Kind.UNALLOCATED
    zero = said & (runs.layer == NO_LAYER)
    if own is None or not zero.any():
        return Segments(runs.guest[said], runs.length[said], runs.guest[said])
    below = joined_resolved(list(own.resolve(runs.start, runs.end)))
    bounds = distinct(np.concatenate([runs.guest, below.guest]))
    above, below = runs.cut_at(bounds), below.cut_at(bounds)
    both_zero = (above.layer == NO_LAYER) & (below.layer == NO_LAYER)
    chosen = (above.kind != Kind.UNALLOCATED) & ~both_zero
    return Segments(above.guest[chosen], above.length[chosen], above.guest[chosen])


def _never_asked(start: int, end: int) -> Resolved:
    raise AssertionError(f"nothing is open from {start} to {end}")


@contextlib.contextmanager
def _writing(port: Port) -> Iterator[None]:
    try:
        yield
    except (OSError, Failed, Refused) as error:
        raise MergeNotWritten(port.name, StepName.FILL, cause_of(error, port.name)) from error
