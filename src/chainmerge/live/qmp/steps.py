# SPDX-License-Identifier: Apache-2.0
"""Which step of a live merge is next. Pure.

A step follows from what the journal says, how the job is and whether the chain is merged
already, and from nothing that a process remembers. So a merge is carried on in the same way
after every step, and after a kill at any moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from chainmerge.live.port import JobPhase, JobState
from chainmerge.records.live_journal import LiveState


class Step(StrEnum):
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


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known.

    Attributes:
        state: What the journal says.
        job: How the job is; None where there is none.
        merged: Whether the VM's chain lacks the merged images already.
    """

    state: LiveState
    job: JobState | None
    merged: bool


def next_step(situation: Situation) -> Step:
    """Decide on the next step."""
    job = situation.job
    if job is None:
        return _without_job(situation)
    if job.phase is JobPhase.DONE:
        return Step.DISMISS
    if job.phase is JobPhase.ENDING:
        return Step.WAIT
    match situation.state:
        case LiveState.UNDOING:
            return Step.UNDO
        case LiveState.PREPARING:
            # Stopped by an error is as good as paused: nothing is being written.
            return Step.PAUSE if job.phase is JobPhase.RUNNING else Step.PREPARE
        case _:
            return _copying(job)


def _without_job(situation: Situation) -> Step:
    if situation.merged:
        return Step.SETTLE
    return Step.START if situation.state is LiveState.PREPARING else Step.RESTORE


def _copying(job: JobState) -> Step:
    if job.phase is JobPhase.HELD:
        return Step.SWITCH
    if job.phase is JobPhase.PAUSED:
        if job.out_of_space:
            return Step.MAKE_ROOM
        return Step.GIVE_UP if job.stopped_by_error else Step.RELEASE
    if job.phase is JobPhase.READY:
        return Step.COMPLETE
    return Step.FOLLOW
