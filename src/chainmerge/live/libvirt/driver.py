# SPDX-License-Identifier: Apache-2.0
"""A merge in a domain of libvirt from the journal's first entry to its last.

libvirt's block commit copies, unites the bitmaps and moves the domain's description along; we
see to what comes before and after it. Stale bitmaps go first, while no job is in the way. The end
of an active merge comes while the guest is suspended: top and base are the same when the journal
says that base is right from now on. docs/live-merge.md has the order, and what a death in each
step leaves.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import ChainmergeError, Interrupted
from chainmerge.live.convergence import Remedy
from chainmerge.live.driver import Driven, let_disk_go, slow_disk_down
from chainmerge.live.errors import (
    LiveChainDiffers,
    LiveMergeFailed,
    LiveMergeStalled,
    LiveNotStarted,
    VmRefused,
    VmUnreachable,
)
from chainmerge.live.headroom import Headroom
from chainmerge.live.libvirt.disk import DomainDisk, DomainJob, DomainJobKind
from chainmerge.live.libvirt.settling import names_to_remove, settle_in_domain
from chainmerge.live.merge_nodes import Place, place_of
from chainmerge.live.port import JobPhase, JobState
from chainmerge.live.qmp.driver import lost
from chainmerge.live.settling import Settled, forget
from chainmerge.records.changes import data_changed
from chainmerge.records.live_journal import LiveState, save_live_journal
from chainmerge.storage.volumes import volume_at

SECONDS_BETWEEN_LOOKS: Final = 0.25
# With the guest suspended only what it had written already is to be copied.
_SECONDS_TO_CATCH_UP: Final = 30.0
_SECONDS_BETWEEN_SHORT_LOOKS: Final = 0.02
_LOOKS_FOR_THE_CHAIN: Final = 40


@dataclass(slots=True, kw_only=True)
class DomainDrive(Driven):
    """A merge that is driven through libvirt."""

    disk: DomainDisk

    def place(self) -> Place:
        """Where the images stand now."""
        place = place_of(self.disk.layout(), self.journal)
        if place is None:
            difference = f"{self.base} is not in the domain's chain any more"
            raise LiveChainDiffers(self.disk.name, difference)
        return place

    def failed(self, reason: str) -> LiveMergeFailed:
        """The error of a merge that did not come about."""
        return LiveMergeFailed(self.disk.name, self.base, self.top, reason)


def carry_on_in_domain(drive: DomainDrive) -> Settled:
    """Drive the merge that the journal tells of to its end, from wherever it is.

    Raises:
        LiveMergeFailed, LiveMergeStalled, Interrupted: it did not come about. The journal is gone.
        VmLost: libvirt does not answer any more, or the domain is gone.
        Failed: the merge took effect, and something is wrong with it.
    """
    try:
        _drive(drive)
        return settle_in_domain(drive.disk, drive.journal, drive.report, drive.announce)
    except VmUnreachable as error:
        raise lost(drive.disk, drive.journal, error.reason) from error


def _drive(drive: DomainDrive) -> None:
    try:
        _merge(drive)
    except (VmRefused, LiveNotStarted, LiveMergeFailed, LiveMergeStalled, Interrupted) as failure:
        if _undo(drive):
            if isinstance(failure, VmRefused):
                raise drive.failed(failure.reason) from failure
            raise
        drive.enter(LiveState.SETTLING)
    _let_guest_run(drive)
    let_disk_go(drive, drive.disk)
    if drive.headroom is not None:
        drive.extensions = drive.headroom.extensions


def _merge(drive: DomainDrive) -> None:
    if drive.journal.state is LiveState.UNDOING:
        raise drive.failed("it had been given up by an earlier run")
    begun = drive.journal.state is not LiveState.PREPARING
    if not begun:
        _prune(drive)
        drive.enter(LiveState.COPYING)
    while not drive.place().merged:
        # The chain is what counts: an earlier run may have come further than the domain did.
        drive.enter(LiveState.COPYING)
        _copy(drive, begun=begun)
        begun = True
        if drive.journal.is_active and not drive.place().merged:
            _switch(drive)
    drive.enter(LiveState.SETTLING)


def _undo(drive: DomainDrive) -> bool:
    """End the job, if there is one, and have everything as it was but for the stale bitmaps.

    Returns:
        Whether that is so. A merge that has taken effect all the same stays.
    """
    begun = drive.journal.state is not LiveState.PREPARING
    # Until it is known whether the guest has gone over to base, base is right.
    if drive.journal.state is not LiveState.SWITCHING:
        drive.enter(LiveState.UNDOING)
    if begun and _ends_merged(drive):
        return False
    drive.enter(LiveState.UNDOING)
    _let_guest_run(drive)
    let_disk_go(drive, drive.disk)
    forget(drive.journal, keep_saved=False)
    return True


def _ends_merged(drive: DomainDrive) -> bool:
    """Cancel the job; says whether it came to its end before."""
    job = drive.disk.block_job()
    if job is not None and job.is_commit:
        # It may have ended by itself in between.
        with contextlib.suppress(VmRefused):
            drive.disk.cancel()
            return drive.place().merged
    return _is_merged_soon(drive)


def _prune(drive: DomainDrive) -> None:
    drive.announce(Stage.PRUNE)
    there = drive.disk.known_names()
    for name in names_to_remove(drive.journal):
        if name in there:
            drive.disk.remove_everywhere(name)


def _copy(drive: DomainDrive, *, begun: bool) -> None:
    """Have libvirt copy until nothing is left, or the chain is merged.

    Args:
        drive: The merge.
        begun: Whether a job may have been started before, and ended in the meantime.
    """
    drive.announce(Stage.COPY)
    extensions: int | None = None
    while not drive.place().merged:
        job = drive.disk.block_job()
        if job is None:
            if begun and _is_merged_soon(drive):
                return
            # Where it ends early, as for want of space, it can go on from where it was; but only
            # if there is more space now than when it began.
            now = _room(drive).extensions
            if now == extensions:
                raise _ended_early(drive)
            if begun:
                _room(drive).widen()
            extensions = now
            _start(drive)
            begun = True
            continue
        if not job.is_commit:
            raise drive.failed(f"another block job ({job.kind}) runs on this disk")
        if job.kind is DomainJobKind.ACTIVE_COMMIT and job.caught_up:
            drive.copied = job.done
            return
        _look_at(drive, job)
        drive.disk.wait_for_event(SECONDS_BETWEEN_LOOKS)


def _ended_early(drive: DomainDrive) -> LiveMergeFailed:
    """Libvirt does not tell why a job has failed."""
    room = _room(drive)
    why = "see its log and QEMU's"
    if room.is_full:
        why = f"{drive.base} of {room.volume.size} bytes is full"
    return drive.failed(f"libvirt's block commit ended early ({why})")


def _is_merged_soon(drive: DomainDrive) -> bool:
    """Whether a job has ended well. libvirt describes the chain anew some time after its end."""
    for _ in range(_LOOKS_FOR_THE_CHAIN):
        if drive.place().merged:
            return True
        if drive.disk.block_job() is not None:
            return False
        drive.disk.wait_for_event(SECONDS_BETWEEN_LOOKS)
    return False


def _start(drive: DomainDrive) -> None:
    place = drive.place()
    try:
        drive.disk.start_commit(place.merged_nodes[-1], place.base, drive.options.bandwidth)
    except VmRefused as refused:
        raise drive.not_started(drive.disk.name, refused.reason) from refused
    drive.untouched = False


def _look_at(drive: DomainDrive, job: DomainJob) -> None:
    drive.copied = job.done
    state = JobState(JobPhase.RUNNING, job.done, job.total)
    drive.convergence.observe(state)
    drive.report(ProgressEvent(Stage.COPY, job.done, job.total, int(drive.convergence.rate)))
    if drive.should_stop():
        raise drive.interrupted(drive.disk.name)
    try:
        _room(drive).keep()
    except VmUnreachable:
        raise
    except ChainmergeError as error:
        raise drive.failed(error.sentence) from error
    if drive.journal.is_active:
        _converge(drive, state)


def _converge(drive: DomainDrive, job: JobState) -> None:
    match drive.convergence.judge(job):
        case Remedy.ABORT:
            remaining = max(job.total - job.done, 0)
            seconds = drive.convergence.seconds
            raise LiveMergeStalled(drive.base, drive.top, remaining, seconds)
        case Remedy.THROTTLE:
            slow_disk_down(drive, drive.disk)
        case Remedy.NOTHING:
            pass


def _switch(drive: DomainDrive) -> None:
    """Have the guest go on with base. It is suspended from when both are the same on."""
    started = time.monotonic()
    drive.announce(Stage.BITMAPS)
    if not drive.disk.is_suspended():
        _note(drive, guest_to_resume=True)
        drive.disk.suspend()
    _wait_until_caught_up(drive)
    _note(drive, top_since=data_changed(Path(drive.top)))
    drive.enter(LiveState.SWITCHING)
    drive.disk.pivot()
    _let_guest_run(drive)
    drive.held_seconds = time.monotonic() - started


def _wait_until_caught_up(drive: DomainDrive) -> None:
    deadline = time.monotonic() + _SECONDS_TO_CATCH_UP
    while True:
        job = drive.disk.block_job()
        if job is None:
            raise drive.failed("the block commit ended before it could take effect")
        if job.caught_up:
            return
        if time.monotonic() > deadline:
            raise drive.failed("the copy did not end although the guest was suspended")
        drive.disk.wait_for_event(_SECONDS_BETWEEN_SHORT_LOOKS)


def _let_guest_run(drive: DomainDrive) -> None:
    if drive.journal.guest_to_resume:
        if drive.disk.is_suspended():
            drive.disk.let_run()
        _note(drive, guest_to_resume=False)


def _note(drive: DomainDrive, **changed: Any) -> None:  # fields of the journal
    drive.journal = msgspec.structs.replace(drive.journal, **changed)
    save_live_journal(drive.journal)


def _room(drive: DomainDrive) -> Headroom:
    if drive.headroom is None:
        volume = volume_at(Path(drive.base), drive.options.as_merge)
        node = drive.place().base.file
        assert node is not None
        drive.headroom = Headroom(drive.disk, node, volume)
    return drive.headroom
