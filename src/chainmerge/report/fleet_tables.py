# SPDX-License-Identifier: Apache-2.0
"""A fleet for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.fleet import FleetJobOutcome, FleetJobState
from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, stack, words
from chainmerge.report.text import short_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.documents.fleet import (
        FleetChange,
        FleetHostStatus,
        FleetJobResult,
        FleetJobStatus,
        FleetKeyStatus,
        FleetResults,
        FleetStatus,
    )

_STYLES = {
    FleetJobOutcome.DONE: layout.GOOD,
    FleetJobOutcome.ALREADY: layout.GOOD,
    FleetJobOutcome.CANCELLED: layout.CAUTION,
    FleetJobOutcome.REFUSED: layout.CAUTION,
    FleetJobOutcome.PLAN_CHANGED: layout.CAUTION,
}
_JOB_HEADINGS: Final = ("job", "host", "state", "done", "top", "waits for")
_HOST_HEADINGS: Final = ("host", "last seen", "running", "waiting", "")
_KEY_HEADINGS: Final = ("key", "held", "limit")
_NUMBERS: Final = ("job", "running", "waiting", "held", "limit")


def change_report(change: FleetChange) -> Block:
    """What a command has changed."""
    return stack(
        *(words(sentence, layout.GOOD) for sentence in change.done),
        *layout.warnings_section(change.warnings),
    )


def fleet_report(status: FleetStatus) -> Block:
    """What runs, what waits and for what."""
    running, hosts = counted(status.running, "job"), counted(len(status.hosts), "host")
    return stack(
        words(f"{running} running, {status.waiting} waiting, {hosts}", layout.TITLE),
        *_listing(_JOB_HEADINGS, [_job_row(job) for job in status.jobs]),
        *_left_out(status.jobs_left_out),
        *hosts_and_keys(status),
    )


def hosts_and_keys(status: FleetStatus) -> tuple[Block, ...]:
    """Who is there, and what is held."""
    return (
        *_listing(_HOST_HEADINGS, [_host_row(host) for host in status.hosts]),
        *_listing(_KEY_HEADINGS, [_key_row(key) for key in status.keys]),
    )


def _left_out(jobs: int) -> tuple[Block, ...]:
    return (words(f"{counted(jobs, 'more job')} waiting", layout.QUIET),) if jobs else ()


def _listing(headings: Sequence[str], rows: Sequence[Sequence[Words]]) -> tuple[Block, ...]:
    """A table with an empty line above it; nothing if it has no rows."""
    return (layout.EMPTY_LINE, layout.listing(headings, rows, right=_NUMBERS)) if rows else ()


def _job_row(job: FleetJobStatus) -> list[Words]:
    done = ""
    if job.bytes_done is not None and job.bytes_total:
        done = f"{short_size(job.bytes_done)} of {short_size(job.bytes_total)}"
    style = layout.GOOD if job.state is FleetJobState.RUNNING else layout.QUIET
    return [
        layout.number(job.job),
        words(job.host),
        words(job.stage, style),
        words(done),
        words(job.top),
        words(", ".join(job.waits_for), layout.QUIET),
    ]


def _host_row(host: FleetHostStatus) -> list[Words]:
    seen = words(f"{host.silent_seconds:.0f} s ago", layout.BAD if host.is_silent else "")
    drained = words("drained" if host.drained else "", layout.CAUTION)
    return [
        words(host.host),
        seen,
        layout.number(host.running),
        layout.number(host.waiting),
        drained,
    ]


def _key_row(key: FleetKeyStatus) -> list[Words]:
    limit = words("paused", layout.CAUTION) if key.paused else layout.number(key.limit)
    return [words(key.key), layout.number(key.held), limit]


def results_report(results: FleetResults) -> Block:
    """What became of jobs."""
    if not results.results:
        return words("no job has ended", layout.QUIET)
    headings = ("job", "host", "outcome", "ended", "top", "why")
    return layout.listing(headings, [_result_row(one) for one in results.results], right=("job",))


def _result_row(result: FleetJobResult) -> list[Words]:
    return [
        layout.number(result.job),
        words(result.host),
        words(result.outcome.value, _STYLES.get(result.outcome, layout.BAD)),
        words(result.ended),
        words(result.top),
        words(result.message, layout.QUIET),
    ]
