# SPDX-License-Identifier: Apache-2.0
"""What top needs at most for a pull by the QEMU of a running VM.

QEMU's job (7.2 to 10.0, block/stream.c, block/io.c) takes up to 512 KiB at a time of what top
lacks and the images below have. Where all of that reads as zeros it becomes zero clusters;
otherwise it is written as data, zeros included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.arrays import BoolArray, U8Array, U64Array
from chainmerge.arithmetic.distinct import distinct
from chainmerge.chain.view import in_step
from chainmerge.options import Placement
from chainmerge.planning.leaks import NO_LEAKS, counted_as_used, find_leaks, leaked_before
from chainmerge.planning.space.arrivals import BaseFacts, count_arrivals
from chainmerge.planning.space.figures import SpaceSurvey, facts_of_need, without_figures
from chainmerge.planning.space.need import BitmapShape, MergeDemand, space_need
from chainmerge.planning.space.qemu import allocated_where_written, host_layout
from chainmerge.qcow2.check import check_with_references
from chainmerge.qcow2.mapping import Kind
from chainmerge.qcow2.runs import NO_RUNS
from chainmerge.storage.file_space import NO_RANGES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.chain.view import Resolved

_AT_ONCE: Final = 512 << 10


def survey_pull_for_live(
    target: Target, opened: OpenChain, stored: Sequence[BitmapShape], *, guest_writes: bool
) -> SpaceSurvey:
    """Work out how large top must be for a pull by the QEMU of a running VM.

    An upper bound for what is on disk already; a guest that writes to top can add to it.

    Args:
        target: the pull.
        opened: its images.
        stored: the bitmaps that top has in the end.
        guest_writes: whether the guest writes to top: then what is on disk may be changed while
            it is read, and nothing is said about whether it is sound.
    """
    top = opened.images[-1]
    assert top.image is not None
    image = top.image
    report, references = check_with_references(image)
    if not (report.sound or guest_writes):
        return without_figures(report, None)
    leaks = NO_LEAKS
    if not guest_writes:
        leaks = find_leaks(image, report, references, leaked_before(top.info.real_path))
    layout = host_layout(image, counted_as_used(references, leaks.leaked).counts)
    size = image.header.virtual_size
    about = BaseFacts(image.name, image.header, target.chain.base.virtual_size, layout.shared)
    own = opened.view(len(opened.images) - 1)
    arrivals = count_arrivals(about, image.l1, _coming_up(target, opened), own.resolve(), size)
    demand = MergeDemand(
        header=image.header,
        layout=layout,
        old_bitmaps=NO_RUNS,
        prunes=False,
        stand_ins=(),
        final_bitmaps=tuple(stored),
        arrivals=arrivals,
        virtual_size_after=size,
    )
    space = replace(
        facts_of_need(space_need(demand)),
        new_clusters=arrivals.likely_clusters,
        new_l2_tables=arrivals.l2_tables,
    )
    space = replace(space, allocates=allocated_where_written(top, space, lambda: NO_RANGES))
    check = None if guest_writes else report
    return SpaceSurvey({Placement.IN_PLACE: space}, {}, check, None, leaks)


class _Arriving(Struct, frozen=True):
    """Runs of the disk that come up, as :class:`chainmerge.planning.space.arrivals.MappedRuns`."""

    guest: U64Array
    length: U64Array
    kind: U8Array
    host: U64Array


def _coming_up(target: Target, opened: OpenChain) -> Iterator[_Arriving]:
    """What top lacks and the images below have, from the guest's byte 0 to its end."""
    size, last = target.chain.top.virtual_size, len(opened.images) - 1
    top = opened.view(last).resolve(0, size)
    merged = opened.view(target.base_index, last).resolve(0, size)
    for upper, lower in in_step(top, merged):
        bounds = distinct(np.concatenate([upper.guest, lower.guest]))
        above, below = upper.cut_at(bounds), lower.cut_at(bounds)
        yield _as_written(above.kind == Kind.UNALLOCATED, below)


def _as_written(lacking: BoolArray, below: Resolved) -> _Arriving:
    """Zeros that are taken together with data become data: as much as is taken at a time."""
    zero = (below.kind == Kind.ZERO) | (below.kind == Kind.ZERO_ALLOCATED)
    kind = np.where(lacking, below.kind, Kind.UNALLOCATED).astype(np.uint8)
    kind[lacking & zero] = Kind.DATA
    long = lacking & zero & (below.length > 2 * _AT_ONCE)
    guest, length = below.guest[long], below.length[long]
    # Of a long run of zeros only both ends can become data.
    starts = np.concatenate([below.guest, guest + _AT_ONCE, guest + length - _AT_ONCE])
    kinds = np.concatenate(
        [kind, np.full(len(guest), Kind.ZERO, np.uint8), np.full(len(guest), Kind.DATA, np.uint8)]
    )
    order = np.argsort(starts, kind="stable")
    starts, kinds = starts[order].astype(np.uint64), kinds[order]
    end = np.uint64(int(below.guest[-1]) + int(below.length[-1]))
    lengths = np.diff(np.append(starts, end))
    return _Arriving(starts, lengths, kinds, np.zeros(len(starts), np.uint64))
