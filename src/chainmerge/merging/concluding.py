# SPDX-License-Identifier: Apache-2.0
"""The end of a merge: re-point, delete, rename, give back, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.sets import spent_names
from chainmerge.merging.deleting import delete_recorded, give_back
from chainmerge.merging.journal import record_switched
from chainmerge.merging.reporting import build_report
from chainmerge.merging.settling import SettleSteps, settle
from chainmerge.merging.tombstones import drop_tombstones
from chainmerge.options import Direction
from chainmerge.planning.aftermath import deleted_images, going
from chainmerge.records.live_journal import forget_live_journal
from chainmerge.records.merge_journal import JournalState, enter_state, forget_journal
from chainmerge.records.merged_record import load_merged_record, note_deleted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from chainmerge.documents.merge import MergeReport
    from chainmerge.merging.job import Job


def _settle_pull(job: Job, copied: int, verified: Sequence[str]) -> MergeReport:
    """Delete what top does not need any more; no image needs another backing file."""
    top = job.facts.top
    job.request.begin_to_settle(str(top.path))
    # Of this run: it was written before the switch.
    record = load_merged_record(top.real_path)
    deleted: tuple[str, ...] = ()
    if record is not None:
        held = frozenset(image.identity for image in job.facts.merged_images)
        deleted = delete_recorded(record, held)
        note_deleted(top.real_path, record)
    warnings = [*job.plan.warnings, *_give_back(job, top.real_path, top.format)]
    return build_report(
        top.real_path,
        top.format,
        job.request.started,
        plan=job.plan,
        copied=copied,
        verified=verified,
        deleted=deleted,
        warnings=warnings,
    )


def _give_back(job: Job, result: Path, result_format: str) -> Iterator[str]:
    shrink_to = job.plan.space.shrink_to
    return give_back(result, result_format, job.request.options, shrink_to)


def conclude(job: Job, copied: int, verified: Sequence[str]) -> MergeReport:
    """Do what is left to do once the result holds everything, and report."""
    if job.facts.direction is Direction.PULL:
        return _settle_pull(job, copied, verified)
    request, facts, plan = job.request, job.facts, job.plan
    journal = record_switched(job)
    request.begin_to_settle(str(facts.base.path))
    steps = SettleSteps(
        base=facts.base,
        top=facts.top,
        repoint=plan.repoint,
        doomed=deleted_images(facts, request.options),
        keep_name=plan.rename is not None,
        above=(*facts.relatives.children, facts.top),
        going=going(facts, request.options),
    )
    settled = settle(steps, journal, job.recorded_request)
    warnings = [*plan.warnings, *settled.warnings]
    journal = enter_state(settled.journal, JournalState.TIDY)
    if settled.top_is_gone and job.base.supports_bitmaps:
        warnings += drop_tombstones(steps.result, spent_names(job.bitmaps))
    enter_state(journal, JournalState.GIVE_BACK)
    warnings += _give_back(job, steps.result, job.base.format)
    forget_journal(job.base.real_path)
    forget_live_journal(job.base.real_path)
    return build_report(
        steps.result,
        job.base.format,
        request.started,
        plan=plan,
        copied=copied,
        verified=verified,
        repointed=settled.repointed,
        deleted=settled.deleted,
        renamed=plan.rename,
        warnings=warnings,
    )
