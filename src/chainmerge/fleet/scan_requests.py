# SPDX-License-Identifier: Apache-2.0
"""Asking hosts to scan, and hearing when they have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.fleet import FleetChange, FleetJobOutcome
from chainmerge.documents.versions import FLEET_VERSION
from chainmerge.fleet import engine
from chainmerge.fleet.database import transaction
from chainmerge.fleet.engine import OPEN_STATES, QueueState
from chainmerge.fleet.errors import NoSuchHost
from chainmerge.fleet.inventory_store import host_names
from chainmerge.fleet.operating import let_nobody_else_queue, outcomes_in, submission
from chainmerge.fleet.outcome import outcome_named
from chainmerge.fleet.record import FLEET_KEY
from chainmerge.fleet.scan_record import SCAN_ACTION, ScanRecord, scan_key, scan_label

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from psycopg import Connection

_LONGEST_SILENCE: Final = 360.0
"""Seconds: a worker that has nothing to do speaks at least every five minutes."""


def request_scans(database: str, hosts: Sequence[str]) -> FleetChange:
    """Queue a scan of each of these hosts, or of all; one that waits already is enough.

    Raises:
        NoSuchHost: no worker has ever come from one of them. Nothing is queued then.
    """
    with transaction(database) as connection:
        known = host_names(connection)
        for host in hosts:
            if host not in known:
                raise NoSuchHost(host)
        let_nobody_else_queue(connection)
        waiting = {job.host for job in _waiting(connection, hosts or known)}
        wanted = [host for host in hosts or known if host not in waiting]
        numbers = engine.submit(connection, [_queued(host) for host in wanted])
    done = [f"{counted(len(numbers), 'scan')} submitted"]
    if left_out := len(hosts or known) - len(wanted):
        done.append(f"{counted(left_out, 'host')} left out: a scan waits there already")
    return FleetChange(FLEET_VERSION, tuple(numbers), tuple(done))


def _waiting(connection: Connection[Any], hosts: Sequence[str]) -> list[engine.QueuedJob]:
    """Scans of hosts that have yet to begin, whether or not a worker has them in hand."""
    scans = list(engine.jobs_labelled(connection, [*map(scan_label, hosts)]))
    numbers = [job.id for job in scans]
    ended = connection.execute(
        "SELECT job FROM results WHERE NOT superseded AND job = ANY (%s)", (numbers,)
    ).fetchall()
    begun = connection.execute("SELECT job FROM leases WHERE job = ANY (%s)", (numbers,)).fetchall()
    return [
        job
        for job in scans
        if job.state in OPEN_STATES
        and (job.id,) not in ended
        # What is queued and has its keys was interrupted, and begins anew.
        and (job.state is QueueState.QUEUED or (job.id,) not in begun)
    ]


def waiting_scans(database: str, hosts: Sequence[str]) -> tuple[int, ...]:
    """The numbers of scans of these hosts, or of all, that have yet to begin."""
    with transaction(database) as connection:
        return tuple(job.id for job in _waiting(connection, hosts or host_names(connection)))


def hindrances(database: str, jobs: Sequence[int]) -> dict[int, str]:
    """Why those of some scans will not end by themselves, a sentence each."""
    with transaction(database) as connection:
        hosts = {job.id: job.host for job in engine.jobs_numbered(connection, jobs)}
        held = {number for (number,) in connection.execute("SELECT job FROM leases").fetchall()}
        shut = connection.execute("SELECT key FROM limits WHERE paused OR most = 0").fetchall()
        rows = connection.execute(
            "SELECT host, drained, extract(epoch FROM now() - seen)::float8 FROM hosts"
        ).fetchall()
    sentences: dict[int, str] = {}
    states = {host: states for host, *states in rows}
    shut_keys = {key for (key,) in shut}
    for job in jobs:
        if job not in hosts:
            sentences[job] = f"the scan {job} was forgotten"
            continue
        host = hosts[job]
        drained, silent = states.get(host, (False, 0.0))
        if silent > _LONGEST_SILENCE:
            sentences[job] = (
                f"{host} has not been heard from for {counted(int(silent / 60), 'minute')}"
            )
        elif drained and job not in held:
            sentences[job] = f"{host} is drained: `chainmerge fleet undrain {host}`"
        elif job not in held and shut_keys & {FLEET_KEY, scan_key(host)}:
            sentences[job] = f"scans of {host} are paused"
    return sentences


def _queued(host: str) -> engine.NewJob:
    record = ScanRecord(v=1, host=host, action=SCAN_ACTION, submitted=submission())
    return engine.NewJob(host, record.priority, record.label, msgspec.to_builtins(record))


def outcomes_of(database: str, jobs: Sequence[int]) -> dict[int, FleetJobOutcome]:
    """What became of those of some jobs that have ended."""
    with transaction(database) as connection:
        found = outcomes_in(connection, jobs)
    return {job: outcome_named(outcome) for job, outcome in found.items()}
