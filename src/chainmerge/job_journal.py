# SPDX-License-Identifier: Apache-2.0
"""What a native merge writes into its journal until base is settled."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import msgspec

from chainmerge.errors import ChainmergeError
from chainmerge.leaks import find_leaks, to_note
from chainmerge.merge_job import forget_what_was_noted
from chainmerge.options import Direction
from chainmerge.planning import EngineName, new_backing
from chainmerge.qcow2.check import check_with_references
from chainmerge.qcow2.header import SECTOR
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.identity import identify
from chainmerge.records.merge_journal import (
    JOURNAL_VERSION,
    Asked,
    Journal,
    JournalledRepoint,
    JournalState,
    digest_of,
    first_sector_of,
    forget_journal,
    journalled,
    keep_journal,
    last_change,
    load_journal,
    this_boot,
)
from chainmerge.records.merged_record import (
    forget_merged_record,
    load_merged_record,
    record_merged,
)
from chainmerge.settle import record_pull, stands_on
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chainmerge.merge_job import Job
    from chainmerge.options import MergeOptions


def asked_of(options: MergeOptions) -> Asked:
    """What is to be done in the end."""
    return Asked(options.delete, options.keep_name, options.shrink, options.discard)


@contextlib.contextmanager
def journal_kept(job: Job) -> Iterator[None]:
    """Keep a journal; where the merge ends before the switch there is none afterwards.

    Unless something of the merge is leaked then: the journal tells whose it is. Nor is there what
    was noted for a rerun, where base is what it was. No journal is kept of a pull, which has
    little to settle: its record tells of that.
    """
    if job.facts.direction is Direction.PULL:
        with _record_kept(job):
            yield
        return
    before = first_sector_of(job.base.real_path)
    keep_journal(_journal(job))
    try:
        yield
    except BaseException:
        # Where base cannot be read now, a rerun will have to tell.
        with contextlib.suppress(Exception):
            _forget_unless_switched(job)
            if first_sector_of(job.base.real_path) == before:
                forget_what_was_noted(job)
        raise


def record_switching(job: Job, new_base: Qcow2Image) -> None:
    """Record, durably, what base begins with once it is switched: the last act before that."""
    digest = digest_of(new_base.readable.read(0, SECTOR))
    keep_journal(_in_state(job, JournalState.SWITCHING, digest))


def record_switched(job: Job) -> Journal | None:
    """Record that base holds everything, verified; None where no journal is kept."""
    if job.plan.engine is not EngineName.NATIVE or job.facts.merged:
        return None
    digest = first_sector_of(job.base.real_path)
    return keep_journal(_in_state(job, JournalState.SWITCHED, digest))


@contextlib.contextmanager
def journal_of_copy(job: Job) -> Iterator[None]:
    """Keep a journal of a merge by QEMU; where it ends before base was written to, none of it.

    The journal tells which leaked clusters are QEMU's. Where base may be half written it stays.
    """
    base = job.base.real_path
    earlier = _any_journal(base)
    before = last_change(base)
    keep_journal(_journal(job))
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            if before and last_change(base) == before:
                if earlier is None:
                    forget_journal(base)
                else:
                    keep_journal(earlier)
        raise


def _any_journal(base: Path) -> Journal | None:
    with contextlib.suppress(ChainmergeError):
        return load_journal(base)
    return None


@contextlib.contextmanager
def _record_kept(job: Job) -> Iterator[None]:
    """Keep a record of a pull; where it ends before the switch it is what it was before."""
    top = job.result.real_path
    earlier = load_merged_record(top)
    record_pull(job.facts, job.plan, to_note(job.leaks.kept))
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            if not _has_new_backing(job) and not _leaks_of(job):
                if earlier is None:
                    forget_merged_record(top)
                else:
                    record_merged(top, earlier)
        raise
    record_pull(job.facts, job.plan, None)


def _has_new_backing(job: Job) -> bool:
    named = new_backing(job.facts)
    return stands_on(job.result.real_path, None if named is None else named[0])


def _forget_unless_switched(job: Job) -> None:
    base = job.base.real_path
    journal = load_journal(base)
    if journal is not None and journal.first_sector != first_sector_of(base):
        _forget_unless_leaking(job)


def _forget_unless_leaking(job: Job) -> None:
    if not _leaks_of(job):
        forget_journal(job.base.real_path)


def _leaks_of(job: Job) -> int:
    """How many clusters of the result this merge has leaked, as far as it is known."""
    with FileReadable(job.result.real_path) as readable:
        if job.result.header is None:
            return 0
        image = Qcow2Image(readable)
        return find_leaks(image, *check_with_references(image), job.leaks.kept).ours


def _in_state(job: Job, state: JournalState, digest: str) -> Journal:
    return msgspec.structs.replace(_journal(job), state=state, first_sector=digest)


def _journal(job: Job) -> Journal:
    plan, facts = job.plan, job.facts
    return Journal(
        version=JOURNAL_VERSION,
        engine=plan.engine,
        base=identify(job.base.real_path),
        overlays=[journalled(image.real_path) for image in facts.merged_images],
        children=[identify(child.real_path) for child in facts.relatives.children],
        asked=asked_of(job.request.options),
        repoint=[
            JournalledRepoint(os.path.realpath(one.child), one.new_backing, one.new_format)
            for one in plan.repoint
        ],
        delete=[os.path.realpath(path) for path in plan.delete],
        rename=[os.path.realpath(path) for path in plan.rename or ()],
        spent=[
            decision.name
            for decision in job.bitmaps.decisions
            if decision.tombstone_while_top_exists and not decision.tombstone
        ],
        boot=this_boot(),
        # Raw images have no place for a second copy.
        placement="" if job.base.header is None else plan.space.placement,
        leaked_before=to_note(job.leaks.kept),
    )
