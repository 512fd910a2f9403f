# SPDX-License-Identifier: Apache-2.0
"""The worker of a host: takes its jobs, has a child do each, and tells what became of them."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from chainmerge.documents.fleet import FleetJobOutcome
from chainmerge.documents.plan import MergePlan, Progress
from chainmerge.fleet import engine
from chainmerge.fleet.chain_state import digest_of_idle_chain
from chainmerge.fleet.child import (
    Child,
    files_of,
    held,
    look_words,
    merge_words,
    output_of,
    plan_words,
)
from chainmerge.fleet.database import address, require_extra
from chainmerge.fleet.digest import images_of_chain, plan_digest_of
from chainmerge.fleet.errors import FleetMisconfigured, HostTaken
from chainmerge.fleet.ledger import FleetLedger, StopReason
from chainmerge.fleet.outcome import JobEnding, ending_of
from chainmerge.fleet.places import base_id_of, require_admissible, require_for
from chainmerge.fleet.record import FLEET_KEY, RecordUnusable, record_in
from chainmerge.fleet.scan_record import ScanRecord, scan_record_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from psycopg import Connection

    from chainmerge.errors import ChainmergeError
    from chainmerge.fleet.record import JobRecord
    from chainmerge.fleet.settings import HostSettings

_TRIES: Final = 3
"""How often a child is started that dies without a word."""
_LAST_WORDS: Final = 5.0
"""Seconds that a worker which is told to end waits for the database."""


class _Stopped(Exception):
    """The job goes back to the queue."""


class _JobInHand:
    """A job that the worker has claimed, until it has ended or is put back."""

    def __init__(self, job: int, record: JobRecord | ScanRecord, host: HostSettings) -> None:
        self.job = job
        self.record = record
        self.keys = (*record.keys, FLEET_KEY)
        self.priority = record.priority
        self.files = files_of(Path(host.fleet.state), job, record.label)
        self.child: Child | None = None
        self.reason: StopReason | None = None
        self._wants_keys = False
        self._answered = asyncio.Event()
        self._has_keys = False

    @property
    def waits_for_keys(self) -> bool:
        """Whether it may be given its keys now."""
        return self._wants_keys

    @property
    def runs(self) -> bool:
        """Whether it has its keys."""
        return self._has_keys

    def newest_line(self) -> str:
        """How far it is."""
        return self.files.newest_line()

    async def given_keys(self, wake: Callable[[], None]) -> bool:
        """Wait for the keys; whether they were given before it was to stop."""
        if self.reason is None:
            self._answered.clear()
            self._wants_keys = True
            wake()
            await self._answered.wait()
            self._wants_keys = False
        return self._has_keys

    def grant(self) -> None:
        """Give it its keys, if it still wants them."""
        if self._wants_keys:
            self._has_keys = True
            self._wants_keys = False
            self._answered.set()

    def give_up_keys(self) -> None:
        """Note that it has them no more."""
        self._has_keys = False

    def stop(self, reason: StopReason) -> None:
        """Ask it to stop, at the next safe point if it merges."""
        if self.reason in {StopReason.CANCELLED, StopReason.OVER}:
            return
        self.reason = reason
        self._answered.set()
        if self.child is not None:
            self.child.stop()


class Worker:
    """See the module. ``once``: end when nothing can start any more."""

    def __init__(self, host: HostSettings, *, once: bool) -> None:
        self._host = host
        self._once = once
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._in_hand: dict[int, _JobInHand] = {}
        self._tasks: dict[int, asyncio.Task[JobEnding]] = {}
        self._error: ChainmergeError | None = None
        self._ledger = FleetLedger(host, self)

    async def work(self) -> None:
        """Do jobs until told to end.

        Raises:
            HostTaken: another machine or worker has the name.
            FleetNotSetUp: the database holds no fleet of this version.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        self._ledger.start()
        database = address(self._host.fleet.database)
        poll = self._host.fleet.poll
        await engine.serve(database, self._host.name, self._run, self._stopping, poll)
        self._stop()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await asyncio.to_thread(self._ledger.close)
        if self._error is not None:
            raise self._error

    def _stop(self) -> None:
        self._stopping.set()
        for one in self._in_hand.values():
            one.stop(StopReason.DRAINED)

    # What the ledger calls, from its own thread.

    def granted(self, job: int) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        self._loop.call_soon_threadsafe(self._grant, job)

    def to_stop(self, job: int, reason: StopReason) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        self._loop.call_soon_threadsafe(self._stop_job, job, reason)

    def looked(self, connection: Connection[Any], refused: frozenset[int]) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        if self._once:
            open_states = {engine.QueueState.QUEUED, engine.QueueState.CLAIMED}
            mine = {
                job.id
                for job in engine.jobs(connection)
                if job.host == self._host.name and job.state in open_states
            }
            # What has been refused its keys waits; whatever else is open runs, or has yet to ask.
            if mine <= refused:
                self._loop.call_soon_threadsafe(self._stopping.set)

    def impossible(self, error: ChainmergeError) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        self._error = error
        self._loop.call_soon_threadsafe(self._stop)

    def _grant(self, job: int) -> None:
        # What has stopped in the meantime says so to the ledger, and that frees the keys.
        if job in self._in_hand:
            self._in_hand[job].grant()

    def _stop_job(self, job: int, reason: StopReason) -> None:
        if job in self._in_hand:
            self._in_hand[job].stop(reason)

    # A job, from the queue to its end.

    async def _run(self, job: int, arguments: Any) -> None:
        """Do a job, or wait for it if it is being done; see :func:`engine.serve`."""
        if self._stopping.is_set():
            raise asyncio.CancelledError
        if job not in self._tasks:
            self._tasks[job] = asyncio.create_task(self._do(job, arguments))
            self._tasks[job].add_done_callback(lambda _: self._forget(job))
        task = self._tasks[job]
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            # What has ended by then is over for the queue, too.
            if not task.done():
                raise
        try:
            ending = task.result()
        except _Stopped:
            raise asyncio.CancelledError from None
        if not ending.is_success:
            raise engine.Unsuccessful(ending.outcome.value)

    def _forget(self, job: int) -> None:
        self._in_hand.pop(job, None)
        self._ledger.drop(job)
        task = self._tasks.pop(job)
        if not task.cancelled():
            # Retrieved here, as the engine may have stopped waiting for it.
            task.exception()

    async def _do(self, job: int, arguments: Any) -> JobEnding:
        try:
            record = scan_record_in(arguments) or record_in(arguments)
            # A server of files that hangs must not hold up other jobs.
            await asyncio.to_thread(_require_admissible, record, self._host)
        except RecordUnusable as error:
            ending = JobEnding(FleetJobOutcome.REJECTED, message=str(error))
            await self._told(job, ending)
            return ending
        one = _JobInHand(job, record, self._host)
        self._in_hand[job] = one
        self._ledger.add(one)
        ending = await self._carried_out(one)
        # What has ended in the database before has its result.
        await self._told(job, None if ending.outcome is FleetJobOutcome.LOST else ending)
        one.files.remove()
        return ending

    async def _carried_out(self, one: _JobInHand) -> JobEnding:
        """Have a job done, again where its host was drained meanwhile; return how it ended."""
        while True:
            ending = None
            if await one.given_keys(self._ledger.wake):
                async with held(one.files.lock) as lock:
                    ending = await self._merged(one, lock)
            if ending is not None:
                return ending
            if one.reason is StopReason.CANCELLED:
                return JobEnding(FleetJobOutcome.CANCELLED, message="cancelled before it ended")
            if one.reason is StopReason.OVER:
                return JobEnding(
                    FleetJobOutcome.LOST, message="it had ended in the database before"
                )
            await self._told(one.job, None)
            one.give_up_keys()
            if self._stopping.is_set():
                raise _Stopped
            one.reason = None

    async def _merged(self, one: _JobInHand, lock: int) -> JobEnding | None:
        """Have children merge until one says how it ended; None if it was to stop before."""
        ending = ending_of(one.files.lines(), None)
        if ending is not None or one.reason is not None:
            return ending
        if isinstance(one.record, ScanRecord):
            return await self._ended(one, look_words(self._host), lock)
        changed = await self._changed(one.record, lock)
        if changed is not None:
            return changed
        return await self._ended(one, merge_words(one.record, self._host), lock)

    async def _ended(self, one: _JobInHand, words: Sequence[str], lock: int) -> JobEnding | None:
        """As above, of children that are told these words."""
        status = None
        for _ in range(_TRIES):
            if one.reason is not None:
                return None
            one.child = await Child.started(words, one.files.spool, lock)
            if one.reason is not None:
                one.child.stop()
            status = await one.child.ended()
            one.child = None
            ending = ending_of(one.files.lines(), status)
            if ending is not None:
                return ending
        if one.reason is not None:
            return None
        died = f"the merge died {_TRIES} times without a report, at last with status {status}"
        return JobEnding(FleetJobOutcome.FAILED, status, message=died)

    async def _changed(self, record: JobRecord, lock: int) -> JobEnding | None:
        """Say so if images are not those of the plan any more; None if the merge may begin.

        A merge that has begun is finished by its own records, whatever a plan says now.
        """
        printed = await output_of(plan_words(record, self._host), lock)
        try:
            plan = msgspec.json.decode(printed, type=MergePlan)
        except msgspec.DecodeError:
            # There is no plan: the merge says why.
            return None
        if plan.progress is not Progress.NEW:
            return None
        (disk,) = record.disks
        if base_id_of(disk.base) != disk.base_id:
            reason = f"{disk.base} is another image"
        elif await self._digest_now(record, plan) != record.plan_digest:
            reason = f"a merge of {disk.top} would do something else now than when it was planned"
        else:
            return None
        return JobEnding(FleetJobOutcome.PLAN_CHANGED, message=reason)

    async def _digest_now(self, record: JobRecord, plan: MergePlan) -> str:
        """The digest that the record has, as it is now; nothing if that cannot be told."""
        if record.judged_by == "plan":
            return plan_digest_of(plan)
        try:
            return await asyncio.to_thread(digest_of_idle_chain, images_of_chain(plan))
        except OSError:
            return ""

    async def _told(self, job: int, ending: JobEnding | None) -> None:
        """Wait until the database knows, however long it is away.

        Raises:
            _Stopped: the worker ends before. What is not told is found again in the spool file,
                or by the merge itself.
        """
        told = asyncio.Event()
        self._ledger.say(job, ending, lambda: self._loop.call_soon_threadsafe(told.set))
        waits = asyncio.create_task(told.wait())
        stops = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({waits, stops}, return_when=asyncio.FIRST_COMPLETED)
        stops.cancel()
        await asyncio.wait({waits}, timeout=_LAST_WORDS)
        if not waits.done():
            waits.cancel()
            raise _Stopped


def _require_admissible(record: JobRecord | ScanRecord, host: HostSettings) -> None:
    if isinstance(record, ScanRecord):
        require_for(record.host, host)
    else:
        require_admissible(record, host)


def work(host: HostSettings, *, once: bool) -> None:
    """Do the jobs of this host: until a signal says to end, or *once*, until nothing can start.

    A merge that runs then is stopped at the next safe point, and goes on when a worker starts.

    Raises:
        HostTaken: another machine or worker has the name.
        FleetExtraMissing: what talks to the database is not installed.
        FleetNotSetUp: the database holds no fleet of this version.
        FleetMisconfigured: the directory where reports wait cannot be used.
    """
    require_extra()
    # Its messages have records in them; what became of a job is in the results.
    logging.getLogger("procrastinate").setLevel(logging.CRITICAL + 1)
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL + 1)

    async def until_told() -> None:
        await Worker(host, once=once).work()

    with _sole_worker(host):
        asyncio.run(until_told())


@contextmanager
def _sole_worker(host: HostSettings) -> Iterator[None]:
    state = Path(host.fleet.state)
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(state / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FleetMisconfigured(str(state), error.strerror or str(error)) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HostTaken(host.name, "a worker runs on this machine already") from None
        yield
    finally:
        os.close(descriptor)
