# SPDX-License-Identifier: Apache-2.0
"""Whether the copy catches up with what the guest writes, and what is done where it does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.options import StallChoice

if TYPE_CHECKING:
    from chainmerge.live.port import JobState

# What remains must have become less within so many seconds, or the copy does not catch up.
PATIENCE_SECONDS: Final = 15.0
# The guest is slowed down to this part of the copy's rate, and then to half of that, and so on.
_FIRST_SHARE: Final = 0.5
LEAST_BYTES_PER_SECOND: Final = 256 << 10


class Remedy(StrEnum):
    """What is to be done now."""

    NOTHING = "nothing"
    THROTTLE = "throttle"
    ABORT = "abort"


class Convergence(Struct):
    """Watches how much remains to be copied.

    Attributes:
        on_stall: What to do where it does not become less.
        deadline: Seconds from the start in which it is to be done; None for no limit.
        clock: Seconds, from anywhere.
        rate: Bytes a second that were copied lately.
        limit: What the guest may write now, in bytes a second; None for what it likes.
    """

    on_stall: StallChoice
    deadline: float | None
    clock: Callable[[], float] = time.monotonic
    rate: float = 0.0
    limit: int | None = None
    _started: float | None = None
    _least: int | None = None
    _least_at: float = 0.0
    _seen: tuple[float, int] | None = None

    @property
    def seconds(self) -> float:
        """How long it has been watched."""
        return 0.0 if self._started is None else self.clock() - self._started

    def observe(self, job: JobState) -> None:
        """Look at a job that copies."""
        now = self.clock()
        if self._started is None:
            self._started = self._least_at = now
        if self._seen is not None:
            before, was = self._seen
            if now - before < 1.0:
                return
            self.rate = max(job.done - was, 0) / (now - before)
        self._seen = (now, job.done)

    def judge(self, job: JobState) -> Remedy:
        """Say what to do about a job that has been observed."""
        assert self._started is not None
        now = self.clock()
        remaining = max(job.total - job.done, 0)
        if self._least is None or remaining < self._least:
            self._least, self._least_at = remaining, now
        late = self.deadline is not None and now - self._started > self.deadline
        stuck = now - self._least_at > PATIENCE_SECONDS
        if not (late or stuck) or self.on_stall == "wait":
            return Remedy.NOTHING
        if self.on_stall == "abort":
            return Remedy.ABORT
        return self._slow_down(now)

    def _slow_down(self, now: float) -> Remedy:
        if self.limit is None:
            wanted = int(self.rate * _FIRST_SHARE)
        elif now - self._least_at > PATIENCE_SECONDS:
            wanted = self.limit // 2
        else:
            return Remedy.NOTHING
        wanted = max(wanted, LEAST_BYTES_PER_SECOND)
        if wanted == self.limit:
            return Remedy.NOTHING
        self.limit = wanted
        # It is given the same time again before it is slowed down further.
        self._least_at = now
        return Remedy.THROTTLE
