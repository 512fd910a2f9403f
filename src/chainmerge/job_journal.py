# SPDX-License-Identifier: Apache-2.0
"""What a native merge writes into its journal until base is settled."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import msgspec

from chainmerge.errors import Refused
from chainmerge.merge_job import forget_what_was_noted
from chainmerge.options import Direction, Placement
from chainmerge.planning import EngineName
from chainmerge.qcow2.header import SECTOR
from chainmerge.records.identity import identify, this_boot
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
    load_journal,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.merge_job import Job
    from chainmerge.options import MergeOptions
    from chainmerge.qcow2.image import Qcow2Image


def asked_of(options: MergeOptions) -> Asked:
    """What is to be done in the end."""
    return Asked(options.delete, options.keep_name, options.shrink, options.discard)


@contextlib.contextmanager
def journal_kept(job: Job) -> Iterator[None]:
    """Keep a journal; where the merge ends before the switch there is none afterwards.

    But where data went into base in place, it stays: base is half written, and a rerun has to
    know by whom.

    Nor is there what was noted for a rerun, where base is what it was. No journal is kept of a
    pull, which has little to settle: its record tells of that.
    """
    if job.facts.direction is Direction.PULL:
        yield
        return
    before = first_sector_of(job.base.real_path)
    keep_journal(_journal(job))
    try:
        yield
    except BaseException as error:
        # Where base cannot be read now, a rerun will have to tell.
        with contextlib.suppress(Exception):
            if isinstance(error, Refused) or not _writes_in_place(job):
                _forget_unless_switched(job)
            if first_sector_of(job.base.real_path) == before:
                forget_what_was_noted(job)
        raise


def record_switching(job: Job, new_base: Qcow2Image) -> None:
    """Record, durably, what base begins with once it is switched: the last act before that."""
    digest = digest_of(new_base.readable.read(0, SECTOR))
    switching = _in_state(job, JournalState.SWITCHING, digest)
    old = first_sector_of(job.base.real_path)
    keep_journal(msgspec.structs.replace(switching, old_sector=old))


def record_switched(job: Job) -> Journal | None:
    """Record that base holds everything, verified; None where no journal is kept."""
    if job.plan.engine is not EngineName.NATIVE or job.facts.merged:
        return None
    digest = first_sector_of(job.base.real_path)
    return keep_journal(_in_state(job, JournalState.SWITCHED, digest))


def _writes_in_place(job: Job) -> bool:
    return job.base.header is None or job.plan.space.placement is Placement.IN_PLACE


def _forget_unless_switched(job: Job) -> None:
    base = job.base.real_path
    journal = load_journal(base)
    if journal is not None and journal.first_sector != first_sector_of(base):
        forget_journal(base)


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
        request=job.recorded_request,
    )
