# SPDX-License-Identifier: Apache-2.0
"""Showing how far a merge or a scan has come: plain lines, or lines of JSON.

Whoever watches may go away in the middle of a merge (a closed pipe, a terminal that hung up), and
the merge must not stop for that: that is what :class:`ForgivingStream` is for.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Final, Protocol, Self, TextIO

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.progress import COUNTED, ProgressEvent, Stage
from chainmerge.documents.text import printable
from chainmerge.report.text import rough_size

Clock = Callable[[], float]

STAGE_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        Stage.LOCK: "locking the images",
        Stage.WAIT: "waiting for a locked image",
        Stage.PLAN: "planning",
        Stage.SNAPSHOTS: "removing internal snapshots",
        Stage.PRUNE: "pruning stale bitmaps",
        Stage.HIDE: "hiding old data from the overlay",
        Stage.EXTEND: "extending the volume",
        Stage.COPY: "copying data",
        Stage.READ_BACK: "reading back",
        Stage.BITMAPS: "storing bitmaps",
        Stage.VERIFY: "verifying",
        Stage.SETTLE: "finishing",
        Stage.FIND: "looking for images",
        Stage.IMAGES: "reading images",
        Stage.CHAINS: "reading chains",
    }
)


def words_for(event: ProgressEvent) -> str:
    """What is going on, and with which disk where there are several."""
    stage = STAGE_WORDS.get(event.stage, event.stage)
    return f"{printable(event.top)}: {stage}" if event.top else stage


def amount_of(event: ProgressEvent) -> str:
    """How much of a stage is done; empty for one without a measure."""
    noun = COUNTED.get(event.stage)
    if noun is None:
        return f"{rough_size(event.done)} of {rough_size(event.total)}" if event.total else ""
    return f"{event.done} of {counted(event.total, noun)}" if event.total else str(event.done)


def left_of(event: ProgressEvent) -> str:
    """How fast a stage goes, and how long it takes from here; empty if nobody knows."""
    if not event.rate:
        return ""
    rate = f"{rough_size(event.rate)}/s"
    remaining = (event.total - event.done) // event.rate
    return f"{rate}, {_duration(remaining)} left" if event.done < event.total else rate


def _duration(seconds: int) -> str:
    """A time as people say it, such as ``2:05 min``."""
    if seconds < 100:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"


class ProgressDisplay(Protocol):
    """Something that is told about progress."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def update(self, event: ProgressEvent) -> None:
        """Show *event*, or leave it out if the last one was shown a moment ago."""
        ...


class Pace:
    """Says which events are worth showing: new stages, finished ones, and some in between."""

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
            or (last.stage, last.top) != (event.stage, event.top)
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

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, event: ProgressEvent) -> None:
        if not self._pace.lets_through(event):
            return
        line = words_for(event)
        if event.total:
            percent = 100 * event.done // event.total
            line += f": {amount_of(event)} ({percent} %)"
        if event.rate:
            line += f", {left_of(event)}"
        self._stream.write(f"{line}\n")
        self._stream.flush()


class JsonProgress:
    """Progress as lines of JSON."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._pace = Pace(seconds_between=0.5, clock=clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, event: ProgressEvent) -> None:
        if self._pace.lets_through(event):
            # Imported where it is used: lines of text do without.
            from chainmerge.report.json import encode_event  # noqa: PLC0415

            self._stream.write(f"{encode_event('progress', event)}\n")
            self._stream.flush()


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
