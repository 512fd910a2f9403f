# SPDX-License-Identifier: Apache-2.0
"""The end of a merge: re-point, delete, rename, give back, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.sets import spent_names
from chainmerge.merging.deleting import delete_recorded, give_back, gives_back
from chainmerge.merging.journal import record_switched
from chainmerge.merging.live_remains import forget_live_pull
from chainmerge.merging.reporting import build_report
from chainmerge.merging.settling import SettleSteps, release_volumes, settle
from chainmerge.merging.tombstones import drop_tombstones
from chainmerge.options import Direction
from chainmerge.planning.aftermath import deleted_images, going
from chainmerge.records.live_journal import forget_live_journal
from chainmerge.records.merge_journal import Journal, JournalState, enter_state, forget_journal
from chainmerge.records.merged_record import load_merged_record, note_deleted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.documents.merge import MergeReport
    from chainmerge.documents.plan import MergePlan
    from chainmerge.merging.job import Job, Merged, Request


def _settle_pull(job: Job, merged: Merged) -> MergeReport:
    """Delete what top does not need any more; no image needs another backing file."""
    top = job.facts.top
    job.request.begin_to_settle(str(top.path))
    # Of this run: it was written before the switch.
    record = load_merged_record(top.real_path)
    deleted: tuple[str, ...] = ()
    if record is not None:
        held = frozenset(image.identity for image in job.facts.merged_images)
        release_volumes(job.facts.merged_images if record.delete else (), job.locks)
        deleted = delete_recorded(record, held)
        note_deleted(top.real_path, record)
    forget_live_pull(top.real_path)
    give = give_back(top.real_path, top.format, job.request.options, job.plan.space.shrink_to)
    return build_report(
        top.real_path,
        top.format,
        job.request.started,
        plan=job.plan,
        copied=merged.copied,
        copy_seconds=merged.copy_seconds,
        verified=merged.verified,
        deleted=deleted,
        warnings=(*job.plan.warnings, *give),
    )


def conclude(job: Job, merged: Merged) -> MergeReport:
    """Do what is left to do once the result holds everything, and report."""
    if job.facts.direction is Direction.PULL:
        return _settle_pull(job, merged)
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
        spent=spent_names(job.bitmaps),
        shrink_to=plan.space.shrink_to,
        locks=job.locks,
    )
    return settle_to_the_end(
        request,
        steps,
        journal,
        merged.verified,
        plan=plan,
        copied=merged.copied,
        copy_seconds=merged.copy_seconds,
    )


def settle_to_the_end(
    request: Request,
    steps: SettleSteps,
    journal: Journal | None,
    verified: Sequence[str],
    *,
    plan: MergePlan | None = None,
    copied: int = 0,
    copy_seconds: float = 0.0,
) -> MergeReport:
    """Do what is left of a commit whose base holds everything, and report.

    *verified*, *plan*, *copied* and *copy_seconds* are as :func:`build_report` takes them. Raises
    what :func:`settle` raises.
    """
    base = steps.base
    settled = settle(steps, journal, request.recorded(base.path))
    warnings = [*(() if plan is None else plan.warnings), *settled.warnings]
    left = settled.journal
    if settled.top_is_gone and base.supports_bitmaps:
        left = enter_state(left, JournalState.TIDY)
        warnings += drop_tombstones(steps.result, steps.spent)
    if gives_back(base.format, request.options):
        enter_state(left, JournalState.GIVE_BACK)
    warnings += give_back(steps.result, base.format, request.options, steps.shrink_to)
    forget_journal(base.real_path)
    forget_live_journal(base.real_path)
    # There is nothing to pull into top any more.
    forget_live_pull(steps.top.real_path)
    return build_report(
        steps.result,
        base.format,
        request.started,
        plan=plan,
        copied=copied,
        copy_seconds=copy_seconds,
        verified=verified,
        repointed=settled.repointed,
        deleted=settled.deleted,
        renamed=(str(base.path), str(steps.top.path)) if steps.keep_name else None,
        warnings=warnings,
    )
