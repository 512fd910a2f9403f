# SPDX-License-Identifier: Apache-2.0
"""What an operator does: rows are written and read, and nothing here waits for a merge."""

from __future__ import annotations

import getpass
import os
import socket
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, LiteralString

import msgspec

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.fleet import SUCCESSES, FleetChange, FleetJobOutcome
from chainmerge.documents.fleet_policy import LARGEST_LIMIT
from chainmerge.documents.versions import FLEET_VERSION
from chainmerge.fleet import engine
from chainmerge.fleet.database import transaction
from chainmerge.fleet.engine import OPEN_STATES, QueueState
from chainmerge.fleet.errors import FleetPlanUnusable, HostAlive, NoSuchHost, NoSuchJob
from chainmerge.fleet.inventory_store import inventory_in
from chainmerge.fleet.record import FLEET_KEY, FleetPlan, JobRecord, PlannedJob, Submission
from chainmerge.fleet.sharing import refused_groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from psycopg import Connection

_PATIENCE: Final = 10.0
"""Seconds that a worker may take to tell the queue of the end of a job that is tried again."""
_DEVICES: Final = "/dev/"
_BETWEEN_TRIES: Final = 0.2
_DROP_TRACES: Final = (
    "DELETE FROM progress WHERE job = ANY (%s)",
    "DELETE FROM wishes WHERE job = ANY (%s)",
    "DELETE FROM sought WHERE job = ANY (%s)",
)
_STOP: Final = "UPDATE hosts SET drained = true, drained_now = true WHERE host = %s"


def plan_in(text: bytes, path: str) -> FleetPlan:
    """Read what ``fleet plan`` has written.

    Raises:
        FleetPlanUnusable: it is anything else.
    """
    try:
        return msgspec.json.decode(text, type=FleetPlan)
    except msgspec.DecodeError as error:
        raise FleetPlanUnusable(path, str(error)) from error


def submit(database: str, plan: FleetPlan) -> FleetChange:
    """Queue the jobs of a plan, all or none; what waits, runs or is done already is left out.

    Raises:
        FleetPlanUnusable: one is for a volume of a group that several hosts use without locks.
    """
    submitted = submission()
    with transaction(database) as connection:
        _require_kept_apart(connection, plan)
        let_nobody_else_queue(connection)
        known = _known_labels(connection, [job.label for job in plan.jobs])
        new = {job.label: job for job in plan.jobs if job.label not in known}
        numbers = engine.submit(connection, [_queued(job, submitted) for job in new.values()])
        for key, most in plan.limits.items():
            _set_limit(connection, key, most)
    left_out = len(plan.jobs) - len(new)
    done = [f"{counted(len(numbers), 'job')} submitted"]
    if left_out:
        done.append(f"{counted(left_out, 'job')} left out: submitted before")
    done += [f"{key}: at most {counted(most, 'job')}" for key, most in plan.limits.items()]
    return FleetChange(FLEET_VERSION, tuple(numbers), tuple(done))


def _require_kept_apart(connection: Connection[Any], plan: FleetPlan) -> None:
    """Raise FleetPlanUnusable for a volume that hosts share which nothing keeps apart."""
    volumes = [
        (job.host, path, path.split("/")[2])
        for job in plan.jobs
        for disk in job.disks
        # The one above may be deleted.
        for path in (disk.base, disk.top)
        if path.startswith(_DEVICES)
    ]
    # The inventory is large, and few images are volumes.
    refused = refused_groups(inventory_in(connection).hosts) if volumes else {}
    for host, path, group in volumes:
        if (host, group) in refused:
            raise FleetPlanUnusable(f"{host}: {path}", refused[host, group])


def let_nobody_else_queue(connection: Connection[Any]) -> None:
    """Have whoever queues something wait until this transaction has ended.

    Two that queue the same at the same time would both find that it is not there.
    """
    connection.execute("SELECT pg_advisory_xact_lock(hashtext('chainmerge-submit'))")


def submission() -> Submission:
    """Who submits something now."""
    by = f"{_user()}@{socket.gethostname()}".encode("utf-8", "backslashreplace").decode()
    return Submission(by=by[:200], at=datetime.now(UTC).isoformat(timespec="seconds"))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # In a container there need not be a name.
        return str(os.getuid())


def _known_labels(connection: Connection[Any], labels: Sequence[str]) -> set[str]:
    """Of jobs that wait, run or are done. What has ended otherwise may be submitted again."""
    found = list(engine.jobs_labelled(connection, labels))
    outcomes = outcomes_in(connection, [job.id for job in found])
    return {
        job.label
        for job in found
        if (outcomes[job.id] in SUCCESSES if job.id in outcomes else job.state in OPEN_STATES)
    }


def outcomes_in(connection: Connection[Any], jobs: Sequence[int]) -> dict[int, str]:
    """What became of those of some jobs that have ended, as their hosts have called it."""
    found = connection.execute(
        "SELECT job, outcome FROM results WHERE NOT superseded AND job = ANY (%s)", (list(jobs),)
    )
    return dict(found.fetchall())


def _queued(job: PlannedJob, submitted: Submission) -> engine.NewJob:
    record = JobRecord(**msgspec.structs.asdict(job), submitted=submitted)
    return engine.NewJob(job.host, job.priority, job.label, msgspec.to_builtins(record))


def pause(database: str, key: str) -> FleetChange:
    """Let nothing start that needs a key; what runs goes on."""
    usual = LARGEST_LIMIT if key == FLEET_KEY else 1
    with transaction(database) as connection:
        row = connection.execute(
            "INSERT INTO limits (key, most, paused) VALUES (%s, %s, true)"
            " ON CONFLICT (key) DO UPDATE SET paused = true RETURNING most",
            (key, usual),
        ).fetchone()
    most = (row and row[0]) or usual
    return _changed(f"{key} is paused; `chainmerge fleet limit {key} {most}` lets jobs start again")


def limit(database: str, key: str, most: int) -> FleetChange:
    """Let that many jobs hold a key at the same time, and end its pause."""
    with transaction(database) as connection:
        _set_limit(connection, key, most)
        connection.execute("UPDATE limits SET paused = false WHERE key = %s", (key,))
    return _changed(f"{key}: at most {counted(most, 'job')} at the same time")


def _set_limit(connection: Connection[Any], key: str, most: int) -> None:
    """Set a limit; what is paused stays so."""
    connection.execute(
        "INSERT INTO limits (key, most) VALUES (%s, %s)"
        " ON CONFLICT (key) DO UPDATE SET most = excluded.most",
        (key, most),
    )


def drain(database: str, host: str) -> FleetChange:
    """Let nothing start on a host; what runs there goes on to its end."""
    _on_host(database, host, "UPDATE hosts SET drained = true WHERE host = %s")
    return _changed(f"nothing starts on {host} any more; what runs there goes on")


def drain_now(database: str, host: str) -> FleetChange:
    """Let nothing start on a host, and what runs there stop at the next safe point."""
    _on_host(database, host, _STOP)
    return _changed(f"nothing starts on {host} any more; what runs there stops at a safe point")


def undrain(database: str, host: str) -> FleetChange:
    """Let jobs start on a host again."""
    _on_host(
        database, host, "UPDATE hosts SET drained = false, drained_now = false WHERE host = %s"
    )
    return _changed(f"jobs start on {host} again")


def _on_host(database: str, host: str, statement: LiteralString) -> None:
    with transaction(database) as connection:
        _require_host(connection, host)
        connection.execute(statement, (host,))


def _require_host(connection: Connection[Any], host: str) -> None:
    if connection.execute("SELECT FROM hosts WHERE host = %s", (host,)).fetchone() is None:
        raise NoSuchHost(host)


def cancel(database: str, jobs: Sequence[int]) -> FleetChange:
    """Take jobs off the queue; those that run stop at the next safe point.

    Raises:
        NoSuchJob: one of them has ended, or there is none of its number. Nothing is done then.
    """
    done = []
    with transaction(database) as connection:
        for number in dict.fromkeys(jobs):
            _require_open(connection, number)
            done.append(f"job {number} {_cancelled(connection, number)}")
    return FleetChange(FLEET_VERSION, tuple(jobs), tuple(done))


def _require_open(connection: Connection[Any], number: int) -> None:
    job = _job(connection, number)
    outcome = outcomes_in(connection, [number]).get(number)
    if outcome is not None or job.state not in OPEN_STATES:
        raise NoSuchJob(number, f"it has ended: {outcome or job.state}")


def _cancelled(connection: Connection[Any], number: int) -> str:
    # A job that waits in the queue can hold keys: its worker died, and its child may go on.
    held = connection.execute("SELECT FROM leases WHERE job = %s", (number,)).fetchone()
    if held is None and (engine.cancel(connection, number) or _is_of_nobody(connection, number)):
        _end(connection, [number], FleetJobOutcome.CANCELLED, "cancelled before it began")
        return "is cancelled"
    connection.execute("INSERT INTO wishes VALUES (%s) ON CONFLICT DO NOTHING", (number,))
    return "is told to stop"


def _is_of_nobody(connection: Connection[Any], number: int) -> bool:
    """Whether the host that claimed a job was released: nobody there hears a wish any more."""
    host = _job(connection, number).host
    released = connection.execute(
        "SELECT FROM hosts WHERE host = %s AND machine_id = ''", (host,)
    ).fetchone()
    return released is not None and not _is_connected(connection, host)


def retry(database: str, jobs: Sequence[int]) -> FleetChange:
    """Queue jobs again that ended without success.

    Raises:
        NoSuchJob: one of them did not. Nothing is done then.
    """
    jobs = list(dict.fromkeys(jobs))
    end = time.monotonic() + _PATIENCE
    while not _retried(database, jobs):
        if time.monotonic() > end:
            raise NoSuchJob(jobs[0], "its worker has yet to take note of its end")
        time.sleep(_BETWEEN_TRIES)
    done = tuple(f"job {number} is queued again" for number in jobs)
    return FleetChange(FLEET_VERSION, tuple(jobs), done)


def _retried(database: str, jobs: Sequence[int]) -> bool:
    """Queue jobs again; False, and nothing done, if a worker still has one of them in hand."""
    with transaction(database) as connection:
        let_nobody_else_queue(connection)
        outcomes = outcomes_in(connection, jobs)
        found = [_job(connection, number) for number in jobs]
        for job in found:
            outcome = outcomes.get(job.id, "" if job.state in OPEN_STATES else job.state)
            if job.state is QueueState.CANCELLED:
                raise NoSuchJob(job.id, "it was cancelled before its host had it: submit it again")
            if not outcome or outcome in SUCCESSES:
                reason = f"it cannot be tried again: it is {outcome or job.state}"
                raise NoSuchJob(job.id, reason)
            if _waits_again(connection, job):
                raise NoSuchJob(job.id, "the same was submitted again, and waits")
        claimed = [job for job in found if job.state is QueueState.CLAIMED]
        if any(_is_connected(connection, job.host) for job in claimed):
            return False
        # A wish that crossed the end of the last run is none for the next one.
        _drop_traces(connection, jobs)
        for job in found:
            connection.execute("UPDATE results SET superseded = true WHERE job = %s", (job.id,))
            if job.state is not QueueState.QUEUED:
                engine.retry(connection, job.id)
    return True


def _waits_again(connection: Connection[Any], job: engine.QueuedJob) -> bool:
    """Whether another job that asks for the same is on a queue: two cannot wait there."""
    alike = engine.jobs_labelled(connection, [job.label]) if job.label else ()
    return any(one.state is QueueState.QUEUED and one.id != job.id for one in alike)


def _is_connected(connection: Connection[Any], host: str) -> bool:
    """Whether a host's worker is there. If it is not, it waits for the end of the transaction."""
    free = connection.execute(
        "SELECT pg_try_advisory_xact_lock(hashtext('chainmerge-hosts'), hashtext(%s))", (host,)
    ).fetchone()
    return free is None or not free[0]


def release_fenced(database: str, host: str) -> FleetChange:
    """Free what a host holds that cannot write any more, and its name.

    Its jobs that ran are lost to the fleet, and nothing starts there until it is undrained.

    Raises:
        NoSuchHost: no worker has ever come from there.
        HostAlive: its worker is connected.
    """
    with transaction(database) as connection:
        _require_host(connection, host)
        if _is_connected(connection, host):
            raise HostAlive(host)
        gone = connection.execute(
            "DELETE FROM leases WHERE host = %s RETURNING job", (host,)
        ).fetchall()
        numbers = sorted({job for (job,) in gone})
        _end(connection, numbers, FleetJobOutcome.LOST, "its host was released while it ran there")
        connection.execute(_STOP, (host,))
        connection.execute("UPDATE hosts SET machine_id = '' WHERE host = %s", (host,))
    done = (
        f"{counted(len(numbers), 'job')} of {host} given up",
        f"nothing starts there until `chainmerge fleet undrain {host}`",
    )
    return FleetChange(FLEET_VERSION, tuple(numbers), done)


def _end(
    connection: Connection[Any], jobs: Iterable[int], outcome: FleetJobOutcome, message: str
) -> None:
    numbers = list(jobs)
    hosts = {job.id: job.host for job in engine.jobs_numbered(connection, numbers)}
    for number in numbers:
        connection.execute(
            "INSERT INTO results (job, host, outcome, message) VALUES (%s, %s, %s, %s)"
            " ON CONFLICT DO NOTHING",
            (number, hosts.get(number, ""), outcome.value, message),
        )
    _drop_traces(connection, numbers)


def _drop_traces(connection: Connection[Any], jobs: Sequence[int]) -> None:
    """Remove what only concerns a run of jobs, and would concern the next one."""
    for statement in _DROP_TRACES:
        connection.execute(statement, (list(jobs),))


def forget(database: str, older: timedelta) -> FleetChange:
    """Remove jobs that ended before that, and what became of them."""
    with transaction(database) as connection:
        old = connection.execute(
            "SELECT job FROM results WHERE NOT superseded AND ended < now() - %s", (older,)
        ).fetchall()
        ended = {job for (job,) in old}
        known = engine.jobs_numbered(connection, sorted(ended))
        numbers = sorted(ended - {job.id for job in known if job.state in OPEN_STATES})
        engine.forget(connection, numbers)
        _drop_traces(connection, numbers)
        connection.execute("DELETE FROM results WHERE job = ANY (%s)", (numbers,))
    done = (f"{counted(len(numbers), 'job')} forgotten",)
    return FleetChange(FLEET_VERSION, tuple(numbers), done)


def _job(connection: Connection[Any], number: int) -> engine.QueuedJob:
    for job in engine.jobs_numbered(connection, [number]):
        return job
    raise NoSuchJob(number, "there is none of this number")


def _changed(done: str) -> FleetChange:
    return FleetChange(FLEET_VERSION, (), (done,))
