# SPDX-License-Identifier: Apache-2.0
"""A fleet as people watch it: what runs, how fast, and how long it still takes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.fleet import FleetJobState
from chainmerge.report import layout
from chainmerge.report.fleet_tables import hosts_and_keys
from chainmerge.report.layout import Block, Words, stack, words
from chainmerge.report.text import rough_size, short_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chainmerge.documents.fleet import FleetJobStatus, FleetStatus

_WINDOW: Final = 15.0
"""Seconds over which a rate is taken."""
_MOST_WAITING: Final = 10
_HEADINGS: Final = ("job", "host", "state", "done", "%", "rate", "left", "top")
_WAITING_HEADINGS: Final = ("job", "host", "top", "waits for")
_NUMBERS: Final = frozenset({"job", "%", "rate", "left"})
_MINUTE: Final = 60
_HOUR: Final = 3600


class Rates:
    """How fast jobs copy, by what is seen of them from time to time."""

    def __init__(self) -> None:
        """Nothing is seen yet."""
        self._seen: dict[int, deque[tuple[float, int]]] = {}

    def see(self, status: FleetStatus, now: float) -> Mapping[int, float]:
        """Note how far jobs are; return the bytes a second of those whose rate is known.

        Args:
            status: what there is.
            now: seconds, of a clock that only goes forward.
        """
        running = {job.job: job for job in status.jobs if job.bytes_done is not None}
        self._seen = {job: seen for job, seen in self._seen.items() if job in running}
        for number, job in running.items():
            seen = self._seen.setdefault(number, deque())
            assert job.bytes_done is not None
            if seen and job.bytes_done < seen[-1][1]:
                # Another stage has begun.
                seen.clear()
            seen.append((now, job.bytes_done))
            while len(seen) > 2 and now - seen[0][0] > _WINDOW:
                seen.popleft()
        return {number: rate for number, seen in self._seen.items() if (rate := _rate(seen)) > 0}


def _rate(seen: Sequence[tuple[float, int]]) -> float:
    (began, first), (ended, last) = seen[0], seen[-1]
    return (last - first) / (ended - began) if ended > began else 0.0


def watch_line(status: FleetStatus, rates: Mapping[int, float]) -> str:
    """Return the same in a line, for a file or a pipe."""
    rate = sum(rates.values())
    parts = [f"{counted(status.running, 'job')} running, {status.waiting} waiting"]
    if status.running:
        parts.append(f"{short_size(sum(job.bytes_left for job in status.jobs))} left")
    if rate:
        parts.append(f"{rough_size(rate)}/s")
    return ", ".join(parts)


def watch_report(status: FleetStatus, rates: Mapping[int, float]) -> Block:
    """Return what runs, what waits first, the hosts and the keys."""
    running = [job for job in status.jobs if job.state is FleetJobState.RUNNING]
    waiting = [job for job in status.jobs if job.state is FleetJobState.WAITING]
    rest = len(waiting) + status.jobs_left_out - _MOST_WAITING
    blocks: list[Block] = [words(watch_line(status, rates), layout.TITLE)]
    if running:
        rows = [_running_row(job, rates.get(job.job)) for job in running]
        blocks += [layout.EMPTY_LINE, layout.listing(_HEADINGS, rows, right=_NUMBERS)]
    if waiting:
        rows = [_waiting_row(job) for job in waiting[:_MOST_WAITING]]
        blocks += [layout.EMPTY_LINE, layout.listing(_WAITING_HEADINGS, rows, right=_NUMBERS)]
    if rest > 0:
        blocks.append(words(f"{counted(rest, 'more job')} waiting", layout.QUIET))
    return stack(*blocks, *hosts_and_keys(status))


def _running_row(job: FleetJobStatus, rate: float | None) -> list[Words]:
    done, total = job.bytes_done, job.bytes_total
    known = done is not None and bool(total)
    return [
        layout.number(job.job),
        words(job.host),
        words(job.stage, layout.GOOD),
        words(f"{short_size(done or 0)} of {short_size(total or 0)}" if known else ""),
        words(str(100 * (done or 0) // (total or 1)) if known else ""),
        words(f"{rough_size(rate)}/s" if rate else ""),
        words(_time(job.bytes_left / rate) if rate and known else ""),
        words(job.top),
    ]


def _time(seconds: float) -> str:
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"


def _waiting_row(job: FleetJobStatus) -> list[Words]:
    return [
        layout.number(job.job),
        words(job.host),
        words(job.top),
        words(", ".join(job.waits_for), layout.QUIET),
    ]
