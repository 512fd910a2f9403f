# SPDX-License-Identifier: Apache-2.0
"""Asking hosts to scan, and hearing when they have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.fleet import FleetChange, FleetJobOutcome
from chainmerge.documents.versions import FLEET_VERSION
from chainmerge.fleet import engine
from chainmerge.fleet.database import transaction
from chainmerge.fleet.engine import QueueState
from chainmerge.fleet.errors import NoSuchHost
from chainmerge.fleet.inventory_store import host_names
from chainmerge.fleet.operating import submission
from chainmerge.fleet.scan_record import SCAN_ACTION, ScanRecord, scan_label

if TYPE_CHECKING:
    from collections.abc import Sequence


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
        scans = engine.jobs_labelled(connection, list(map(scan_label, hosts or known)))
        waiting = {job.host for job in scans if job.state is QueueState.QUEUED}
        wanted = [host for host in hosts or known if host not in waiting]
        numbers = engine.submit(connection, [_queued(host) for host in wanted])
    done = [f"{counted(len(numbers), 'scan')} submitted"]
    if left_out := len(hosts or known) - len(wanted):
        done.append(f"{counted(left_out, 'host')} left out: a scan waits there already")
    return FleetChange(FLEET_VERSION, tuple(numbers), tuple(done))


def _queued(host: str) -> engine.NewJob:
    record = ScanRecord(v=1, host=host, action=SCAN_ACTION, submitted=submission())
    return engine.NewJob(host, record.priority, record.label, msgspec.to_builtins(record))


def outcomes_of(database: str, jobs: Sequence[int]) -> dict[int, FleetJobOutcome]:
    """What became of those of some jobs that have ended."""
    with transaction(database) as connection:
        rows = connection.execute(
            "SELECT job, outcome FROM results WHERE NOT superseded AND job = ANY (%s)",
            (list(jobs),),
        ).fetchall()
    return {job: FleetJobOutcome(outcome) for job, outcome in rows}
