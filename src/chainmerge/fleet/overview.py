# SPDX-License-Identifier: Apache-2.0
"""What runs in a fleet, what waits and for what, and what became of the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.fleet import (
    FleetHostStatus,
    FleetJobResult,
    FleetJobState,
    FleetJobStatus,
    FleetKeyStatus,
    FleetResults,
    FleetStatus,
)
from chainmerge.documents.versions import FLEET_VERSION
from chainmerge.fleet import engine
from chainmerge.fleet.database import transaction
from chainmerge.fleet.outcome import last_event, outcome_named
from chainmerge.fleet.record import FLEET_KEY, IMAGE_PREFIX, RecordUnusable, host_key, record_in
from chainmerge.fleet.scan_record import ScanRecord, scan_record_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from psycopg import Connection

    from chainmerge.fleet.engine import QueuedJob
    from chainmerge.fleet.record import JobRecord

MOST_SHOWN: Final = 500
"""Jobs that have not ended, unless told otherwise."""
_LONGEST_STAGE: Final = 100
_LARGEST_SIZE: Final = 2**63 - 1


class _Keys(Struct, frozen=True):
    """Who holds which keys, and how many may."""

    held: Mapping[str, int]
    limits: Mapping[str, tuple[int, bool]]

    def most(self, key: str) -> int | None:
        """How many may hold a key; None if any number."""
        if key in self.limits:
            return self.limits[key][0]
        return None if key == FLEET_KEY else 1

    def paused(self, key: str) -> bool:
        """Whether nobody may take it."""
        return self.limits.get(key, (1, False))[1]

    def obstacles(self, keys: Sequence[str]) -> Iterator[str]:
        """Which of the keys cannot be had now, and why: of images the first, and how many more."""
        images = [key for key in keys if key.startswith(IMAGE_PREFIX)]
        yield from self._obstacles(key for key in keys if not key.startswith(IMAGE_PREFIX))
        held = list(self._obstacles(images))
        if len(held) > 1:
            yield f"{held[0]} and {counted(len(held) - 1, 'more image')}"
        else:
            yield from held

    def _obstacles(self, keys: Iterable[str]) -> Iterator[str]:
        for key in keys:
            most, held = self.most(key), self.held.get(key, 0)
            if self.paused(key) or most == 0:
                yield f"{key} (paused)"
            elif most is not None and held >= most:
                yield f"{key} ({held} of {most})"


def status(database: str, most: int = MOST_SHOWN) -> FleetStatus:
    """Return what has not ended, the hosts, and the keys that count.

    Of thousands of jobs so many are shown: those that run, and of those that wait the first of each
    host, in the order in which they go.
    """
    with transaction(database) as connection:
        keys = _keys(connection)
        hosts = _hosts(connection)
        leases = {row[0] for row in connection.execute("SELECT DISTINCT job FROM leases")}
        lines = dict(connection.execute("SELECT job, line FROM progress").fetchall())
        unwanted = {row[0] for row in connection.execute("SELECT job FROM wishes")}
        found = connection.execute("SELECT * FROM open_jobs(%s)", (most,)).fetchall()
        shown = list(engine.jobs_numbered(connection, [job for (job,) in found]))
        counts = connection.execute("SELECT host, running, waiting FROM counted_jobs()").fetchall()
    by_order = sorted(shown, key=lambda job: (job.host, -job.priority, job.id))
    jobs = tuple(
        _job_status(job, keys, hosts, job.id in leases, job.id in unwanted, lines.get(job.id, ""))
        for job in by_order
    )
    by_host = {host: (running, waiting) for host, running, waiting in counts}
    return FleetStatus(
        FLEET_VERSION,
        jobs,
        tuple(_counted(host, *by_host.get(name, (0, 0))) for name, host in hosts.items()),
        _shown(keys),
        # Counted a moment later, when some may have ended.
        max(0, sum(map(sum, by_host.values())) - len(jobs)),
    )


def results(database: str, jobs: Sequence[int], outcomes: Sequence[str], most: int) -> FleetResults:
    """Return what became of jobs, the last one first: of some, with some outcomes, so many."""
    with transaction(database) as connection:
        rows = connection.execute(
            "SELECT job, host, outcome, exit_code, error_code, message, ended, report"
            " FROM results WHERE NOT superseded"
            " AND (cardinality(%(jobs)s::bigint[]) = 0 OR job = ANY (%(jobs)s))"
            " AND (cardinality(%(outcomes)s::text[]) = 0 OR outcome = ANY (%(outcomes)s))"
            " ORDER BY id DESC LIMIT %(most)s",
            {"jobs": list(jobs), "outcomes": list(outcomes), "most": most},
        ).fetchall()
        found = engine.jobs_numbered(connection, [row[0] for row in rows])
        records = {job.id: _record(job) for job in found}
    return FleetResults(
        FLEET_VERSION,
        tuple(
            FleetJobResult(
                job=job,
                host=host,
                top=record.disks[0].top if (record := records.get(job)) else "",
                base=record.disks[0].base if record else "",
                outcome=outcome_named(outcome),
                exit_code=exit_code,
                error_code=error_code,
                message=message,
                ended=_moment(ended),
                report=report,
            )
            for job, host, outcome, exit_code, error_code, message, ended, report in rows
        ),
    )


def _record(job: QueuedJob) -> JobRecord | None:
    """What a job merges; None if it does not."""
    try:
        return record_in(job.arguments)
    except RecordUnusable:
        return None


def _scan(job: QueuedJob) -> ScanRecord | None:
    try:
        return scan_record_in(job.arguments)
    except RecordUnusable:
        return None


def _job_status(
    job: QueuedJob,
    keys: _Keys,
    hosts: Mapping[str, FleetHostStatus],
    holds_keys: bool,  # noqa: FBT001
    is_unwanted: bool,  # noqa: FBT001
    line: str,
) -> FleetJobStatus:
    scan = _scan(job)
    record = None if scan else _record(job)
    asked = scan or record
    event = last_event([line])
    return FleetJobStatus(
        job=job.id,
        host=job.host,
        state=FleetJobState.RUNNING if holds_keys else FleetJobState.WAITING,
        action=asked.action if asked else "",
        top=record.disks[0].top if record else "",
        base=record.disks[0].base if record else "",
        priority=job.priority,
        waits_for=() if holds_keys else tuple(_obstacles(job, asked, keys, hosts)),
        cancelled=is_unwanted,
        progress=_text(event.get("stage")) if holds_keys else None,
        bytes_done=_number(event.get("done")),
        bytes_total=_number(event.get("total")),
    )


def _obstacles(
    job: QueuedJob,
    asked: JobRecord | ScanRecord | None,
    keys: _Keys,
    hosts: Mapping[str, FleetHostStatus],
) -> Iterator[str]:
    host = hosts.get(job.host)
    if host is None:
        yield f"the worker of {job.host}, which has never started"
    elif host.is_silent:
        yield f"the worker of {job.host}, which has been silent for {host.silent_seconds:.0f} s"
    if host is not None and host.drained:
        yield f"{host_key(job.host)} (drained)"
    obstacles = [] if asked is None else list(keys.obstacles((FLEET_KEY, *asked.keys)))
    yield from obstacles
    if asked is not None and asked.windows and not obstacles:
        # Whether it is open, only the host's clock says.
        yield f"its window {', '.join(asked.windows)}, by the clock of {job.host}"


# A host writes into the line of its child what it likes.


def _text(value: object) -> str | None:
    return value[:_LONGEST_STAGE] if isinstance(value, str) else None


def _number(value: object) -> int | None:
    if isinstance(value, int) and 0 <= value <= _LARGEST_SIZE:
        return int(value)
    return None


def _keys(connection: Connection[Any]) -> _Keys:
    held = Counter(
        dict(connection.execute("SELECT key, count(*) FROM leases GROUP BY key").fetchall())
    )
    limits = connection.execute("SELECT key, most, paused FROM limits").fetchall()
    return _Keys(held, {key: (most, paused) for key, most, paused in limits})


def _shown(keys: _Keys) -> tuple[FleetKeyStatus, ...]:
    return tuple(
        FleetKeyStatus(key, keys.held.get(key, 0), keys.most(key), keys.paused(key))
        for key in sorted(keys.held.keys() | keys.limits.keys())
        # Of images there are more than of jobs, and each has one job at most.
        if not key.startswith(IMAGE_PREFIX)
    )


def _hosts(connection: Connection[Any]) -> dict[str, FleetHostStatus]:
    rows = connection.execute(
        "SELECT host, seen, extract(epoch FROM now() - seen), drained, version FROM hosts"
        " ORDER BY host"
    ).fetchall()
    return {
        host: FleetHostStatus(host, _moment(seen), float(silent), drained, version, 0, 0)
        for host, seen, silent, drained, version in rows
    }


def _counted(host: FleetHostStatus, running: int, waiting: int) -> FleetHostStatus:
    return msgspec.structs.replace(host, running=running, waiting=waiting)


def _moment(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds")
