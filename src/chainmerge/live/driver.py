# SPDX-License-Identifier: Apache-2.0
"""What a process that drives a live merge has in hand, whichever way the VM is reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import Interrupted
from chainmerge.live.convergence import Convergence
from chainmerge.live.errors import LiveMergeFailed, LiveNotStarted, VmRefused
from chainmerge.live.headroom import Headroom
from chainmerge.live.port import DiskLimits
from chainmerge.options import LiveOptions
from chainmerge.records.live_journal import (
    LiveJournal,
    LiveState,
    SavedLimits,
    enter,
    save_live_journal,
)


@dataclass(slots=True, kw_only=True)
class Driven:
    """A live merge that is being driven by this process.

    Attributes:
        journal: As it is on disk.
        options: How to merge.
        report: Told of progress.
        should_stop: Asked whether to stop.
        untouched: Whether neither base's volume nor any bitmap is changed before the job begins.
        copied: Guest bytes that were copied.
        extensions: How often the volume was extended while data was copied.
        held_seconds: How long the guest waited for the merge to take effect.
        warnings: What the user should know, a sentence each.
    """

    journal: LiveJournal
    options: LiveOptions
    report: Callable[[ProgressEvent], None]
    should_stop: Callable[[], bool]
    convergence: Convergence
    untouched: bool = False
    headroom: Headroom | None = None
    copied: int = 0
    extensions: int = 0
    held_seconds: float = 0.0
    announced: set[Stage] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def announce(self, stage: Stage) -> None:
        """Report that a stage begins, the first time."""
        if stage not in self.announced:
            self.announced.add(stage)
            self.report(ProgressEvent(stage))

    @property
    def top(self) -> str:
        """Top's path."""
        return self.journal.top.path

    @property
    def base(self) -> str:
        """Base's path."""
        return self.journal.base.path

    def not_started(self, vm: str, reason: str) -> LiveNotStarted | LiveMergeFailed:
        """The error for a job that the VM did not begin."""
        if self.untouched:
            return LiveNotStarted(vm, self.base, self.top, reason)
        return LiveMergeFailed(vm, self.base, self.top, reason)

    def interrupted(self, vm: str) -> Interrupted:
        """The error of a merge that was undone because it was asked to stop."""
        pruned = ", and what stale bitmaps were pruned stay so" if self.journal.stale else ""
        return Interrupted(f"the merge in {vm} was undone: it reads {self.top} as before{pruned}")

    def enter(self, state: LiveState) -> None:
        """Record that what *state* names begins."""
        self.journal = enter(self.journal, state)


class LimitedDisk(Protocol):
    """The guest's disk, as far as its rate goes."""

    def disk_limits(self) -> DiskLimits:
        """How it is limited now."""

    def limit_disk(self, limits: DiskLimits) -> None:
        """Limit it."""


def slow_disk_down(drive: Driven, disk: LimitedDisk) -> None:
    """Limit what the guest writes; what it was limited to before is recorded first.

    Raises VmRefused.
    """
    limit = drive.convergence.limit
    assert limit is not None
    now = disk.disk_limits()
    if drive.journal.limits is None:
        saved = SavedLimits(dict(now.limits), now.group)
        drive.journal = msgspec.structs.replace(drive.journal, limits=saved)
        save_live_journal(drive.journal)
    slower = {**now.limits, "bps_wr": limit, "bps": 0, "bps_max": 0, "bps_wr_max": 0}
    disk.limit_disk(DiskLimits(slower, now.group))


def let_disk_go(drive: Driven, disk: LimitedDisk) -> None:
    """Put back what :func:`slow_disk_down` has recorded, or warn that this cannot be done."""
    saved = drive.journal.limits
    if saved is None:
        return
    try:
        disk.limit_disk(DiskLimits(saved.limits, saved.group))
    except VmRefused as refused:
        drive.warnings.append(
            f"the guest's disk may still be slowed down, as its limits could not be set to what "
            f"they were: {refused.reason}"
        )
    drive.journal = msgspec.structs.replace(drive.journal, limits=None)
    save_live_journal(drive.journal)
