# SPDX-License-Identifier: Apache-2.0
"""The end of a merge: re-point, delete, rename, give back, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.comparing import bitmap_difference
from chainmerge.bitmaps.sets import lasting_set
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.errors import ChainmergeError
from chainmerge.merging.deleting import delete_recorded, give_back
from chainmerge.merging.journal import record_switched
from chainmerge.merging.reporting import build_report
from chainmerge.merging.settling import SettleSteps, settle
from chainmerge.options import Direction
from chainmerge.planning.aftermath import deleted_images, going
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.live_journal import forget_live_journal
from chainmerge.records.merge_journal import JournalState, enter_state, forget_journal
from chainmerge.records.merged_record import load_merged_record, note_deleted
from chainmerge.storage.files import WritablePort

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from chainmerge.documents.merge import MergeReport
    from chainmerge.merging.job import Job


def _settle_pull(job: Job, copied: int, verified: Sequence[str]) -> MergeReport:
    """Delete what top does not need any more; no image needs another backing file."""
    top = job.facts.top
    job.request.begin_to_settle(str(top.path))
    record = load_merged_record(top.real_path)
    deleted: tuple[str, ...] = ()
    if record is not None:
        held = frozenset(image.identity for image in job.facts.merged_images)
        deleted = delete_recorded(record, held)
        note_deleted(top.real_path, record)
    warnings = [*job.plan.warnings, *_give_back(job, top.real_path, top.format)]
    result = top.real_path
    return build_report(
        job.request, job.plan, result, top.format, copied, verified, (), deleted, warnings
    )


def _give_back(job: Job, result: Path, result_format: str) -> Iterator[str]:
    shrink_to = job.plan.space.shrink_to
    return give_back(result, result_format, job.request.options, shrink_to)


def conclude(job: Job, copied: int, verified: Sequence[str]) -> MergeReport:
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
    if settled.top_is_gone:
        warnings += _drop_spent_tombstones(job, steps.result)
    enter_state(journal, JournalState.GIVE_BACK)
    warnings += _give_back(job, steps.result, job.base.format)
    forget_journal(job.base.real_path)
    forget_live_journal(job.base.real_path)
    return build_report(
        request,
        plan,
        steps.result,
        job.base.format,
        copied,
        verified,
        settled.repointed,
        settled.deleted,
        warnings,
    )


def _drop_spent_tombstones(job: Job, result: Path) -> Iterator[str]:
    """Remove the tombstones that only top needed; if that fails they stay, which is harmless."""
    if not job.base.supports_bitmaps:
        return
    lasting = lasting_set(job.bitmaps, job.plan.virtual_size_after)
    try:
        with WritablePort(result) as port:
            if bitmap_difference(Qcow2Image(port), lasting) is not None:
                replace_bitmaps(port, lasting)
    except ChainmergeError as error:
        yield f"tombstones that nothing needs any more were left: {error.sentence}"
