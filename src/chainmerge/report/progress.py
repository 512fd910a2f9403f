# SPDX-License-Identifier: Apache-2.0
"""Showing how far a merge has come: a bar, plain lines, or lines of JSON.

Whoever watches may go away in the middle of a merge (a closed pipe, a terminal that hung
up), and the merge has better things to do than to stop for it: that is what
:class:`ForgivingStream` is for.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self, TextIO

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from chainmerge.report.json import encode_event
from chainmerge.report.text import rough_size
from chainmerge.types import ProgressEvent, Stage

if TYPE_CHECKING:
    from rich.console import Console

Clock = Callable[[], float]

STAGE_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        Stage.LOCK: "locking the images",
        Stage.PLAN: "planning",
        Stage.PRUNE: "pruning stale bitmaps",
        Stage.EXTEND: "extending the volume",
        Stage.COPY: "copying data",
        Stage.BITMAPS: "storing bitmaps",
        Stage.VERIFY: "verifying",
        Stage.SETTLE: "settling",
    }
)


class ProgressDisplay(Protocol):
    """Something that is told about progress."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def update(self, event: ProgressEvent) -> None:
        """Show *event*, or leave it out if the last one was shown a moment ago."""
        ...


class Pace:
    """Says which events are worth showing: new stages, finished ones, else one in a while."""

    def __init__(self, seconds_between: float, clock: Clock) -> None:
        self._seconds_between = seconds_between
        self._clock = clock
        self._shown: ProgressEvent | None = None
        self._shown_at = 0.0

    def lets_through(self, event: ProgressEvent) -> bool:
        """Whether to show *event*; if so, it is the one that the next is measured against."""
        now = self._clock()
        last = self._shown
        due = (
            last is None
            or last.stage != event.stage
            or (0 < event.total == event.done and last != event)
            or now - self._shown_at >= self._seconds_between
        )
        if due:
            self._shown, self._shown_at = event, now
        return due


class LineProgress:
    """Progress as lines of text, few enough for a log file."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._pace = Pace(seconds_between=10.0, clock=clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def update(self, event: ProgressEvent) -> None:
        if not self._pace.lets_through(event):
            return
        line = STAGE_WORDS.get(event.stage, event.stage)
        if event.total:
            percent = 100 * event.done // event.total
            line += f": {rough_size(event.done)} of {rough_size(event.total)} ({percent} %)"
        self._stream.write(f"{line}\n")
        self._stream.flush()


class JsonProgress:
    """Progress as lines of JSON."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._pace = Pace(seconds_between=0.5, clock=clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def update(self, event: ProgressEvent) -> None:
        if self._pace.lets_through(event):
            self._stream.write(f"{encode_event('progress', event)}\n")
            self._stream.flush()


class BarProgress:
    """Progress as one bar a stage, for a terminal."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._pace = Pace(seconds_between=0.1, clock=clock)
        # No automatic refresh: that would be a thread, and a process that is started
        # while a second thread runs may inherit locks that nobody will ever release.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            _SpeedColumn(),
            console=console,
            auto_refresh=False,
        )
        self._stage: str | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish_stage()
        self._progress.stop()

    def update(self, event: ProgressEvent) -> None:
        if not self._pace.lets_through(event):
            return
        if self._task is None or event.stage != self._stage:
            self._finish_stage()
            self._stage = event.stage
            self._task = self._progress.add_task(
                STAGE_WORDS.get(event.stage, event.stage), total=None, amount=""
            )
        if event.total:
            amount = f"{rough_size(event.done)} of {rough_size(event.total)}"
            self._progress.update(
                self._task, completed=event.done, total=event.total, amount=amount
            )
        self._progress.refresh()

    def _finish_stage(self) -> None:
        if self._task is None:
            return
        # A stage without a measure is full when it is over.
        total = self._progress.tasks[self._task].total or 1
        self._progress.update(self._task, completed=total, total=total)


class _SpeedColumn(ProgressColumn):
    """How fast a stage with a measure goes, and how long it will take."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not (speed and task.fields["amount"]):
            return Text()
        remaining = "" if task.finished else f", {task.time_remaining or 0:.0f} s to go"
        return Text(f"{rough_size(speed)}/s{remaining}")


class ForgivingStream(io.TextIOBase):
    """A stream that forgets what it cannot write.

    For displays only. Rich, for one, ends the whole process when it finds a closed pipe.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
