# SPDX-License-Identifier: Apache-2.0
"""The stages of a merge, and how far one has come."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from msgspec import Struct


class Stage(StrEnum):
    """What a merge is doing, in the order in which it happens."""

    LOCK = "lock"
    WAIT = "wait"
    PLAN = "plan"
    SNAPSHOTS = "snapshots"
    HIDE = "hide"
    PRUNE = "prune"
    EXTEND = "extend"
    COPY = "copy"
    READ_BACK = "read-back"
    BITMAPS = "bitmaps"
    VERIFY = "verify"
    SETTLE = "settle"


class ProgressEvent(Struct, frozen=True):
    """How far a stage has come.

    Attributes:
        stage: What is going on.
        done: Bytes dealt with so far.
        total: Bytes to deal with; 0 for a stage without a measure.
        rate: Recent rate of this stage in bytes per second; 0 if it is not known. In a running
            VM *total* can grow, so that *done* and *total* alone say little of what remains.
        top: The overlay that is merged, where several disks are; else empty.
    """

    stage: Stage
    done: int = 0
    total: int = 0
    rate: int = 0
    top: str = ""


OnProgress = Callable[[ProgressEvent], None]
ShouldStop = Callable[[], bool]


def never() -> bool:
    """In place of ``should_stop`` where nobody asks for it."""
    return False


def unheard(_event: ProgressEvent) -> None:
    """In place of ``on_progress`` where nobody listens."""
