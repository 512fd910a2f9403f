# SPDX-License-Identifier: Apache-2.0
"""What a command does, as lines for a journal: one a step, each with its level."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal, Self, TextIO

from msgspec import Struct

from chainmerge.documents.log import PRIORITIES, LogLevel, LogLine
from chainmerge.documents.text import printable
from chainmerge.report.json import encode
from chainmerge.report.progress import Clock, Pace, amount_of, left_of, words_for

if TYPE_CHECKING:
    from chainmerge.documents.log import LogFormat
    from chainmerge.documents.progress import ProgressEvent
    from chainmerge.errors import ChainmergeError

_SECONDS_BETWEEN: Final = 10.0


class Log(Struct, frozen=True):
    """Where lines go.

    Attributes:
        stream: What takes them.
        render: How one is written.
        level: The least important one that is.
        clock: The time of day.
    """

    stream: TextIO
    render: Callable[[LogLine], str]
    level: LogLevel
    clock: Clock = time.time

    def write(self, line: LogLine) -> None:
        """Write a line, if it is important enough."""
        if PRIORITIES[line.level] <= PRIORITIES[self.level]:
            self.stream.write(f"{self.render(line)}\n")
            self.stream.flush()

    def warn(self, sentence: str) -> None:
        """Write down what the user should know."""
        self.write(LogLine(self.clock(), "warning", "warning", sentence))

    def fail(self, error: ChainmergeError) -> None:
        """Write down why a command did not do what was requested."""
        at, words = self.clock(), error.sentence
        self.write(LogLine(at, "error", "error", words, code=error.code, hint=error.advice))


class LogProgress:
    """Progress as lines of a log: where a step begins, and at times how far it has come."""

    def __init__(self, log: Log, clock: Clock = time.monotonic) -> None:
        """Nothing is written before the first step."""
        self._log = log
        self._clock = clock
        self._pace = Pace(_SECONDS_BETWEEN, clock)
        self._step: tuple[str, str] | None = None
        self._began = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            seconds = round(self._clock() - self._began, 3)
            words = f"ended after {seconds:.1f} s"
            self._log.write(LogLine(self._log.clock(), "info", "end", words, seconds=seconds))

    def update(self, event: ProgressEvent) -> None:
        """Write a line for a new step; for one that goes on, if one is due."""
        due = self._pace.lets_through(event)
        if (event.stage, event.top) != self._step:
            self._step = (event.stage, event.top)
            self._write("info", "step", event, words_for(event))
        elif due:
            figures = (amount_of(event), left_of(event))
            self._write("debug", "progress", event, ", ".join(filter(None, figures)))

    def _write(
        self, level: LogLevel, what: Literal["step", "progress"], event: ProgressEvent, words: str
    ) -> None:
        self._log.write(
            LogLine(
                self._log.clock(),
                level,
                what,
                words,
                stage=event.stage,
                top=event.top,
                done=event.done,
                total=event.total,
            )
        )


def renderer(log_format: LogFormat, *, in_journal: bool) -> Callable[[LogLine], str]:
    """How lines are written: in systemd's journal it is the journal that has time and level."""
    plain = {
        ("json", False): encode,
        ("json", True): encode,
        ("text", False): _dated,
        ("text", True): _said,
    }[log_format, in_journal]
    if not in_journal:
        return plain
    return lambda line: f"<{PRIORITIES[line.level]}>{plain(line)}"


def _dated(line: LogLine) -> str:
    at = datetime.fromtimestamp(line.time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{at} {line.level}: {_said(line)}"


def _said(line: LogLine) -> str:
    more = f" ({line.code}); {line.hint}" if line.code else ""
    about = f"{line.stage}: " if line.kind == "progress" else ""
    return printable(f"{about}{line.message}{more}")
