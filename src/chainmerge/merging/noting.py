# SPDX-License-Identifier: Apache-2.0
"""The line that a merge leaves in this host's history, once everything else is done.

The database is loaded only then. Nothing that concerns it is raised.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.plan import MergePlan, Progress
from chainmerge.planning.workload import effort_of, storages_of

if TYPE_CHECKING:
    from chainmerge.documents.disks import DiskReport
    from chainmerge.documents.merge import MergeReport
    from chainmerge.options import LiveOptions, MergeOptions

_MERGED: Final = "merged"
_FINISHED: Final = "finished"


class BegunMerge(Struct, frozen=True):
    """A merge that is about to be done, and where: its images may have gone when it has been.

    Attributes:
        plan: What was decided.
        storage: Where its images lie.
        live: Whether a running VM merges.
        bandwidth: As of the options.
    """

    plan: MergePlan
    storage: str
    live: bool
    bandwidth: int | None


def begun_merge(
    plan: MergePlan | None, options: MergeOptions | LiveOptions, *, live: bool = False
) -> BegunMerge | None:
    """What is known of a merge beforehand; None if nothing of it is to be kept.

    That is so where an earlier run has left nothing to plan, too.
    """
    if plan is None or not options.history:
        return None
    storage = storages_of(plan)
    return None if storage is None else BegunMerge(plan, storage, live, options.bandwidth)


def note_merged(begun: BegunMerge | None, report: MergeReport) -> None:
    """Keep a line about a merge that was done."""
    if begun is None or report.outcome is not MergeOutcome.MERGED:
        return
    is_new = begun.plan.progress is Progress.NEW
    outcome = _MERGED if is_new else _FINISHED
    _add(begun, outcome, report.seconds, report.copy_seconds)


def note_failed(begun: BegunMerge | None, code: str) -> None:
    """Keep a line about a merge that ended with the error of that code."""
    if begun is not None:
        _add(begun, code, None, 0.0)


def note_disk(begun: BegunMerge | None, disk: DiskReport) -> None:
    """Keep a line about what became of one of several disks; none if it was not begun."""
    if disk.report is not None:
        note_merged(begun, disk.report)
    elif disk.error is not None:
        note_failed(begun, disk.error.code)


def _add(begun: BegunMerge, outcome: str, seconds: float | None, copy_seconds: float) -> None:
    # Imported where it is used: nothing that a merge needs waits for a database. Some builds of
    # Python come without it.
    try:
        from chainmerge.records.history import MergeLine, add_merge  # noqa: PLC0415
    except ImportError:
        return
    plan = begun.plan
    effort = effort_of(plan)
    add_merge(
        MergeLine(
            at=int(time.time()),
            storage=begun.storage,
            engine=plan.engine,
            verify=plan.verify,
            live=begun.live,
            outcome=outcome,
            direction=plan.directions.chosen,
            images=len(plan.images),
            merged=len(plan.merged_images),
            bytes_copied=effort.bytes_copied,
            bytes_shared=plan.shared_bytes,
            clusters=effort.clusters,
            bytes_freed=plan.freed_bytes,
            bandwidth=begun.bandwidth,
            seconds=seconds,
            copy_seconds=copy_seconds,
        )
    )
