# SPDX-License-Identifier: Apache-2.0
"""The queue: a few functions, and the only module that knows which engine keeps it.

A job is a row on the queue of its host, and its record is JSON that the engine does not read.
Functions with a ``connection`` are part of the caller's transaction.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    import procrastinate
    from psycopg import Connection

ENGINE_VERSION: Final = "3.10.0"
"""Of the engine: the tables that :func:`migrate` makes are those of this one."""

_TASK: Final = "chainmerge.fleet"
MOST_CLAIMED: Final = 1000
"""Jobs that a host has in hand at most. They wait for leases, in the order of their priority."""
_DEEPEST: Final = 20
"""Levels of JSON in a row; those of a record are fewer."""
_NEVER: Final = 86400.0 * 365
_PAUSE_WITHOUT_DATABASE: Final = 0.5
_PATIENCE: Final = 5.0
"""Seconds that the engine waits for its connection."""
_BETWEEN_LOOKS: Final = 15.0
"""Seconds between two looks for jobs that are claimed and that nobody has in hand: longer than the
engine may take to tell the database that one has ended."""


class QueueState(StrEnum):
    """What the queue knows of a job."""

    QUEUED = "queued"
    CLAIMED = "claimed"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


_STATES: Final = {
    "todo": QueueState.QUEUED,
    "doing": QueueState.CLAIMED,
    "succeeded": QueueState.SUCCEEDED,
    "cancelled": QueueState.CANCELLED,
}


OPEN_STATES: Final = frozenset({QueueState.QUEUED, QueueState.CLAIMED})
"""Those of jobs that have not ended."""


class QueuedJob(Struct, frozen=True):
    """A row of the queue: ``arguments`` is whatever somebody has put there."""

    id: int
    host: str
    state: QueueState
    priority: int
    label: str
    arguments: Any


class NewJob(Struct, frozen=True):
    """What is to be queued; no two jobs with the same ``label`` wait at the same time."""

    host: str
    priority: int
    label: str
    record: dict[str, Any]


class Unsuccessful(Exception):
    """Raised by what runs a job, to have the queue note it as failed."""


class Elsewhere(Exception):
    """Raised by what runs a job, to have it put on the queue of another host, in one statement."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.host = host


def version_here() -> str | None:
    """Which version of the engine is installed, without loading it: few commands need it."""
    if importlib.util.find_spec("procrastinate") is None:
        return None
    return importlib.metadata.version("procrastinate")


def submit(connection: Connection[Any], jobs: Sequence[NewJob]) -> list[int]:
    """Queue all of them, in their order, or none; return their numbers."""
    from procrastinate.jobs import Job  # noqa: PLC0415

    if not jobs:
        return []
    rows = [
        Job(
            queue=_queue_of(job.host),
            priority=job.priority,
            lock=None,
            queueing_lock=job.label,
            task_name=_TASK,
            task_kwargs={"record": job.record},
        )
        for job in jobs
    ]
    with _errors_of_database():
        queued = _manager().batch_defer_jobs(rows, connection=connection)
    return [job.id for job in queued if job.id is not None]


def jobs_numbered(connection: Connection[Any], numbers: Sequence[int]) -> Iterator[QueuedJob]:
    """Return those of some jobs that are not forgotten, in the order of their numbers."""
    yield from _selected(connection, numbers=numbers)


def jobs_labelled(connection: Connection[Any], labels: Sequence[str]) -> Iterator[QueuedJob]:
    """Return the jobs with some labels, whatever has become of them."""
    yield from _selected(connection, labels=labels)


def open_jobs_of(connection: Connection[Any], host: str) -> frozenset[int]:
    """Return the numbers of a host's jobs that have not ended."""
    found = connection.execute(
        "SELECT id FROM procrastinate_jobs WHERE queue_name = %s AND status IN ('todo', 'doing')",
        (_queue_of(host),),
    )
    return frozenset(number for (number,) in found)


def _selected(
    connection: Connection[Any],
    *,
    numbers: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> Iterator[QueuedJob]:
    # By a statement of ours: the engine's own lists all jobs, or those of one of its states.
    rows = connection.execute(
        "SELECT id, queue_name, status::text, priority, queueing_lock, args::text"
        " FROM procrastinate_jobs"
        " WHERE (%(numbers)s::bigint[] IS NULL OR id = ANY (%(numbers)s::bigint[]))"
        " AND (%(labels)s::text[] IS NULL OR queueing_lock = ANY (%(labels)s::text[]))"
        " ORDER BY id",
        {
            "numbers": None if numbers is None else list(numbers),
            "labels": None if labels is None else list(labels),
        },
    )
    for number, queue, status, priority, label, arguments in rows:
        state = _STATES.get(status, QueueState.FAILED)
        host = queue.removeprefix("host.")
        yield QueuedJob(number, host, state, priority, label or "", _loaded(arguments))


def _loaded(text: str | bytes) -> Any:
    """Read JSON of a row; as if there was nothing where it is deeper than the engine bears."""
    try:
        value = json.loads(text)
    except RecursionError:
        return {}
    return {} if _is_deeper(value, _DEEPEST) else value


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def cancel(connection: Connection[Any], job: int) -> bool:
    """Take a job off the queue; say whether it was still there, and not in its host's hands."""
    with _errors_of_database():
        return bool(_manager().cancel_job_by_id(job, abort=False, connection=connection))


def retry(connection: Connection[Any], job: int) -> None:
    """Queue a failed or claimed job again."""
    unchanged = dict.fromkeys(("retry_at", "new_priority", "new_queue_name", "new_lock"))
    _asked(connection, "retry_job", job_id=job, **unchanged)


def forget(connection: Connection[Any], numbers: Sequence[int]) -> None:
    """Remove jobs that have ended."""
    connection.execute("DELETE FROM procrastinate_jobs WHERE id = ANY (%s)", (list(numbers),))


def migrate(connection: Connection[Any], installed: str | None) -> None:
    """Make the engine's tables, or bring those of version *installed* to :data:`ENGINE_VERSION`."""
    from procrastinate.schema import SchemaManager  # noqa: PLC0415

    if installed is None:
        _run_script(connection, SchemaManager.get_schema())
        return
    there, wanted = version_order(installed), version_order(ENGINE_VERSION)
    for script in sorted(Path(SchemaManager.get_migrations_path()).glob("*.sql")):
        if there < version_order(script.name.partition("_")[0]) <= wanted:
            _run_script(connection, script.read_text(encoding="utf-8"))


async def serve(
    database: str,
    host: str,
    run: Callable[[int, Any], Awaitable[None]],
    stopping: asyncio.Event,
    poll: float,
) -> None:
    """Hand each job of a host to *run*, until *stopping*; go on where the database comes back.

    ``run`` gets a job's number and whatever its row has for arguments. It is cancelled if the
    engine stops or has lost the database, and called again for the same job later: it must take
    up what it has begun. It raises :class:`Unsuccessful` for a job that has failed.

    Args:
        database: How to reach it, as libpq is told.
        host: Whose jobs.
        run: What does a job.
        stopping: Set by whoever wants this to end.
        poll: Seconds between two looks for new jobs.
    """
    import psycopg  # noqa: PLC0415
    from procrastinate.exceptions import ConnectorException  # noqa: PLC0415

    queue = _queue_of(host)
    in_hand: set[int] = set()

    async def run_noted(job: int, arguments: Any) -> None:
        in_hand.add(job)
        try:
            await run(job, arguments)
        finally:
            in_hand.discard(job)

    while not stopping.is_set():
        with suppress(ConnectorException, psycopg.Error, OSError):
            async with _app(database, run_noted).open_async() as app:
                # Nobody else serves this queue: what is claimed was claimed by a worker that died.
                left = await _put_back(app, await _claimed(app, queue))
                lost = asyncio.create_task(_put_back_lost_ones(app, queue, poll, in_hand, left))
                try:
                    await _serve_once(app, host, stopping, poll)
                finally:
                    lost.cancel()
                    with suppress(asyncio.CancelledError):
                        await lost
        if not stopping.is_set():
            await asyncio.sleep(_PAUSE_WITHOUT_DATABASE)


async def _put_back_lost_ones(
    app: procrastinate.App, queue: str, poll: float, in_hand: AbstractSet[int], left: frozenset[int]
) -> None:
    """Put back jobs that the queue calls claimed and nobody has in hand, as long as it is served.

    The database did not answer when they were to be put back or ended there, or they are *left*,
    since each asks for the same as one that waits.
    """
    from procrastinate.exceptions import ConnectorException  # noqa: PLC0415

    known = left
    while True:
        await asyncio.sleep(2 * poll if left else _BETWEEN_LOOKS)
        with suppress(ConnectorException):
            claimed = await _claimed(app, queue)
            lost = frozenset(claimed) - in_hand
            # What was not in hand before either is not on its way from or to the database.
            left = await _put_back(app, {job: claimed[job] for job in lost & known})
            known = left or lost


async def _claimed(app: procrastinate.App, queue: str) -> dict[int, procrastinate.jobs.Job]:
    found = await app.job_manager.list_jobs_async(queue=queue, status="doing")
    return {job.id: job for job in found if job.id is not None}


async def _put_back(
    app: procrastinate.App, claimed: Mapping[int, procrastinate.jobs.Job]
) -> frozenset[int]:
    """Let jobs be claimed anew; return those that are left, as another such job waits already."""
    from procrastinate.exceptions import UniqueViolation  # noqa: PLC0415

    left = set()
    for number, job in claimed.items():
        try:
            await app.job_manager.retry_job(job)
        except (UniqueViolation, AssertionError):
            # The engine insists on details that a server keeps from whom it shows some rows only.
            left.add(number)
    return frozenset(left)


async def _serve_once(
    app: procrastinate.App, host: str, stopping: asyncio.Event, poll: float
) -> None:
    worker = asyncio.create_task(
        app.run_worker_async(
            queues=[_queue_of(host)],
            name=host,
            concurrency=MOST_CLAIMED,
            fetch_job_polling_interval=poll,
            # Cancelling is by a table of ours: the engine's way frees a job whose child writes.
            abort_job_polling_interval=_NEVER,
            shutdown_graceful_timeout=0,
            listen_notify=False,
            install_signal_handlers=False,
            update_heartbeat_interval=30.0,
            stalled_worker_timeout=3600.0,
        )
    )
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({worker, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not worker.done():
        worker.cancel()
    with suppress(asyncio.CancelledError):
        await worker


def _app(database: str, run: Callable[[int, Any], Awaitable[None]]) -> procrastinate.App:
    import procrastinate  # noqa: PLC0415
    from procrastinate.retry import BaseRetryStrategy, RetryDecision  # noqa: PLC0415

    class _OnlyUnlessEnded(BaseRetryStrategy):
        def get_retry_decision(self, *, exception: BaseException, job: Any) -> Any:
            del job
            if isinstance(exception, Elsewhere):
                return RetryDecision(queue=_queue_of(exception.host))
            return RetryDecision() if isinstance(exception, asyncio.CancelledError) else None

    connector = procrastinate.PsycopgConnector(
        json_loads=_loaded,
        conninfo=database,
        # Each of the engine's statements stands alone: a transaction would be two more.
        kwargs={"autocommit": True},
        min_size=1,
        max_size=1,
        timeout=_PATIENCE,
        reconnect_timeout=_PATIENCE,
    )
    app = procrastinate.App(connector=connector)

    @app.task(name=_TASK, pass_context=True, retry=_OnlyUnlessEnded())
    async def do(context: procrastinate.JobContext, /, **arguments: Any) -> None:
        assert context.job.id is not None
        await run(context.job.id, arguments)

    return app


def _queue_of(host: str) -> str:
    return f"host.{host}"


def version_order(version: str) -> tuple[int, ...]:
    """Return what tells which of two versions is the later one."""
    return tuple(int(number) for number in version.split("."))


@contextmanager
def _errors_of_database() -> Iterator[None]:
    """Raise what the database has raised: the engine has errors of its own for that.

    It also stumbles over those that lack details, which a server keeps from whom it shows some
    rows only.
    """
    import psycopg  # noqa: PLC0415
    from procrastinate.exceptions import ProcrastinateException  # noqa: PLC0415

    try:
        yield
    except (ProcrastinateException, AssertionError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, psycopg.Error):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None


def _manager() -> Any:
    from procrastinate import SyncPsycopgConnector  # noqa: PLC0415
    from procrastinate.manager import JobManager  # noqa: PLC0415

    return JobManager(SyncPsycopgConnector())


def _asked(connection: Connection[Any], query: str, **arguments: Any) -> list[dict[str, Any]]:
    from procrastinate.sql import queries  # noqa: PLC0415
    from psycopg.rows import dict_row  # noqa: PLC0415

    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(queries[query], arguments).fetchall()


def _run_script(connection: Connection[Any], script: str) -> None:
    connection.execute(script.encode())
