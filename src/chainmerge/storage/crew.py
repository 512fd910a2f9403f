# SPDX-License-Identifier: Apache-2.0
"""Threads that each have a buffer, and the work they have taken on."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from chainmerge.storage.direct import ALIGNMENT, aligned_buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class Crew:
    """Does a limited number of jobs at a time. To be used from one thread."""

    def __init__(self, size: int, buffer_bytes: int) -> None:
        """Hire it.

        Args:
            size: How many jobs at a time.
            buffer_bytes: What most jobs need; each thread's memory.
        """
        self._size = size
        self._executor = ThreadPoolExecutor(size, thread_name_prefix="transfer")
        self._in_flight: dict[Future[Any], Callable[[Any], None]] = {}
        # A little more than asked for, so that a range can be widened to aligned ends.
        self._buffer_bytes = buffer_bytes + 2 * ALIGNMENT
        self._buffers: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(size):
            self._buffers.put(aligned_buffer(self._buffer_bytes))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, jobs are submitted; afterwards all are done, or after an error no longer run.

        Raises:
            Exception: the first that a job, or what was to be done with its result, raised.
        """
        try:
            yield
            self.drain()
        except BaseException:
            wait(self._in_flight)
            self._in_flight.clear()
            raise

    def submit(
        self, job: Callable[[memoryview], T], buffer_bytes: int, done: Callable[[T], None]
    ) -> None:
        """Have a job done; returns when somebody has begun, or is about to.

        Args:
            job: Called in another thread, with an aligned buffer.
            buffer_bytes: What the job needs, not counting :data:`ALIGNMENT` at both ends.
            done: Called with the job's result, in this thread, by a later call.
        """
        self._collect()
        while len(self._in_flight) >= self._size:
            wait(self._in_flight, return_when=FIRST_COMPLETED)
            self._collect()
        self._in_flight[self._executor.submit(self._run, job, buffer_bytes)] = done

    def drain(self) -> None:
        """Return when no job is left."""
        while self._in_flight:
            wait(self._in_flight, return_when=FIRST_COMPLETED)
            self._collect()

    def close(self) -> None:
        """Dismiss it."""
        self._executor.shutdown()

    def _collect(self) -> None:
        for future in [future for future in self._in_flight if future.done()]:
            done = self._in_flight.pop(future)
            done(future.result())

    def _run(self, job: Callable[[memoryview], T], buffer_bytes: int) -> T:
        if buffer_bytes + 2 * ALIGNMENT > self._buffer_bytes:
            return job(aligned_buffer(buffer_bytes + 2 * ALIGNMENT))
        buffer = self._buffers.get()
        try:
            return job(buffer)
        finally:
            self._buffers.put(buffer)
