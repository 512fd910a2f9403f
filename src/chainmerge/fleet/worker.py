# SPDX-License-Identifier: Apache-2.0
"""The worker of a host: takes its jobs, has a child do each, and tells what became of them."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from chainmerge.documents.fleet import FleetJobOutcome
from chainmerge.fleet import engine
from chainmerge.fleet.child import Child, domains_here, held, printed_by
from chainmerge.fleet.database import address, first_line, require_extra
from chainmerge.fleet.errors import FleetMisconfigured, HostTaken
from chainmerge.fleet.in_hand import JobInHand
from chainmerge.fleet.judging import why_not
from chainmerge.fleet.ledger import FleetLedger, StopReason
from chainmerge.fleet.outcome import JobEnding, ending_of
from chainmerge.fleet.places import require_admissible, require_for
from chainmerge.fleet.record import RecordUnusable, record_in
from chainmerge.fleet.scan_record import ScanRecord, scan_record_in
from chainmerge.fleet.words import job_words, look_words, plan_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg import Connection

    from chainmerge.errors import ChainmergeError
    from chainmerge.fleet.record import JobRecord
    from chainmerge.fleet.settings import HostSettings

_TRIES: Final = 3
"""How often a child is started that dies without a word."""
_LAST_WORDS: Final = 5.0
"""Seconds that a worker which is told to end waits for the database."""
_NO_SUCH_DOMAIN: Final = "vm-no-such-domain"
"""The code of that error; to import it would be to have all of live merges in a worker's memory."""
_SEARCH_POLLS: Final = 15
_LEAST_SEARCH: Final = 8.0
"""Seconds that hosts have to say that they run a domain, and looks of an idle worker besides."""


class _Stopped(Exception):
    """The job goes back to the queue."""


class Worker:
    """See the module. ``once``: end when nothing can start any more."""

    def __init__(self, host: HostSettings, *, once: bool) -> None:
        self._host = host
        self._once = once
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._registered = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._in_hand: dict[int, JobInHand] = {}
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
        # Before that it is not known whether the jobs of this host are this worker's.
        await self._registered.wait()
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
        self._registered.set()
        for one in self._in_hand.values():
            one.stop(StopReason.DRAINED)

    # What the ledger calls, from its own thread.

    def registered(self) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        self._loop.call_soon_threadsafe(self._registered.set)

    def granted(self, job: int) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        self._loop.call_soon_threadsafe(self._grant, job)

    def domain_is_on(self, job: int, host: str) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        self._loop.call_soon_threadsafe(self._tell_of_domain, job, host)

    def sought(self, domains: Sequence[str]) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        self._loop.call_soon_threadsafe(self._look_for, frozenset(domains))

    def to_stop(self, job: int, reason: StopReason) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        self._loop.call_soon_threadsafe(self._stop_job, job, reason)

    def looked(self, connection: Connection[Any], refused: frozenset[int]) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        if self._once:
            mine = engine.open_jobs_of(connection, self._host.name)
            # What has been refused its keys waits; whatever else is open runs, or has yet to ask.
            # More than can be claimed never ask while those wait.
            if mine <= refused or len(refused) >= engine.MOST_CLAIMED:
                self._loop.call_soon_threadsafe(self._stopping.set)

    def impossible(self, error: ChainmergeError) -> None:
        """See :class:`chainmerge.fleet.ledger.Listener`."""
        self._error = error
        self._loop.call_soon_threadsafe(self._stop)

    def _grant(self, job: int) -> None:
        # What has stopped in the meantime says so to the ledger, and that frees the keys.
        if job in self._in_hand:
            self._in_hand[job].grant()

    def _tell_of_domain(self, job: int, host: str) -> None:
        if job in self._in_hand:
            self._in_hand[job].domain_is_on(host)

    def _look_for(self, domains: frozenset[str]) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._tell_which_run_here(domains))

    async def _tell_which_run_here(self, domains: frozenset[str]) -> None:
        if found := domains & (await domains_here(self._host.fleet.connect) or frozenset()):
            self._ledger.run_here(found)

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
        one = JobInHand(job, record, self._host)
        self._in_hand[job] = one
        self._ledger.add(one)
        try:
            ending = await self._carried_out(one)
        except OSError as error:
            # No child runs then: none could be started, or its files cannot be written.
            ending = JobEnding(FleetJobOutcome.FAILED, message=str(error))
        # What has ended in the database before has its result.
        await self._told(job, None if ending.outcome is FleetJobOutcome.LOST else ending)
        one.files.remove()
        return ending

    async def _carried_out(self, one: JobInHand) -> JobEnding:
        """Have a job done, again where it was to stop meanwhile; return how it ended.

        Raises:
            _Stopped: the worker ends before.
            Elsewhere: another host is to do it.
        """
        while True:
            ending = await self._not_here(one)
            if ending is None and await one.given_keys(self._ledger.wake):
                async with held(one.files.lock) as lock:
                    ending = await self._done_by_children(one, lock)
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

    async def _not_here(self, one: JobInHand) -> JobEnding | None:
        """Find the host that runs the job's domain; None if that is this one, or there is none.

        The job holds no keys here then, and no child runs for it. It is on the queue of one host
        at any time, as the queue hands it on in one statement, so no two hosts can both do it.

        Raises:
            Elsewhere: another host runs the domain.
        """
        domain = one.record.domain
        if domain is None:
            return None
        async with held(one.files.lock):
            if await self._runs_here(domain.uuid):
                return None
            self._ledger.seek(one.job, domain.uuid)
            patience = _LEAST_SEARCH + _SEARCH_POLLS * self._host.fleet.poll
            found = await one.found_domain(patience)
            if one.reason is not None or found == self._host.name:
                return None
            if found is None:
                sentence = f"no host of the fleet runs the domain {domain.name}"
                return JobEnding(
                    FleetJobOutcome.REFUSED, error_code=_NO_SUCH_DOMAIN, message=sentence
                )
            await self._told(one.job, None)
            one.files.remove()
        raise engine.Elsewhere(found)

    async def _runs_here(self, domain: str) -> bool:
        here = await domains_here(self._host.fleet.connect)
        # Where libvirt does not answer, the merge says so.
        return here is None or domain in here

    async def _done_by_children(self, one: JobInHand, lock: int) -> JobEnding | None:
        """Have children do a job; return how it ended, None if it was to stop before."""
        ending = ending_of(one.files.lines(), None)
        if ending is not None or one.reason is not None:
            return ending
        if isinstance(one.record, ScanRecord):
            return await self._ended(one, look_words(self._host), lock)
        domain = one.record.domain
        if domain is not None and not await self._runs_here(domain.uuid):
            # It has moved while the job waited for its keys.
            return None
        printed = await printed_by(plan_words(one.record, self._host), lock)
        judged = await asyncio.to_thread(why_not, one.record, printed, self._host, one.files)
        if judged is not None:
            return judged
        return await self._ended(one, job_words(one.record, self._host), lock)

    async def _ended(self, one: JobInHand, words: Sequence[str], lock: int) -> JobEnding | None:
        """Start children until one says how it ended; None if it was to stop before."""
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
        died = f"it died {_TRIES} times without a report, at last with status {status}"
        return JobEnding(FleetJobOutcome.FAILED, status, message=died)

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
        asyncio.get_running_loop().set_exception_handler(_tell_of_error)
        await Worker(host, once=once).work()

    with _sole_worker(host):
        asyncio.run(until_told())


def _tell_of_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Have a line for what the database did not hear of a job: the queue says it later."""
    import psycopg  # noqa: PLC0415

    error = context.get("exception")
    cause = error and (error.__cause__ or error.__context__)
    if isinstance(cause, psycopg.Error):
        sys.stderr.write(f"the queue does not know yet what became of a job: {first_line(cause)}\n")
    else:
        loop.default_exception_handler(context)


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
