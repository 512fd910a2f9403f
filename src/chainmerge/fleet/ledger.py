# SPDX-License-Identifier: Apache-2.0
"""All that a worker says to the database and hears from it, by a thread of its own.

So whatever the database does, the loop that starts merges and sees them end does not wait for it:
without a database nothing new starts, what runs comes to its end, and what is to be said is said
later.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol

from msgspec import Struct

from chainmerge.__about__ import __version__
from chainmerge.fleet.database import address, first_line, require_set_up
from chainmerge.fleet.errors import FleetNotSetUp, HostTaken
from chainmerge.fleet.outcome import JobEnding
from chainmerge.fleet.record import IMAGE_PREFIX

if TYPE_CHECKING:
    from psycopg import Connection

    from chainmerge.errors import ChainmergeError
    from chainmerge.fleet.settings import HostSettings

_LONGEST_BUSY_PAUSE: Final = 1.0
"""Seconds between two looks while a job waits for its keys, or runs."""
_POLLS_WHEN_IDLE: Final = 5
_PROGRESS_PAUSE: Final = 2.0
_RECONNECT_PAUSE: Final = 1.0
_LAST_WORDS: Final = 10.0
"""Seconds that a worker which is told to end gives a database that does not answer."""

_REASONS: Final = {
    "connected": "a worker of this name is connected to the database",
    "login": "this login of the database is another host's",
    "another": "it belongs to another machine, or to another login of the database",
}


class StopReason(Enum):
    """Why a job is to stop."""

    CANCELLED = "somebody wants it to end"
    DRAINED = "its host is to stop"
    WINDOW = "its window has ended"
    LOST_KEYS = "its keys were given up by an operator"
    OVER = "it has ended in the database"


class Held(Protocol):
    """A job in a worker's hands, as the ledger sees it."""

    @property
    def job(self) -> int:
        """Its number."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """What it needs."""
        ...

    @property
    def priority(self) -> int:
        """The highest goes first."""
        ...

    @property
    def waits_for_keys(self) -> bool:
        """Whether it may be given its keys now."""
        ...

    @property
    def waits_for_window(self) -> bool:
        """Whether it is the time of day that keeps it from its keys."""
        ...

    @property
    def has_outrun_window(self) -> bool:
        """Whether it runs, and is to stop, as its window has ended."""
        ...

    @property
    def runs(self) -> bool:
        """Whether there is progress to tell of."""
        ...

    def newest_line(self) -> str:
        """How far it is."""
        ...


class Listener(Protocol):
    """What the ledger calls, from its own thread."""

    def registered(self) -> None:
        """The host has its name, and may claim jobs."""
        ...

    def granted(self, job: int) -> None:
        """A job has its keys."""
        ...

    def domain_is_on(self, job: int, host: str) -> None:
        """A host runs the domain that a job is for."""
        ...

    def sought(self, domains: Sequence[str]) -> None:
        """Jobs of other hosts are for these domains, and nobody knows who runs them."""
        ...

    def to_stop(self, job: int, reason: StopReason) -> None:
        """A job is to stop."""
        ...

    def looked(self, connection: Connection[Any], refused: frozenset[int]) -> None:
        """Jobs that wait have been given what there was; *refused* cannot start now."""
        ...

    def impossible(self, error: ChainmergeError) -> None:
        """The worker cannot work at all."""
        ...


class _Saying(Struct, frozen=True):
    """Something to be told of a job: how it ended, or that it goes back to the queue."""

    job: int
    ending: JobEnding | None
    told: Callable[[], object]


class _Heard(Struct, frozen=True):
    """What is known of keys before any are asked for.

    Thousands of jobs may wait for a few keys: only those are asked for that can be had.

    Attributes:
        taken_up: Keys that nobody may take now.
        holding: Jobs that have theirs from an earlier run.
        stops_all: Whether nothing may run here.
    """

    taken_up: frozenset[str]
    holding: frozenset[int]
    stops_all: bool

    def lets_start(self, one: Held) -> bool:
        """Whether a job may be given its keys."""
        if self.stops_all:
            return False
        return one.job in self.holding or self.taken_up.isdisjoint(one.keys)


class FleetLedger(threading.Thread):
    """The thread."""

    def __init__(self, host: HostSettings, listener: Listener) -> None:
        super().__init__(name="ledger", daemon=True)
        self._host = host
        self._listener = listener
        self._in_hand: dict[int, Held] = {}
        self._sayings: deque[_Saying] = deque()
        self._sought: dict[int, str] = {}
        self._domains_here: frozenset[str] = frozenset()
        self._woken = threading.Event()
        self._closing = threading.Event()
        self._connection: Connection[Any] | None = None
        self._has_registered = False
        self._told_why = ""
        self._progress_due = 0.0
        self._busy_pause = min(_LONGEST_BUSY_PAUSE, host.fleet.poll)
        self._idle_pause = host.fleet.poll * _POLLS_WHEN_IDLE

    def add(self, job: Held) -> None:
        """Have keys taken for a job, and its progress told."""
        self._in_hand[job.job] = job
        self._woken.set()

    def drop(self, job: int) -> None:
        """Forget a job."""
        self._in_hand.pop(job, None)
        self._sought.pop(job, None)

    def say(self, job: int, ending: JobEnding | None, told: Callable[[], object]) -> None:
        """Have it stored how a job ended, or, if it has not, that it goes back to the queue.

        *told* is called, from the ledger's thread, once that is so.
        """
        # What is not sought yet need not be any more, and would be for ever if it was afterwards.
        self._sought.pop(job, None)
        self._sayings.append(_Saying(job, ending, told))
        self._woken.set()

    def seek(self, job: int, domain: str) -> None:
        """Ask all hosts which of them runs the domain that a job is for."""
        self._sought[job] = domain
        self._woken.set()

    def run_here(self, domains: frozenset[str]) -> None:
        """Have it told that these of the domains which others seek run here."""
        self._domains_here = domains
        self._woken.set()

    def wake(self) -> None:
        """Look now."""
        self._woken.set()

    def close(self) -> None:
        """Say what is left to say, and end the thread."""
        self._closing.set()
        self._woken.set()
        self.join(_LAST_WORDS)

    def run(self) -> None:
        """Speak with the database until closed."""
        import psycopg  # noqa: PLC0415

        pause = 0.0
        while True:
            self._woken.wait(pause)
            self._woken.clear()
            closing = self._closing.is_set()
            # By the clock alone: a window ends whether or not the database is there.
            self._close_windows()
            try:
                self._speak()
                pause = self._busy_pause if self._is_busy() else self._idle_pause
                self._told_why = ""
            except (psycopg.Error, OSError) as error:
                self._disconnect()
                self._tell_why(first_line(error))
                pause = _RECONNECT_PAUSE
            except (HostTaken, FleetNotSetUp) as error:
                self._disconnect()
                pause = _RECONNECT_PAUSE
                # Where it was ours before, the server has not noticed yet that we were cut off.
                if not self._has_registered:
                    self._listener.impossible(error)
                    return
            if closing and not self._sayings:
                self._disconnect()
                return

    def _tell_why(self, reason: str) -> None:
        """Have a line for why nothing starts, as long as the reason is the same."""
        if reason != self._told_why:
            self._told_why = reason
            sys.stderr.write(f"no job starts without the database of the fleet: {reason}\n")

    def _is_busy(self) -> bool:
        held = dict(self._in_hand).values()
        return any(not one.waits_for_window for one in held)

    def _close_windows(self) -> None:
        for job, one in dict(self._in_hand).items():
            if one.has_outrun_window:
                self._listener.to_stop(job, StopReason.WINDOW)

    def _speak(self) -> None:
        connection = self._connected()
        while self._sayings:
            saying = self._sayings[0]
            self._tell(connection, saying)
            self._sayings.popleft()
            saying.told()
        self._look_for_domains(connection)
        held = list(dict(self._in_hand).values())
        shut_out = frozenset(one.job for one in held if one.waits_for_window)
        waiting = [one for one in held if one.waits_for_keys]
        heard = self._report_progress(connection, waiting)
        ready = [one for one in waiting if heard.lets_start(one)]
        refused = frozenset(one.job for one in waiting) - self._take_keys(connection, ready)
        self._listener.looked(connection, refused | shut_out)

    def _look_for_domains(self, connection: Connection[Any]) -> None:
        for job, domain in dict(self._sought).items():
            connection.execute("SELECT seek_domain(%s, %s, %s)", (self._host.name, job, domain))
            self._sought.pop(job, None)
        if self._domains_here:
            domains = list(self._domains_here)
            connection.execute("SELECT run_here(%s, %s)", (self._host.name, domains))
            self._domains_here = frozenset()

    def _tell(self, connection: Connection[Any], saying: _Saying) -> None:
        ending = saying.ending
        if ending is None:
            connection.execute("SELECT put_back(%s, %s)", (self._host.name, saying.job))
            return
        connection.execute(
            "SELECT end_job(%s, %s, %s, %s, %s, %s, %s)",
            (
                self._host.name,
                saying.job,
                ending.outcome.value,
                ending.exit_code,
                ending.error_code,
                _storable(ending.message),
                ending.report,
            ),
        )

    def _report_progress(self, connection: Connection[Any], waiting: Sequence[Held]) -> _Heard:
        """Tell how far jobs are, and hear what is to stop, and where domains are."""
        now = time.monotonic()
        lines: dict[int, str] = {}
        held = dict(self._in_hand)
        at_work = [job for job, one in held.items() if one.runs]
        if now >= self._progress_due:
            lines = {job: _storable(held[job].newest_line()) for job in at_work}
            self._progress_due = now + _PROGRESS_PAUSE
        wanted = {key for one in waiting for key in one.keys if not key.startswith(IMAGE_PREFIX)}
        row = connection.execute(
            "SELECT unwanted, ended, stop_all, taken_up, holding, sought, found_jobs, found_on"
            " FROM speak(%s, %s::bigint[], %s::bigint[], %s::text[], %s::text[])",
            (self._host.name, list(held), list(lines), list(lines.values()), sorted(wanted)),
        ).fetchone()
        assert row is not None
        unwanted, ended, stop_all, taken_up, holding, sought, found_jobs, found_on = row
        if sought:
            self._listener.sought(sought)
        for job, host in zip(found_jobs, found_on, strict=True):
            self._listener.domain_is_on(job, host)
        # Its host was released, and its job retried, before this worker could be told.
        for job in set(at_work) - set(holding) - set(ended):
            self._listener.to_stop(job, StopReason.LOST_KEYS)
        for job in ended:
            self._listener.to_stop(job, StopReason.OVER)
        for job in unwanted:
            self._listener.to_stop(job, StopReason.CANCELLED)
        if stop_all:
            for job, one in held.items():
                if one.runs:
                    self._listener.to_stop(job, StopReason.DRAINED)
        return _Heard(frozenset(taken_up), frozenset(holding), bool(stop_all))

    def _take_keys(self, connection: Connection[Any], waiting: Sequence[Held]) -> set[int]:
        """Take keys for jobs that wait for them; return for which there were all."""
        if not waiting:
            return set()
        in_order = sorted(waiting, key=lambda one: (-one.priority, one.job))
        candidates = [{"job": one.job, "keys": list(one.keys)} for one in in_order]
        taken = connection.execute(
            "SELECT * FROM take_leases(%s, %s::jsonb)", (self._host.name, json.dumps(candidates))
        ).fetchall()
        for (job,) in taken:
            self._listener.granted(job)
        return {job for (job,) in taken}

    def _connected(self) -> Connection[Any]:
        import psycopg  # noqa: PLC0415

        if self._connection is None:
            self._connection = psycopg.connect(address(self._host.fleet.database), autocommit=True)
            require_set_up(self._connection)
            answer = self._connection.execute(
                "SELECT register_host(%s, %s, %s)",
                (self._host.name, self._host.machine_id, __version__),
            ).fetchone()
            assert answer is not None
            if answer[0]:
                raise HostTaken(self._host.name, _REASONS[answer[0]])
            self._has_registered = True
            self._listener.registered()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _storable(text: str) -> str:
    """Text as the database takes it, whatever is in it."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
