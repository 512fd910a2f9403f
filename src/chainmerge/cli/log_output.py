# SPDX-License-Identifier: Apache-2.0
"""Results as always, and beside them a log on standard error."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

from msgspec.structs import replace

from chainmerge.cli.output import JsonOutput, QuietTextOutput, Report, TextOutput, warning_sentences
from chainmerge.errors import ExitCode
from chainmerge.report.log import Log, LogProgress, renderer
from chainmerge.report.progress import ForgivingStream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chainmerge.cli.output import Output
    from chainmerge.documents.log import LogFormat, LogLevel
    from chainmerge.errors import ChainmergeError
    from chainmerge.report.layout import Block
    from chainmerge.report.progress import ProgressDisplay


class LoggedOutput:
    """Shows results on standard output, and logs everything else."""

    def __init__(self, results: Output, log: Log) -> None:
        self._results = results
        self._log = log

    def document(
        self,
        report: Report,
        table: Callable[[Report], Block],
        status: ExitCode = ExitCode.DONE,
    ) -> None:
        self._results.document(report, table, status)
        self._warn_of(report)

    def last_event(
        self,
        report: Report,
        table: Callable[[Report], Block],
        status: ExitCode = ExitCode.DONE,
    ) -> None:
        self._results.last_event(report, table, status)
        self._warn_of(report)

    def progress(self) -> ProgressDisplay:
        return LogProgress(self._log)

    def error(self, error: ChainmergeError) -> None:
        self._results.error(error)
        self._log.fail(error)

    def quieter(self) -> Output:
        quiet = min(self._log.level, "warning", key=_LOUDNESS.index)
        return LoggedOutput(self._results.quieter(), replace(self._log, level=quiet))

    def _warn_of(self, report: Any) -> None:
        for sentence in warning_sentences(report):
            self._log.warn(sentence)


_LOUDNESS: Final[tuple[LogLevel, ...]] = ("error", "warning", "info", "debug")


class _Tables(TextOutput):
    """Tables alone: what else a terminal is told goes to the log."""

    def error(self, error: ChainmergeError) -> None:
        del error

    def quieter(self) -> Output:
        return _FewTables()


class _FewTables(QuietTextOutput):
    """Tables of what did not succeed."""

    def warn(self, sentence: str) -> None:
        del sentence

    def error(self, error: ChainmergeError) -> None:
        del error


def logged_tables(log_format: LogFormat, level: LogLevel) -> Output:
    """Tables, and a log."""
    return LoggedOutput(_Tables(), _log(log_format, level))


def logged_json(log_format: LogFormat, level: LogLevel) -> Output:
    """JSON of the result, or of the error, and a log."""
    return LoggedOutput(JsonOutput(), _log(log_format, level))


def _log(log_format: LogFormat, level: LogLevel) -> Log:
    stream = cast("TextIO", ForgivingStream(sys.stderr))
    return Log(stream, renderer(log_format, in_journal=_goes_to_journal(os.environ)), level)


def _goes_to_journal(environment: Mapping[str, str]) -> bool:
    """Whether standard error is what systemd has given to this unit (systemd.exec(5))."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
