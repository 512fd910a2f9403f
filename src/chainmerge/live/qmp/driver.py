# SPDX-License-Identifier: Apache-2.0
"""A live merge from the journal's first entry to the last deleted file.

A loop: look at the journal, the job and the chain; let :mod:`chainmerge.live.qmp.steps` say what is
next; do it. docs/live-merge.md has the order of the steps, and what a death in each leaves.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import ChainmergeError
from chainmerge.live.bitmaps import (
    silence_actions,
    switch_actions,
    undo_actions,
    window_actions,
)
from chainmerge.live.convergence import Remedy
from chainmerge.live.driver import Driven, let_disk_go, slow_disk_down
from chainmerge.live.errors import (
    LiveChainDiffers,
    LiveMergeFailed,
    LiveMergeStalled,
    VmLost,
    VmRefused,
    VmUnreachable,
)
from chainmerge.live.headroom import Headroom
from chainmerge.live.merge_nodes import Place, place_of
from chainmerge.live.port import CommitOrder, InspectedVm, JobPhase, LiveVm
from chainmerge.live.qmp.steps import Situation, Step, next_step
from chainmerge.live.settling import Settled, close_merged, forget, settle
from chainmerge.merging.live_remains import pivot_unclear
from chainmerge.records.changes import data_changed
from chainmerge.records.live_journal import LiveJournal, LiveState, save_live_journal
from chainmerge.records.request import command_of, resume_command_of
from chainmerge.storage.volumes import volume_at

if TYPE_CHECKING:
    from chainmerge.live.port import BlockNode, JobState

# Events make it shorter; this is how often progress is looked at.
SECONDS_BETWEEN_LOOKS: Final = 0.25
# Nothing but a few requests is to end; a storage that hangs can keep it waiting.
_ENOUGH_LOOKS: Final = 40


@dataclass(slots=True, kw_only=True)
class Drive(Driven):
    """A live merge that is driven over the VM's monitor."""

    vm: LiveVm
    failure: ChainmergeError | None = None
    stuck_at: int | None = None
    completing: bool = False


def carry_on(drive: Drive) -> Settled:
    """Drive the merge that the journal tells of to its end, from wherever it is.

    Raises:
        LiveMergeFailed, LiveMergeStalled, Interrupted: it was undone.
        VmLost: the VM does not answer any more.
        Failed: the merge took effect, and something is wrong with it.
    """
    try:
        while True:
            step = next_step(_situation(drive))
            if step is Step.SETTLE:
                return _settle(drive)
            _STEPS[step](drive)
    except VmUnreachable as error:
        raise lost(drive.vm, drive.journal, error.reason) from error


def lost(vm: InspectedVm, journal: LiveJournal, reason: str) -> VmLost:
    """The error for a VM that went away, with what to run next."""
    resume = resume_command_of(journal.known_request, vm.address)
    cold = command_of(journal.known_request) or "the same merge without `live`"
    return VmLost(vm.name, journal.base.path, journal.top.path, reason, resume, cold)


def _situation(drive: Drive) -> Situation:
    place = _place(drive)
    job = drive.vm.job(drive.journal.job)
    if job is not None:
        drive.copied = job.done
    return Situation(
        state=drive.journal.state,
        job=job,
        merged=place.merged,
    )


def _place(drive: Drive) -> Place:
    place = place_of(drive.vm.graph(), drive.journal)
    if place is None:
        difference = f"{drive.base} is not in the VM's chain any more"
        raise LiveChainDiffers(drive.vm.name, difference)
    return place


# The steps, each as next_step names it.


def _start(drive: Drive) -> None:
    """Base is read-only and as it was, but for what an earlier run has switched off."""
    _stop_if_asked(drive)
    place = _place(drive)
    drive.announce(Stage.PRUNE)
    order = CommitOrder(
        job=drive.journal.job,
        active=place.active.name,
        top=place.merged_nodes[-1].name,
        base=place.base.name,
        backing_name=drive.journal.backing_name,
    )
    try:
        drive.vm.change_bitmaps(silence_actions(drive.journal, place.base))
        drive.vm.start_commit(order)
    except VmRefused as refused:
        # Nothing is stored of it yet: base has been read-only all the time.
        drive.vm.change_bitmaps(undo_actions(drive.journal, _place(drive).base))
        _give_up(drive, drive.not_started(drive.vm.name, refused.reason))
        return
    _pause(drive)


def _pause(drive: Drive) -> None:
    # It may come to its end in the meantime, which is as good.
    with contextlib.suppress(VmRefused):
        drive.vm.pause(drive.journal.job)
    _wait_while(drive, JobPhase.RUNNING, JobPhase.READY)


def _prepare(drive: Drive) -> None:
    drive.announce(Stage.PRUNE)
    place = _place(drive)
    try:
        for actions in window_actions(drive.journal, place.base, place.merged_nodes):
            drive.vm.change_bitmaps(actions)
    except VmRefused as refused:
        _give_up(drive, _failed(drive, refused.reason))
        return
    drive.enter(LiveState.COPYING)
    _release(drive)


def _release(drive: Drive) -> None:
    _stop_if_asked(drive)
    if drive.journal.state is LiveState.UNDOING:
        return
    drive.vm.limit(drive.journal.job, drive.options.bandwidth)
    job = drive.vm.job(drive.journal.job)
    if job is not None and job.phase is JobPhase.PAUSED:
        drive.vm.resume(drive.journal.job)


def _follow(drive: Drive) -> None:
    """One look at a job that copies, or at one that is ready and has been told to end."""
    drive.announce(Stage.COPY)
    job = drive.vm.job(drive.journal.job)
    if job is None:
        return
    drive.convergence.observe(job)
    rate = int(drive.convergence.rate)
    drive.report(ProgressEvent(Stage.COPY, job.done, job.total, rate))
    _stop_if_asked(drive)
    if drive.journal.state is LiveState.UNDOING:
        return
    try:
        _room(drive).keep()
    except ChainmergeError as error:
        _give_up(drive, _failed(drive, error.sentence))
        return
    if drive.journal.is_active:
        _converge(drive, job)
    drive.vm.wait_for_event(SECONDS_BETWEEN_LOOKS)


def _converge(drive: Drive, job: JobState) -> None:
    match drive.convergence.judge(job):
        case Remedy.ABORT:
            remaining = max(job.total - job.done, 0)
            seconds = drive.convergence.seconds
            _give_up(drive, LiveMergeStalled(drive.base, drive.top, remaining, seconds))
        case Remedy.THROTTLE:
            _throttle(drive)
        case Remedy.NOTHING:
            pass


def _throttle(drive: Drive) -> None:
    try:
        slow_disk_down(drive, drive.vm)
    except VmRefused as refused:
        _give_up(drive, _failed(drive, f"the guest cannot be slowed down: {refused.reason}"))


def _make_room(drive: Drive) -> None:
    """The volume is full: extend it, or find out that what was freed since is enough."""
    job = drive.vm.job(drive.journal.job)
    if job is None:
        return
    room = _room(drive)
    try:
        if room.grows:
            drive.announce(Stage.EXTEND)
            room.make_room()
        elif drive.stuck_at == job.done:
            room.make_room()
    except ChainmergeError as error:
        _give_up(drive, _failed(drive, error.sentence))
        return
    drive.stuck_at = job.done
    _stop_if_asked(drive)
    if drive.journal.state is not LiveState.UNDOING:
        drive.vm.limit(drive.journal.job, drive.options.bandwidth)
        drive.vm.resume(drive.journal.job)
        _wait_while(drive, JobPhase.PAUSED)


def _give_up_on_error(drive: Drive) -> None:
    _give_up(drive, _failed(drive, "an image could not be read or written (see QEMU's log)"))


def _complete(drive: Drive) -> None:
    if not drive.completing:
        drive.announce(Stage.BITMAPS)
        drive.completing = True
        # An earlier run may have asked for it already.
        with contextlib.suppress(VmRefused):
            drive.vm.complete(drive.journal.job)
        return
    _follow(drive)


def _switch(drive: Drive) -> None:
    """From here to the end of the job the guest waits, if it writes to what is merged."""
    started = time.monotonic()
    drive.announce(Stage.BITMAPS)
    place = _place(drive)
    try:
        drive.vm.change_bitmaps(switch_actions(drive.journal, place.base, place.merged_nodes))
    except VmRefused as refused:
        _give_up(drive, _failed(drive, refused.reason))
        return
    if drive.journal.state is not LiveState.SWITCHING:
        since = data_changed(Path(drive.top))
        drive.journal = msgspec.structs.replace(drive.journal, top_since=since)
    try:
        drive.enter(LiveState.SWITCHING)
    except ChainmergeError as error:
        # Whatever else may have to wait, the guest must not.
        drive.failure = error
        _undo(drive)
        return
    drive.vm.finalize(drive.journal.job)
    _wait_while(drive, JobPhase.HELD, JobPhase.ENDING)
    drive.held_seconds = time.monotonic() - started


def _wait(drive: Drive) -> None:
    drive.vm.wait_for_event(SECONDS_BETWEEN_LOOKS)


def _dismiss(drive: Drive) -> None:
    job = drive.vm.job(drive.journal.job)
    if job is None:
        return
    if drive.failure is None and (job.error or drive.journal.state is LiveState.UNDOING):
        reason = job.error or "it had been given up by an earlier run"
        drive.failure = _failed(drive, reason)
    if job.error:
        # It took no effect, and once it is dismissed nothing would tell.
        drive.enter(LiveState.UNDOING)
    drive.vm.dismiss(drive.journal.job)


def _undo(drive: Drive) -> None:
    """Everything back while base is writable still, then end the job.

    What is under way is waited for first: it would be recorded.
    """
    _pause(drive)
    place = _place(drive)
    drive.vm.change_bitmaps(undo_actions(drive.journal, place.base))
    drive.vm.cancel(drive.journal.job)
    _wait_while(drive, JobPhase.PAUSED, JobPhase.READY, JobPhase.HELD, JobPhase.ENDING)


def _restore(drive: Drive) -> None:
    """The job is gone without the merge: see that base's bitmaps are what they were.

    Raises the reason why.
    """
    if drive.journal.took_effect and drive.journal.is_active:
        # Only another QEMU does not know of the job any more, and it was given top again.
        raise pivot_unclear(drive.journal.known_request)
    failure = drive.failure or _failed(drive, "the job was cancelled, or the VM started anew")
    drive.enter(LiveState.UNDOING)
    let_disk_go(drive, drive.vm)
    base = _place(drive).base
    actions = undo_actions(drive.journal, base)
    if not actions:
        _close_again(drive, base)
        forget(drive.journal, keep_saved=False)
        raise failure
    try:
        if base.read_only:
            drive.vm.make_writable(base.name)
        drive.vm.change_bitmaps(actions)
        drive.vm.make_read_only(base.name)
    except VmRefused as refused:
        # The saved bitmaps stay, and the next merge of these images while they are closed
        # takes base's from there.
        forget(drive.journal, keep_saved=True)
        names = ", ".join(repr(kept.name) for kept in drive.journal.kept)
        reason = (
            f"{_reason_of(failure)}; base's bitmaps {names} could not be switched on again "
            f"({refused.reason}): they are saved beside base, and a cold merge restores them"
        )
        raise _failed(drive, reason) from failure
    forget(drive.journal, keep_saved=False)
    raise failure


def _close_again(drive: Drive, base: BlockNode) -> None:
    """Make base read-only again, which QEMU forgets of an active commit that was cancelled.

    Where it cannot be told to (a node whose name it made up), base's bitmaps are stored when
    the VM ends.
    """
    if not base.read_only:
        with contextlib.suppress(VmRefused):
            drive.vm.make_read_only(base.name)


def _reason_of(error: ChainmergeError) -> str:
    return error.reason if isinstance(error, LiveMergeFailed) else error.sentence


def _settle(drive: Drive) -> Settled:
    drive.enter(LiveState.SETTLING)
    let_disk_go(drive, drive.vm)
    if drive.headroom is not None:
        drive.extensions = drive.headroom.extensions
    drive.warnings += close_merged(drive.vm, drive.journal)
    # Closing top has changed it. Whatever else does from now on is no doing of this merge.
    since = data_changed(Path(drive.top))
    drive.journal = msgspec.structs.replace(drive.journal, top_since=since)
    save_live_journal(drive.journal)
    return settle(drive.vm, drive.journal, drive.report, drive.announce)


_STEPS: Final = {
    Step.START: _start,
    Step.PAUSE: _pause,
    Step.PREPARE: _prepare,
    Step.RELEASE: _release,
    Step.FOLLOW: _follow,
    Step.MAKE_ROOM: _make_room,
    Step.GIVE_UP: _give_up_on_error,
    Step.COMPLETE: _complete,
    Step.SWITCH: _switch,
    Step.WAIT: _wait,
    Step.DISMISS: _dismiss,
    Step.UNDO: _undo,
    Step.RESTORE: _restore,
}


def _stop_if_asked(drive: Drive) -> None:
    if drive.journal.state is not LiveState.UNDOING and drive.should_stop():
        _give_up(drive, drive.interrupted(drive.vm.name))


def _give_up(drive: Drive, failure: ChainmergeError) -> None:
    """From the next step on everything is undone; *failure* is raised in the end."""
    drive.failure = failure
    drive.enter(LiveState.UNDOING)


def _failed(drive: Drive, reason: str) -> LiveMergeFailed:
    return LiveMergeFailed(drive.vm.name, drive.base, drive.top, reason)


def _room(drive: Drive) -> Headroom:
    if drive.headroom is None:
        volume = volume_at(Path(drive.base), drive.options.as_merge)
        node = _place(drive).base.file
        assert node is not None
        drive.headroom = Headroom(drive.vm, node, volume)
    return drive.headroom


def _wait_while(drive: Drive, *phases: JobPhase) -> None:
    """Wait until the job has left these phases; after a while, look again at everything."""
    for _ in range(_ENOUGH_LOOKS):
        job = drive.vm.job(drive.journal.job)
        if job is None or job.phase not in phases:
            return
        drive.vm.wait_for_event(SECONDS_BETWEEN_LOOKS)
