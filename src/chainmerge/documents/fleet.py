# SPDX-License-Identifier: Apache-2.0
"""What the commands of the fleet print. Times are ISO 8601 in UTC."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct


class FleetJobOutcome(StrEnum):
    """What became of a job."""

    DONE = "done"
    """It merged, and verified the result."""
    ALREADY = "already"
    """All was merged before."""
    CANCELLED = "cancelled"
    """Somebody wanted that; what was begun is as `chainmerge status` says."""
    REFUSED = "refused"
    """The merge was refused, and nothing was changed."""
    FAILED = "failed"
    """The merge did not work."""
    UNKNOWN = "unknown"
    """Nobody can tell what the disk holds."""
    REJECTED = "rejected"
    """It asked for what jobs may not do on its host; nothing was run."""
    PLAN_CHANGED = "plan-changed"
    """The images are not what they were when it was planned; nothing was run."""
    LOST = "lost"
    """Its host was released while it ran there."""


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
