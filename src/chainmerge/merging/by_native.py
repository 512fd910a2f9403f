# SPDX-License-Identifier: Apache-2.0
"""A merge by the native engine: written beside the old tree, verified, switched."""

from __future__ import annotations

import contextlib
import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from chainmerge.bitmaps.sets import bitmaps_to_store, bitmaps_without_stale, result_set
from chainmerge.chain.reading import open_for_writing
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.engines.native.commit import Backing, Commit, commit_natively, cut_to_image_end
from chainmerge.engines.native.raw import RawCommit, commit_to_raw
from chainmerge.engines.native.survey import new_tree
from chainmerge.errors import ChainmergeError
from chainmerge.merging.extending import extended
from chainmerge.merging.job import (
    Merged,
    leaks_reclaimed,
    note_what_base_lacks,
    unfinished_where_refused,
)
from chainmerge.merging.journal import CopyNotes, journal_kept, record_switching
from chainmerge.merging.reported_transfer import ReportedTransfer
from chainmerge.merging.verifying import (
    verify_bitmaps,
    verify_content,
    verify_refcounts,
    verify_soundness,
)
from chainmerge.options import Direction
from chainmerge.planning.aftermath import new_backing
from chainmerge.planning.choices import shares_extents
from chainmerge.planning.space.native import mapped_disk
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.allocation import STAT_BLOCK
from chainmerge.storage.transfer.copying import ReadBack, ZeroedSpace, transfer_into
from chainmerge.storage.volume_facts import VolumeKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.chain.view import GuestView
    from chainmerge.merging.job import Job
    from chainmerge.qcow2.references import ReferenceCounts
    from chainmerge.storage.files import WritablePort

_READ_BACK: Final = MappingProxyType({"full": ReadBack.COMPARED, "metadata": ReadBack.OMITTED})
_WORDS_FOR_READ_BACK: Final = MappingProxyType(
    {
        ReadBack.COMPARED: "guest data read back, where it was copied, and compared with checksums",
        ReadBack.OMITTED: "guest data flushed, not read back",
    }
)


def merge_natively(job: Job) -> Merged:
    """Merge; returns what was moved and verified."""
    with journal_kept(job), _enough_space(job), leaks_reclaimed(job), _room_made(job):
        if job.facts.direction is Direction.COMMIT:
            note_what_base_lacks(job)
        with open_for_writing(job.result) as port:
            if job.result.header is None:
                return _merge_into_raw(job, port)
            return _merge_into_qcow2(job, port)


@contextlib.contextmanager
def _enough_space(job: Job) -> Iterator[None]:
    """Make a volume large enough. In a file the engine reserves just the clusters it takes."""
    if job.facts.volume.kind is VolumeKind.FILE and job.result.header is not None:
        yield
        return
    with extended(job):
        yield


@contextlib.contextmanager
def _room_made(job: Job) -> Iterator[None]:
    """Have stale bitmaps out by a switch of their own, where the plan needs their clusters."""
    if not job.plan.space.prune_first:
        yield
        return
    job.request.announce(Stage.PRUNE)
    with open_for_writing(job.result) as port:
        remaining = bitmaps_without_stale(Qcow2Image(port), job.bitmaps, job.facts.direction)
        if remaining is not None:
            replace_bitmaps(port, remaining)
    with contextlib.nullcontext() if remaining is None else unfinished_where_refused(job):
        yield


def _merge_into_qcow2(job: Job, port: WritablePort) -> Merged:
    # What was known of the header is not so any more where bitmaps were taken out.
    known = None if job.plan.space.prune_first else job.result.header
    image = Qcow2Image(port, known)
    placement = job.plan.space.placement
    disk = mapped_disk(job.target, image, job.facts.direction)
    stored = bitmaps_to_store(image, job.bitmaps, disk)
    need = job.needs[placement]
    work = Commit(
        image=image,
        chain=job.opened.view(),
        base_index=job.target.base_index,
        tree=new_tree(image.name, disk, need, stored),
        zeroes=job.zeroes,
        backing=_new_backing(job),
        placement=placement,
        shares_extents=shares_extents(job.opened, job.target.base_index, disk.direction),
    )
    verified: list[str] = []
    counted: list[ReferenceCounts] = []

    def before_switch(new_image: Qcow2Image, merged: GuestView) -> None:
        job.request.announce(Stage.VERIFY)
        counted.append(verify_soundness(new_image))
        if job.result.supports_bitmaps:
            final = result_set(job.bitmaps, disk.size_after, disk.direction)
            verified.append(verify_bitmaps(new_image, final))
        verified.extend(_verify_content(job, merged))
        job.request.stop_if_asked(f"{job.result.path} is unchanged, to the last bit")
        if disk.direction is Direction.COMMIT:
            record_switching(job, new_image)

    with contextlib.closing(_transfer(job, port, need.written)) as transfer:
        outcome = commit_natively(port, work, transfer, before_switch)
    if job.facts.volume.kind is VolumeKind.FILE:
        # The merge is complete; a file that is longer than it has to be is only that.
        with contextlib.suppress(ChainmergeError):
            cut_to_image_end(port, Qcow2Image(port, outcome.header))
    with open_for_writing(job.result) as written:
        (references,) = counted
        result = Qcow2Image(written, outcome.header)
        verified.insert(0, verify_refcounts(result, references, job.leaks.kept))
    return Merged(outcome.moved, tuple(verified), transfer.copy_seconds)


def _merge_into_raw(job: Job, port: WritablePort) -> Merged:
    work = RawCommit(job.opened.view(), job.target.base_index, job.plan.virtual_size_after)
    verified: list[str] = []

    def at_the_end(merged: GuestView) -> None:
        job.request.announce(Stage.VERIFY)
        verified.extend(_verify_content(job, merged))

    movement = job.facts.movement
    total = movement.data_bytes + movement.zero_bytes + movement.compressed_bytes
    with contextlib.closing(_transfer(job, port, total, _zeroed_space(port))) as transfer:
        moved = commit_to_raw(port, work, transfer, at_the_end)
    return Merged(moved, tuple(verified), transfer.copy_seconds)


def _new_backing(job: Job) -> Backing | None:
    if job.facts.direction is Direction.COMMIT:
        return None
    named = new_backing(job.facts)
    return Backing(None, None) if named is None else Backing(*named)


def _zeroed_space(port: WritablePort) -> ZeroedSpace:
    """A raw image that is preallocated stays so; another one does not grow by zeros."""
    status = os.fstat(port.fd)
    sparse = status.st_blocks * STAT_BLOCK < status.st_size
    return ZeroedSpace.GIVEN_BACK if sparse else ZeroedSpace.KEPT


def _transfer(
    job: Job, port: WritablePort, total: int, zeroed: ZeroedSpace = ZeroedSpace.KEPT
) -> ReportedTransfer:
    request = job.request
    request.announce(Stage.COPY)
    notes = CopyNotes(job)

    def on_progress(done: int) -> None:
        request.report(ProgressEvent(Stage.COPY, done, total))
        notes.update(done, total)

    transfer = transfer_into(
        port,
        on_progress=on_progress,
        should_stop=request.should_stop,
        bandwidth=request.options.bandwidth,
        read_back=_READ_BACK[request.options.verify],
        zeroed=zeroed,
    )
    return ReportedTransfer(transfer, request.report)


def _verify_content(job: Job, merged: GuestView) -> Iterator[str]:
    yield _WORDS_FOR_READ_BACK[_READ_BACK[job.request.options.verify]]
    if job.request.options.verify != "full":
        return
    expected = job.opened.view()
    yield verify_content(
        str(job.result.path),
        merged,
        expected,
        _progress_of(job, expected.virtual_size),
        job.request.should_stop,
    )


def _progress_of(job: Job, size: int) -> Callable[[int], None]:
    return lambda done: job.request.report(ProgressEvent(Stage.VERIFY, done, size))
