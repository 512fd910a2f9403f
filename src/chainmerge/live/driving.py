# SPDX-License-Identifier: Apache-2.0
"""A live merge from its journal to its report, by the driver of whichever port the VM has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from chainmerge.errors import Refused
from chainmerge.live.errors import LiveNotStarted, NoSuchDisk, VmUnreachable
from chainmerge.live.libvirt.commit_driver import DomainCommitDriver
from chainmerge.live.libvirt.disk import DomainDisk
from chainmerge.live.libvirt.pull_driver import DomainPullDriver
from chainmerge.live.port import LiveVm
from chainmerge.live.qmp.commit_driver import CommitDriver
from chainmerge.live.qmp.pull_driver import PullDriver
from chainmerge.live.reporting import LiveOutcome, report_merged
from chainmerge.live.settling import settle_live_merge
from chainmerge.merging.errors import MergeUnfinished
from chainmerge.records.disks import forget_entry
from chainmerge.records.live_journal import LiveState

if TYPE_CHECKING:
    from chainmerge.documents.merge import MergeReport
    from chainmerge.documents.plan import MergePlan
    from chainmerge.live.driver import Caller, LiveDriver
    from chainmerge.options import LiveOptions
    from chainmerge.records.live_journal import LiveJournal

LiveDisk: TypeAlias = LiveVm | DomainDisk
"""A disk of a running VM, whichever way it is reached."""


def drive(
    disk: LiveDisk,
    journal: LiveJournal,
    options: LiveOptions,
    caller: Caller,
    planned: MergePlan | None,
) -> MergeReport:
    """Drive the merge that the journal tells of to its end, from wherever it is.

    Args:
        disk: the disk of the VM.
        journal: of the merge.
        options: how to merge.
        caller: who asked for it.
        planned: what it is to do; None if an earlier run has begun it.

    Raises:
        LiveNotStarted: nothing was changed.
        LiveMergeFailed, LiveMergeStalled, Interrupted: it was undone.
        MergeUnfinished: it cannot go on as things are.
        VmLost: the VM does not answer any more.
        Failed: the merge took effect, and something is wrong with it.
    """
    space = None if planned is None else planned.space
    untouched = space is not None and space.grow_to is None and not space.extends_pool
    driver = _kind_of(disk, journal)(
        disk=disk, journal=journal, options=options, caller=caller, untouched=untouched
    )
    report = report_merged(driver, _carried_on(driver), planned)
    forget_entry(Path(journal.result.path))
    return report


def _kind_of(disk: LiveDisk, journal: LiveJournal) -> type[LiveDriver[Any]]:
    if isinstance(disk, DomainDisk):
        return DomainPullDriver if journal.pulls else DomainCommitDriver
    return PullDriver if journal.pulls else CommitDriver


def _carried_on(driver: LiveDriver[Any]) -> LiveOutcome:
    """What would be a refusal before a merge has begun is none any more."""
    try:
        return _ended(driver)
    except LiveNotStarted:
        raise
    except (Refused, NoSuchDisk) as refused:
        raise MergeUnfinished(driver.top, refused.sentence) from refused


def _ended(driver: LiveDriver[Any]) -> LiveOutcome:
    try:
        driver.until_merged()
        driver.enter(LiveState.SETTLING)
        driver.let_guest_go()
        driver.close_merged()
        return settle_live_merge(driver)
    except VmUnreachable as error:
        raise driver.lost(error.reason) from error
