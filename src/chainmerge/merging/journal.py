# SPDX-License-Identifier: Apache-2.0
"""What a native merge writes into its journal until base is settled."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Final

import msgspec

from chainmerge.bitmaps.sets import spent_names
from chainmerge.documents.plan import EngineName
from chainmerge.errors import ChainmergeError, Refused
from chainmerge.merging.job import forget_what_was_noted
from chainmerge.merging.settling import record_pull
from chainmerge.options import Direction, Placement
from chainmerge.planning.aftermath import new_backing
from chainmerge.planning.leaks import to_note
from chainmerge.qcow2.check import check
from chainmerge.qcow2.header import SECTOR
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.runs import NO_RUNS, Runs, without_runs
from chainmerge.records.changes import last_change, stands_on
from chainmerge.records.doing import CopiedSoFar
from chainmerge.records.identity import identify, this_boot
from chainmerge.records.merge_journal import (
    JOURNAL_VERSION,
    Asked,
    Journal,
    JournalledImage,
    JournalledRepoint,
    JournalState,
    digest_of,
    first_sector_of,
    forget_journal,
    keep_journal,
    load_journal,
    save_journal,
)
from chainmerge.records.merged_record import (
    forget_merged_record,
    latest_data_written_ns,
    load_merged_record,
    record_merged,
)
from chainmerge.records.remains import may_be_written_over
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chainmerge.merging.job import Job
    from chainmerge.options import MergeOptions


# Each note waits for the storage; a copy that is done before the first one needs none.
SECONDS_BETWEEN: Final = 3.0


def asked_of(options: MergeOptions) -> Asked:
    """What is to be done in the end."""
    return Asked(options.delete, options.keep_name, options.shrink, options.discard)


@contextlib.contextmanager
def journal_kept(job: Job) -> Iterator[None]:
    """Keep a journal; where the merge ends before the switch there is none afterwards.

    Unless something of it is leaked then: the journal tells whose that is. And where data went
    into base in place, it stays: base is half written, and a rerun has to know by whom.

    Nor is there what was noted for a rerun, where base is what it was. No journal is kept of a
    pull, which has little to settle: its record tells of that.
    """
    if job.facts.direction is Direction.PULL:
        with _record_kept(job):
            yield
        return
    base = job.base.real_path
    before, changed = first_sector_of(base), last_change(base)
    keep_journal(_journal(job))
    try:
        yield
    except BaseException as error:
        # Where base cannot be read now, a rerun will have to tell.
        with contextlib.suppress(Exception):
            if isinstance(error, Refused) or not _writes_in_place(job):
                _put_back_unless_switched(job, changed)
            if first_sector_of(base) == before:
                forget_what_was_noted(job)
        raise


@contextlib.contextmanager
def journal_until_settled(job: Job) -> Iterator[None]:
    """Keep a journal that tells no more than whose clusters are that are leaked.

    For who has no one moment of a switch. Where it fails, base may be half written, and the
    journal stays, unless nothing was written at all.
    """
    base = job.base.real_path
    changed = last_change(base)
    keep_journal(_journal(job))
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            if _is_unwritten_since(base, changed):
                _put_back_journal(job, changed)
        raise


def record_switching(job: Job, new_base: Qcow2Image) -> None:
    """Record, durably, what base begins with once it is switched: the last act before that."""
    digest = digest_of(new_base.readable.read(0, SECTOR))
    switching = _in_state(job, JournalState.SWITCHING, digest)
    old = first_sector_of(job.base.real_path)
    keep_journal(msgspec.structs.replace(switching, old_sector=old))


def record_switched(job: Job) -> Journal | None:
    """Record that base holds everything, verified; None if no journal is kept."""
    if job.plan.engine is not EngineName.NATIVE or job.facts.merged:
        return None
    digest = first_sector_of(job.base.real_path)
    return keep_journal(_in_state(job, JournalState.SWITCHED, digest))


@contextlib.contextmanager
def _record_kept(job: Job) -> Iterator[None]:
    """Keep a record of a pull; where it ends before the switch it is what it was before."""
    top = job.result.real_path
    earlier = job.remains.record
    options, request = job.request.options, job.recorded_request
    merged = job.facts.chain.images[job.facts.base_index :]
    written_ns = latest_data_written_ns(image.real_path for image in merged)
    record_pull(job.facts, options, to_note(job.leaks.kept), request, written_ns)
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            if not _has_new_backing(job) and not _own_leaks(job):
                if earlier is None:
                    forget_merged_record(top)
                else:
                    record_merged(top, earlier)
        raise
    record_pull(job.facts, options, None, request, written_ns)


def _has_new_backing(job: Job) -> bool:
    named = new_backing(job.facts)
    return stands_on(job.result.real_path, None if named is None else named[0])


def _is_unwritten_since(base: Path, changed: str) -> bool:
    return bool(changed) and last_change(base) == changed


def _writes_in_place(job: Job) -> bool:
    return job.base.header is None or job.plan.space.placement is Placement.IN_PLACE


def _put_back_unless_switched(job: Job, changed: str) -> None:
    base = job.base.real_path
    journal = load_journal(base)
    if journal is not None and journal.first_sector != first_sector_of(base):
        _put_back_journal(job, changed)


def _put_back_journal(job: Job, changed: str) -> None:
    """Have no journal, or the earlier one, unless this merge has leaked something.

    *changed* is when base was written to last before it; empty if unknown.
    """
    base, earlier = job.base.real_path, job.remains.journal
    if _own_leaks(job):
        return
    if earlier is not None and (_leaks_of_earlier(job) or _is_unwritten_since(base, changed)):
        keep_journal(earlier)
    else:
        forget_journal(base)


def _own_leaks(job: Job) -> int:
    """How many clusters of the result are leaked that were not when the merge began."""
    return without_runs(_leaked_now(job), job.leaks.leaked).total


def _leaks_of_earlier(job: Job) -> int:
    """How many clusters of the result are leaked that an earlier merge of ours has left."""
    return without_runs(_leaked_now(job), job.leaks.others).total


def _leaked_now(job: Job) -> Runs:
    if job.result.header is None:
        return NO_RUNS
    with FileReadable(job.result.real_path) as readable:
        return check(Qcow2Image(readable)).leaked


def _volume_size(job: Job) -> int:
    if job.base.header is not None:
        return 0
    return job.facts.end_before or job.facts.volume.size


def _in_state(job: Job, state: JournalState, digest: str) -> Journal:
    return msgspec.structs.replace(_journal(job), state=state, first_sector=digest)


def _overlay_now(job: Job, image: Path) -> JournalledImage:
    return JournalledImage(job.identities.of(image), last_change(image))


def _journal(job: Job) -> Journal:
    plan, facts = job.plan, job.facts
    return Journal(
        version=JOURNAL_VERSION,
        engine=plan.engine,
        base=identify(job.base.real_path),
        overlays=[_overlay_now(job, image.real_path) for image in facts.merged_images],
        children=[identify(child.real_path) for child in facts.relatives.children],
        asked=asked_of(job.request.options),
        repoint=[
            JournalledRepoint(os.path.realpath(one.child), one.new_backing, one.new_format)
            for one in plan.repoint
        ],
        delete=[os.path.realpath(path) for path in plan.delete],
        rename=[os.path.realpath(path) for path in plan.rename or ()],
        spent=sorted(spent_names(job.bitmaps)),
        boot=this_boot(),
        # Raw images have no place for a second copy.
        placement="" if job.base.header is None else plan.space.placement,
        request=job.recorded_request,
        volume_size=_volume_size(job),
        shrink_to=plan.space.shrink_to or 0,
        leaked_before=to_note(job.leaks.kept),
        written_over=may_be_written_over(job.remains, first_sector_of(job.base.real_path)),
    )


# How far a copy has come, for whoever asks while it runs or after a kill. No merge needs it.


class CopyNotes:
    """The notes of one copy, which begins as this is made."""

    def __init__(self, job: Job) -> None:
        """Nothing is written down yet."""
        self._job = job
        self._began = time.monotonic()
        self._next = self._began + SECONDS_BETWEEN

    def update(self, done: int, total: int) -> None:
        """Say how many bytes are copied, of how many; most of it is not written down."""
        now = time.monotonic()
        if now < self._next:
            return
        with contextlib.suppress(ChainmergeError, OSError):
            _note(self._job, CopiedSoFar(done, total, now - self._began))
        self._next = time.monotonic() + SECONDS_BETWEEN


def _note(job: Job, copied: CopiedSoFar) -> None:
    """Write it into the file that this merge keeps, and never into one that is of another."""
    ours = job.recorded_request
    if job.facts.direction is Direction.PULL:
        record = load_merged_record(job.result.real_path)
        if record is not None and record.pulled is not None and record.request == ours:
            pulled = msgspec.structs.replace(record.pulled, copied=copied)
            record_merged(job.result.real_path, msgspec.structs.replace(record, pulled=pulled))
        return
    journal = load_journal(job.base.real_path)
    if journal is not None and journal.request == ours:
        save_journal(msgspec.structs.replace(journal, copied=copied))
