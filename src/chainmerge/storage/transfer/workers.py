# SPDX-License-Identifier: Apache-2.0
"""Threads that each have a buffer, and the work they have taken on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from chainmerge.storage.errors import OutOfMemory
from chainmerge.storage.transfer.direct import ALIGNMENT, aligned_buffer

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

_Work: TypeAlias = Callable[[memoryview], "_Rest"]
_Rest: TypeAlias = Callable[[], None]
"""What is left to do for a job in the thread that has submitted it; raises what it raised."""

# What a trial of a depth takes, for each job at a time. Fewer would not fill the queue.
_JOBS_OF_A_TRIAL: Final = 8
# More at a time stay if they do this many times as much.
_WORTHWHILE: Final = 1.3


class Depth:
    """How many jobs at a time: few, and more as long as that gets more done.

    Storage that answers at once is busy with a few requests, and each thread more costs memory
    and time to take turns; storage behind a network, or of many disks, wants more.
    """

    def __init__(self, first: int, most: int) -> None:
        """Try *first*, and twice as many each time, up to *most*."""
        self.limit = first
        self._most = most
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Jobs are about to come, perhaps of another kind than before; seconds of any clock."""
        self._best = (0.0, self.limit)
        self._try(now)

    def finished(self, now: float) -> None:
        """One job is done."""
        self._left -= 1
        if self._left:
            return
        rate = _JOBS_OF_A_TRIAL * self.limit / max(now - self._since, 1e-9)
        best, its_limit = self._best
        if rate < best * _WORTHWHILE:
            self.limit = its_limit
        elif self.limit < self._most:
            self._best = (rate, self.limit)
            self.limit = min(2 * self.limit, self._most)
            self._try(now)

    def _try(self, now: float) -> None:
        self._since = now
        self._left = _JOBS_OF_A_TRIAL * self.limit


class Workers:
    """Does a limited number of jobs at a time. To be used from one thread."""

    def __init__(self, depth: Depth, buffer_bytes: int) -> None:
        """Start with no thread; each is made when it is needed.

        Args:
            depth: How many jobs at a time.
            buffer_bytes: What most jobs need; each thread's memory.
        """
        self._depth = depth
        # A little more than asked for, so that a range can be widened to aligned ends.
        self._buffer_bytes = buffer_bytes + 2 * ALIGNMENT
        self._most_threads = sys.maxsize
        self._reset()

    def _reset(self) -> None:
        self._threads: list[threading.Thread] = []
        self._to_do: SimpleQueue[_Work | None] = SimpleQueue()
        self._done: SimpleQueue[_Rest] = SimpleQueue()
        self._unfinished = 0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, jobs are submitted; afterwards all are done, or after an error no longer run.

        Raises:
            Exception: the first that a job, or what was to be done with its result, raised.
        """
        self._depth.begin(time.monotonic())
        try:
            yield
            self.drain()
        except BaseException:
            self.close()
            raise

    def submit(
        self, job: Callable[[memoryview], T], buffer_bytes: int, done: Callable[[T], None]
    ) -> None:
        """Have a job done; returns when a thread has begun with it, or is about to.

        Args:
            job: Called in another thread, with an aligned buffer.
            buffer_bytes: What the job needs, not counting :data:`ALIGNMENT` at both ends.
            done: Called with the job's result, in this thread, by a later call.
        """
        while self._unfinished >= self._limit or not self._done.empty():
            self._finish_one()

        def work(buffer: memoryview) -> _Rest:
            needed = buffer_bytes + 2 * ALIGNMENT
            result = job(buffer if needed <= len(buffer) else aligned_buffer(needed))
            return lambda: done(result)

        if self._unfinished == len(self._threads):
            self._add_thread()
        self._unfinished += 1
        self._to_do.put(work)

    @property
    def _limit(self) -> int:
        return min(self._depth.limit, self._most_threads)

    def drain(self) -> None:
        """Return when no job is left."""
        while self._unfinished:
            self._finish_one()

    def close(self) -> None:
        """End the threads once they have done what was begun; results are dropped."""
        for _ in self._threads:
            self._to_do.put(None)
        for thread in self._threads:
            thread.join()
        self._reset()

    def _add_thread(self) -> None:
        try:
            arguments = (self._to_do, self._done, aligned_buffer(self._buffer_bytes))
            # Nobody waits for it where the program ends because of an error that is not ours.
            thread = threading.Thread(
                target=_work_off, args=arguments, name="transfer", daemon=True
            )
            thread.start()
        except (MemoryError, RuntimeError) as error:
            # No memory for it, or no more threads for this process: those that there are do.
            if not self._threads:
                raise OutOfMemory from error
            self._most_threads = len(self._threads)
            return
        self._threads.append(thread)

    def _finish_one(self) -> None:
        rest = self._done.get()
        self._unfinished -= 1
        self._depth.finished(time.monotonic())
        rest()


def _work_off(
    to_do: SimpleQueue[_Work | None], done: SimpleQueue[_Rest], buffer: memoryview
) -> None:
    while (work := to_do.get()) is not None:
        try:
            rest = work(buffer)
        except BaseException as error:  # noqa: BLE001 (it is raised where the job came from)
            rest = _raising(error)
        done.put(rest)


def _raising(error: BaseException) -> _Rest:
    def rest() -> None:
        raise error

    return rest
