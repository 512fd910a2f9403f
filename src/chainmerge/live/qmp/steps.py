# SPDX-License-Identifier: Apache-2.0
"""Which step of a live merge is next. Pure.

A step follows from what the journal says, how the job is and whether the chain is merged
already, and from nothing that a process remembers. So a merge is carried on in the same way
after every step, and after a kill at any moment.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from chainmerge.live.port import JobPhase, JobState
from chainmerge.records.live_journal import LiveState


class LiveStep(StrEnum):
    """What is done next."""

    START = "start"
    """Switch base's bitmaps off, and start the job."""
    PAUSE = "pause"
    """Make the job wait, so that the window can be used."""
    PREPARE = "prepare"
    """Use the window: base's bitmaps become what they are to be while data is copied."""
    RELEASE = "release"
    """Let the job go on, at full speed."""
    FOLLOW = "follow"
    """Watch it copy."""
    MAKE_ROOM = "make-room"
    """Extend base's volume and let the job go on."""
    GIVE_UP = "give-up"
    """The job met an error that we can do nothing about."""
    COMPLETE = "complete"
    """Everything is copied: ask for the end."""
    SWITCH = "switch"
    """Base's bitmaps record again, the journal says so, and the job takes effect."""
    WAIT = "wait"
    """The job is on its way."""
    DISMISS = "dismiss"
    """The job is done; look at what it left."""
    SETTLE = "settle"
    """The chain is merged: verify, close, delete."""
    UNDO = "undo"
    """Put base's bitmaps back and cancel the job."""
    RESTORE = "restore"
    """The job is gone and the chain is not merged: see that base's bitmaps are back."""


class Situation(Struct, frozen=True):
    """What is known.

    Attributes:
        state: What the journal says.
        job: How the job is; None where there is none.
        merged: Whether the VM's chain lacks the merged images already.
    """

    state: LiveState
    job: JobState | None
    merged: bool


def next_step(situation: Situation) -> LiveStep:
    """Decide on the next step."""
    job = situation.job
    if job is None:
        return _without_job(situation)
    if job.phase is JobPhase.DONE:
        return LiveStep.DISMISS
    if job.phase is JobPhase.ENDING:
        return LiveStep.WAIT
    match situation.state:
        case LiveState.UNDOING:
            return LiveStep.UNDO
        case LiveState.PREPARING:
            # Stopped by an error is as good as paused: nothing is being written.
            return LiveStep.PAUSE if job.phase is JobPhase.RUNNING else LiveStep.PREPARE
        case _:
            return _copying(job)


def _without_job(situation: Situation) -> LiveStep:
    if situation.merged:
        return LiveStep.SETTLE
    return LiveStep.START if situation.state is LiveState.PREPARING else LiveStep.RESTORE


def _copying(job: JobState) -> LiveStep:
    if job.phase is JobPhase.HELD:
        return LiveStep.SWITCH
    if job.phase is JobPhase.PAUSED:
        if job.out_of_space:
            return LiveStep.MAKE_ROOM
        return LiveStep.GIVE_UP if job.stopped_by_error else LiveStep.RELEASE
    if job.phase is JobPhase.READY:
        return LiveStep.COMPLETE
    return LiveStep.FOLLOW
