# SPDX-License-Identifier: Apache-2.0
"""Whether a job may begin, by the plan that its host has made of it right before."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import msgspec

from chainmerge.documents.fleet import FleetJobOutcome
from chainmerge.fleet.chain_state import digest_of_chains
from chainmerge.fleet.outcome import JobEnding, ending_of, last_event
from chainmerge.fleet.places import base_id_of, require_admissible, require_allowed
from chainmerge.fleet.planned import plan_printed_for, work_of
from chainmerge.fleet.record import Action, RecordUnusable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.fleet.child import JobFiles, Printed
    from chainmerge.fleet.planned import PlannedWork
    from chainmerge.fleet.record import JobDisk, JobRecord
    from chainmerge.fleet.settings import HostSettings

_LEFT_TO_THE_COMMAND: Final = frozenset(
    {"image-missing", "thinning-unfinished", "unfinished-merge-below", "interrupted"}
)
"""Errors with which there is no plan, because the command has been run before: it knows by its
records what is left to do, and does nothing else."""
_NOT_AS_PLANNED: Final = frozenset({"not-in-chain", "no-backing-file"})
"""Errors of planning again that nothing but a change of the chain explains: it was planned once."""
_PARTLY_DONE: Final = "some of its disks are merged already; plan the others again"
_OWN_TRACES: Final = frozenset({Action.PRUNE, Action.REPAIR})
"""Where what a run has done before it was interrupted is nothing that its plan shows as its own.
They take away only what is of no use, whenever they run."""


def why_not(
    record: JobRecord, printed: Printed, host: HostSettings, files: JobFiles
) -> JobEnding | None:
    """Return how a job ends that must not begin; None if it may, and its plan is kept then.

    What has begun is finished by its own records, whatever a plan says now.

    Args:
        record: The job.
        printed: What planning it again has printed.
        host: This one.
        files: What children that were started for it here before have left.

    Raises OSError if the plan cannot be kept.
    """
    try:
        # It waited for its keys, and links may lead elsewhere by now.
        require_admissible(record, host)
        return _why_not(record, printed, host, files)
    except RecordUnusable as error:
        return JobEnding(FleetJobOutcome.REJECTED, message=str(error))


def _why_not(
    record: JobRecord, printed: Printed, host: HostSettings, files: JobFiles
) -> JobEnding | None:
    was_run = files.exist()
    try:
        plan = plan_printed_for(record, printed.text)
    except msgspec.DecodeError:
        return _without_plan(record, printed, was_run=was_run)
    work = work_of(plan, record.action, [disk.base for disk in record.disks])
    has_begun = not work.is_new or (was_run and record.action in _OWN_TRACES)
    if work.is_partly_done and not was_run:
        # By somebody else, or by a run that has ended: no digest is of what is left.
        reason = _PARTLY_DONE
    else:
        reason = "" if has_begun else _changed(record, work, files.plan_digest())
    if reason:
        return JobEnding(FleetJobOutcome.PLAN_CHANGED, message=reason)
    for path in work.changed:
        require_allowed(path, host)
    files.keep_plan_digest(work.digest)
    return None


def _without_plan(record: JobRecord, printed: Printed, *, was_run: bool) -> JobEnding | None:
    lines = printed.text.decode("utf-8", "replace").splitlines()
    if was_run:
        return None
    error = last_event(lines)
    if error.get("code") in _NOT_AS_PLANNED:
        return JobEnding(FleetJobOutcome.PLAN_CHANGED, message=str(error.get("message")))
    if error.get("code") in _LEFT_TO_THE_COMMAND:
        # What is left of one disk, its records say. Another one that is whole has none.
        is_some_left = len(record.disks) > 1 and any(map(_is_whole, record.disks))
        if is_some_left:
            return JobEnding(FleetJobOutcome.PLAN_CHANGED, message=_PARTLY_DONE)
        return None
    died = f"planning it again ended with status {printed.status}, and without a plan"
    return ending_of(lines, printed.status) or JobEnding(
        FleetJobOutcome.FAILED, printed.status, message=died
    )


def _is_whole(disk: JobDisk) -> bool:
    return os.path.lexists(disk.top) and os.path.lexists(disk.base)


def _is_in_chain(disk: JobDisk, chain: Sequence[str]) -> bool:
    """Whether a job holds an image of its chain, whatever that is called there."""
    return any(base_id_of(path) == disk.base_id for path in chain)


def _changed(record: JobRecord, work: PlannedWork, begun_with: str) -> str:
    """What is not as it was when the job was planned; empty if all is.

    *begun_with* is the digest of the plan with which a child was first started, if one was.
    """
    if record.action is Action.THIN_OUT and not _is_in_chain(record.disks[0], work.chains[0]):
        return f"{record.disks[0].base} is no image of the chain of {record.disks[0].top}"
    for disk, held in zip(record.disks, work.held, strict=False):
        if not disk.held_ids.issuperset(map(base_id_of, held)):
            return f"{disk.top}: it would change images now that it does not hold"
    if record.judged_by == "chain":
        return _changed_since_scan(record, work, begun_with)
    for disk, base in zip(record.disks, work.bases, strict=False):
        if base != disk.base:
            return f"{disk.top} would be merged into {base}, and not into {disk.base}"
        if base_id_of(base) != disk.base_id:
            return f"{base} is another image"
    if work.digest != record.plan_digest:
        top = record.disks[0].top
        return f"{record.action} of {top} would do something else now than when it was planned"
    return ""


def _changed_since_scan(record: JobRecord, work: PlannedWork, begun_with: str) -> str:
    """As above, of a job that was planned from what a scan had found.

    A child that was interrupted has written to its images, and left no trace but the times of that.
    """
    top = record.disks[0].top
    try:
        digest = digest_of_chains(record.action, work.chains)
        if any(base_id_of(disk.base) != disk.base_id for disk in record.disks):
            return f"{top}: another image lies where one of its chain was"
    except OSError as error:
        return f"{top}: an image of its chain cannot be looked at: {error.strerror}"
    # Which images are merged where snapshots are thinned out, only the host itself can say.
    bases = tuple(disk.base for disk in record.disks)
    if record.action is not Action.THIN_OUT and bases != work.bases:
        return f"{top} would be merged into another image than when its host was scanned"
    if digest != record.plan_digest and work.digest != begun_with:
        return f"{top}: its chain is not what it was when its host was scanned"
    return ""
