# SPDX-License-Identifier: Apache-2.0
"""What the commands of the fleet print. Times are ISO 8601 in UTC."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct


class FleetJobOutcome(StrEnum):
    """What became of a job."""

    DONE = "done"
    """All that was asked for has been done, and verified."""
    ALREADY = "already"
    """All that was asked for was so before."""
    CANCELLED = "cancelled"
    """Somebody wanted that; what was begun is as `chainmerge status` says."""
    REFUSED = "refused"
    """The command refused, and nothing was changed."""
    FAILED = "failed"
    """The command did not work."""
    UNKNOWN = "unknown"
    """Nobody can tell what the disk holds."""
    REJECTED = "rejected"
    """It asked for what jobs may not do on its host; nothing was run."""
    PLAN_CHANGED = "plan-changed"
    """The images are not what they were when it was planned; nothing was run."""
    LOST = "lost"
    """Its host was released while it ran there."""


SUCCESSES: Final = frozenset({FleetJobOutcome.DONE, FleetJobOutcome.ALREADY})
"""With these all that was asked for is so."""
_LONGEST_SILENCE: Final = 60.0


class FleetJobState(StrEnum):
    """Where a job is that has not ended."""

    WAITING = "waiting"
    RUNNING = "running"


class FleetJobStatus(Struct, frozen=True):
    """A job that has not ended.

    Attributes:
        job: Its number.
        host: Whose worker does it.
        state: Whether it holds its keys.
        action: What it does.
        top: The image merged.
        base: The image merged into.
        priority: The highest goes first.
        waits_for: What it waits for, a key and why each.
        cancelled: Whether somebody wants it to end.
        progress: The newest event of the merge; None if there is none yet.
        bytes_done: How much of the data has been copied.
        bytes_total: How much there is to copy.
    """

    job: int
    host: str
    state: FleetJobState
    action: str
    top: str
    base: str
    priority: int
    waits_for: tuple[str, ...]
    cancelled: bool
    progress: str | None
    bytes_done: int | None
    bytes_total: int | None

    @property
    def stage(self) -> str:
        """How far it is, in a word."""
        return "stopping" if self.cancelled else (self.progress or self.state.value)

    @property
    def bytes_left(self) -> int:
        """How much there is still to copy, as far as that is known."""
        return max(0, (self.bytes_total or 0) - (self.bytes_done or 0))


class FleetHostStatus(Struct, frozen=True):
    """A host whose worker has started at least once.

    Attributes:
        host: Its name.
        seen: When its worker last spoke.
        silent_seconds: How long that is ago.
        drained: Whether nothing starts there.
        version: Of the program there.
        running: Jobs that hold their keys.
        waiting: Jobs that do not.
    """

    host: str
    seen: str
    silent_seconds: float
    drained: bool
    version: str
    running: int
    waiting: int

    @property
    def is_silent(self) -> bool:
        """Whether its worker has not spoken for so long that it may be down."""
        return self.silent_seconds > _LONGEST_SILENCE


class FleetKeyStatus(Struct, frozen=True):
    """A key that is held, or has a limit of its own: how many hold it, and how many may."""

    key: str
    held: int
    limit: int | None
    paused: bool


class FleetStatus(Struct, frozen=True):
    """What runs in a fleet, what waits, and why.

    Attributes:
        version: Version of this document.
        jobs: Those that run, and of each host the first ones that wait.
        hosts: All of them, with the numbers of all their jobs.
        keys: Those that are held, or have a limit of their own.
        jobs_left_out: How many more jobs wait.
    """

    version: int
    jobs: tuple[FleetJobStatus, ...]
    hosts: tuple[FleetHostStatus, ...]
    keys: tuple[FleetKeyStatus, ...]
    jobs_left_out: int = 0

    @property
    def running(self) -> int:
        """How many jobs run: they come first, so none is left out unless few are shown."""
        return sum(job.state is FleetJobState.RUNNING for job in self.jobs)

    @property
    def waiting(self) -> int:
        """How many jobs wait, those that are left out among them."""
        return len(self.jobs) - self.running + self.jobs_left_out


class FleetJobResult(Struct, frozen=True):
    """What became of a job.

    Attributes:
        job: Its number.
        host: Where it ran.
        top: The image merged; empty if the row was not one of ours.
        base: The image merged into.
        outcome: In a word.
        exit_code: Of the merge; None if none was run.
        error_code: Of the error that it ended with.
        message: Why, if it is not done.
        ended: When the database had the report.
        report: The whole report of the merge, or its error, as JSON; None if there is none.
    """

    job: int
    host: str
    top: str
    base: str
    outcome: FleetJobOutcome
    exit_code: int | None
    error_code: str | None
    message: str
    ended: str
    report: str | None


class FleetResults(Struct, frozen=True):
    """What became of jobs, the last one first."""

    version: int
    results: tuple[FleetJobResult, ...]


class FleetChange(Struct, frozen=True):
    """What a command has changed in a fleet.

    Attributes:
        version: Version of this document.
        jobs: The numbers of jobs that it was about.
        done: What was changed, a sentence each.
        warnings: What the user should know, a sentence each.
    """

    version: int
    jobs: tuple[int, ...]
    done: tuple[str, ...]
    warnings: tuple[str, ...] = ()
