# SPDX-License-Identifier: Apache-2.0
"""A merge whose guest data QEMU copies: bitmaps out of its reach, copy, bitmaps back in."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from chainmerge.bitmaps.comparing import bitmap_difference
from chainmerge.bitmaps.sets import final_set, stand_ins
from chainmerge.chain.opening import open_chain
from chainmerge.chain.reading import open_for_writing
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.engines.qemu import commit as qemu
from chainmerge.errors import ChainmergeError, Refused
from chainmerge.merging.deciding import find_target_of
from chainmerge.merging.errors import VerificationFailed
from chainmerge.merging.extending import extended
from chainmerge.merging.job import (
    Merged,
    bitmaps_to_save,
    forget_what_was_noted,
    leaks_reclaimed,
    unfinished_where_refused,
    wipe_behind_end,
)
from chainmerge.merging.journal import CopyNotes, journal_until_settled
from chainmerge.merging.verifying import verify_bitmaps, verify_content, verify_metadata
from chainmerge.planning.encryption import encrypted_difference, has_encrypted, image_specs
from chainmerge.planning.placement import bytes_to_copy
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.files import StateDirectoryUnusable
from chainmerge.records.identity import identify
from chainmerge.records.saved_bitmaps import SavedBitmaps, save_bitmaps, saved_bitmaps_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.target import Target
    from chainmerge.merging.job import Job


def merge_by_qemu(job: Job) -> Merged:
    """Merge; returns what was copied and verified."""
    with extended(job), journal_until_settled(job), leaks_reclaimed(job):
        _put_bitmaps_aside(job)
        with unfinished_where_refused(job):
            started = time.monotonic()
            copied = _copy(job)
            copy_seconds = time.monotonic() - started if copied else 0.0
            _store_bitmaps(job)
    return Merged(copied, tuple(_verify(job)), copy_seconds)


def _put_bitmaps_aside(job: Job) -> None:
    """Take base's bitmaps out of QEMU's reach: stale ones for good, kept ones until the end."""
    saved = bitmaps_to_save(job) if job.base.supports_bitmaps else None
    if saved is None and not job.facts.interrupted:
        _note_that_base_is_written(job)
    if not job.base.supports_bitmaps:
        return
    job.request.announce(Stage.PRUNE)
    if saved is not None:
        try:
            save_bitmaps(job.base.real_path, saved)
        except Refused as error:
            place = saved_bitmaps_file(job.base.real_path).parent
            raise StateDirectoryUnusable(str(place), error.sentence) from error
    with open_for_writing(job.base) as port:
        between = stand_ins(job.bitmaps, job.base.virtual_size)
        if bitmap_difference(Qcow2Image(port), between) is None:
            return
        try:
            replace_bitmaps(port, between)
        except Refused:
            forget_what_was_noted(job)
            raise
        if between:
            # Once more, now that the old set's clusters are free: low, so that QEMU finds
            # what is left of the volume in one piece.
            with unfinished_where_refused(job):
                replace_bitmaps(port, between)


def _note_that_base_is_written(job: Job) -> None:
    """Record, in place of saved bitmaps, who has half written base if we are killed.

    Where there is no place for it, a rerun has to be told that top is right.
    """
    nothing = SavedBitmaps(identify(job.base.real_path), identify(job.target.overlay.real_path), ())
    with contextlib.suppress(ChainmergeError, OSError):
        save_bitmaps(job.base.real_path, nothing)


def _copy(job: Job) -> int:
    """Copy guest data into base; returns how many bytes that was."""
    grows = job.facts.top.virtual_size > job.base.virtual_size
    total = bytes_to_copy(job.facts)
    if total == 0 and not grows:
        return 0
    job.request.announce(Stage.COPY)
    base = job.opened.images[job.target.base_index]
    wipe_behind_end(base, job.plan.virtual_size_after)
    notes = CopyNotes(job)

    def on_progress(progress: qemu.CopyProgress) -> None:
        job.request.report(ProgressEvent(Stage.COPY, progress.done, progress.total))
        notes.update(progress.done, progress.total)

    qemu.commit_by_daemon(
        image_specs(job.target.chain, job.request.options),
        job.target.base_index,
        [lock.share_with_child() for lock in job.locks],
        on_progress,
        job.request.should_stop,
        bandwidth=job.request.options.bandwidth,
    )
    with open_for_writing(job.base) as port:
        port.flush()
    return total


def _store_bitmaps(job: Job) -> None:
    if job.base.supports_bitmaps:
        job.request.report(ProgressEvent(Stage.BITMAPS))
        with open_for_writing(job.base) as port:
            final = final_set(job.bitmaps, job.plan.virtual_size_after)
            if bitmap_difference(Qcow2Image(port), final) is not None:
                replace_bitmaps(port, final)


def _verify(job: Job) -> Iterator[str]:
    """Read back what was written, from freshly parsed tables."""
    job.request.announce(Stage.VERIFY)
    target = find_target_of(job.request)
    with open_chain(target.chain, job.locks) as opened:
        image = opened.images[target.base_index].image
        if image is not None:
            yield verify_metadata(image, job.leaks.kept)
        if image is not None and job.base.supports_bitmaps:
            final = final_set(job.bitmaps, job.plan.virtual_size_after)
            yield verify_bitmaps(image, final)
        if job.request.options.verify == "full" and has_encrypted(target.chain):
            yield _verify_encrypted(job, target)
        elif job.request.options.verify == "full":
            size = opened.view().virtual_size
            yield verify_content(
                str(target.base.path),
                opened.view(0, target.base_index + 1),
                opened.view(),
                lambda done: job.request.report(ProgressEvent(Stage.VERIFY, done, size)),
                job.request.should_stop,
            )


def _verify_encrypted(job: Job, target: Target) -> str:
    """Compare what base and top show, as only QEMU can read it."""
    request, size = job.request, target.chain.top.virtual_size
    difference = encrypted_difference(
        target.chain, target.base_index, request.options, request.should_stop
    )
    if difference is not None:
        raise VerificationFailed(str(target.base.path), f"qemu-img compare: {difference}")
    return f"content of all {size} guest bytes compared with what top shows, by qemu-img"
