# SPDX-License-Identifier: Apache-2.0
"""Where results and errors go: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO, TypeVar, cast

from chainmerge.cli.streams import console_on, has_edge, write_message, write_report
from chainmerge.documents.text import printable
from chainmerge.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.documents.progress import ProgressEvent
    from chainmerge.errors import ChainmergeError
    from chainmerge.report.layout import Block
    from chainmerge.report.progress import ProgressDisplay

Report = TypeVar("Report")


class Output(Protocol):
    """One way to tell the caller what happened.

    The ``status`` is the exit status of the command that the report is of.
    """

    def document(
        self,
        report: Report,
        table: Callable[[Report], Block],
        status: ExitCode = ExitCode.DONE,
    ) -> None:
        """Show the result of a command that has one."""
        ...

    def last_event(
        self,
        report: Report,
        table: Callable[[Report], Block],
        status: ExitCode = ExitCode.DONE,
    ) -> None:
        """Show the result of a command that has shown progress before."""
        ...

    def progress(self) -> ProgressDisplay:
        """Return a display of progress."""
        ...

    def error(self, error: ChainmergeError) -> None:
        """Show why a command did not do what was requested."""
        ...

    def quieter(self) -> Output:
        """Return the same without what nobody reads as long as all goes well."""
        ...


class TextOutput:
    """Tables on standard output; progress and errors on standard error."""

    def document(
        self,
        report: Report,
        table: Callable[[Report], Block],
        status: ExitCode = ExitCode.DONE,
    ) -> None:
        del status
        write_report(_shown_on(sys.stdout, table(report)))

    def last_event(
        self,
        report: Report,
        table: Callable[[Report], Block],
        status: ExitCode = ExitCode.DONE,
    ) -> None:
        self.document(report, table, status)

    def progress(self) -> ProgressDisplay:
        # Imported where it is used: drawing bars takes long to import.
        from chainmerge.report.progress import ForgivingStream, LineProgress  # noqa: PLC0415

        stream = cast("TextIO", ForgivingStream(sys.stderr))
        if not stream.isatty():
            return LineProgress(stream)
        from chainmerge.report.bar import BarProgress  # noqa: PLC0415

        return BarProgress(console_on(stream))

    def error(self, error: ChainmergeError) -> None:
        # Imported where it is used, as most commands end without one.
        from chainmerge.report.error_message import error_message  # noqa: PLC0415

        write_message(_shown_on(sys.stderr, error_message(error)))

    def quieter(self) -> Output:
        return QuietTextOutput()


class QuietTextOutput(TextOutput):
    """Errors, warnings, and reports of what did not succeed; for jobs that nobody watches."""

    def document(
        self,
        report: Report,
        table: Callable[[Report], Block],
        status: ExitCode = ExitCode.DONE,
    ) -> None:
        if status is not ExitCode.DONE:
            super().document(report, table, status)
            return
        for sentence in warning_sentences(report):
            self.warn(sentence)

    def warn(self, sentence: str) -> None:
        """Say what the user should know."""
        write_message(f"chainmerge: warning: {printable(sentence)}\n")

    def progress(self) -> ProgressDisplay:
        return _NoProgress()

    def quieter(self) -> Output:
        return self


def show_before_asking(report: Report, table: Callable[[Report], Block]) -> None:
    """Show what a question is about, where the question goes: standard output has results."""
    write_message(_shown_on(sys.stderr, table(report)))


def warning_sentences(report: Any) -> Iterator[str]:
    """What a report warns of, those of the merges that it is about included."""
    yield from getattr(report, "warnings", ())
    for disk in (*getattr(report, "disks", ()), *getattr(report, "ranges", ())):
        # A plan of several merges has plans, their report reports with what became of each.
        for sentence in warning_sentences(getattr(disk, "report", disk)):
            yield f"{disk.top}: {sentence}"


class _NoProgress:
    """A display of progress that shows none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, event: ProgressEvent) -> None:
        del event


def _shown_on(stream: TextIO, block: Block) -> str:
    # Imported where they are used: colours take longer to import than a small merge takes, and
    # --version shows neither.
    if has_edge(stream):
        from chainmerge.report.styled import styled  # noqa: PLC0415

        return styled(block, console_on(stream))
    from chainmerge.report.plain import plain_text  # noqa: PLC0415

    return plain_text(block)


class JsonOutput:
    """JSON on standard output, one document or event a line, errors included."""

    def document(
        self,
        report: Any,
        table: Callable[[Any], Block],
        status: ExitCode = ExitCode.DONE,
    ) -> None:
        del table, status
        from chainmerge.report.json import encode  # noqa: PLC0415

        write_report(f"{encode(report)}\n")

    def last_event(
        self,
        report: Any,
        table: Callable[[Any], Block],
        status: ExitCode = ExitCode.DONE,
    ) -> None:
        del table, status
        from chainmerge.report.json import encode_event  # noqa: PLC0415

        write_report(f"{encode_event('report', report)}\n")

    def progress(self) -> ProgressDisplay:
        from chainmerge.report.progress import ForgivingStream, JsonProgress  # noqa: PLC0415

        return JsonProgress(cast("TextIO", ForgivingStream(sys.stdout)))

    def error(self, error: ChainmergeError) -> None:
        from chainmerge.report.json import encode_error  # noqa: PLC0415

        write_report(f"{encode_error(error)}\n")

    def quieter(self) -> Output:
        return QuietJsonOutput()


class QuietJsonOutput(JsonOutput):
    """JSON without progress: one line, the report or the error."""

    def progress(self) -> ProgressDisplay:
        return _NoProgress()

    def quieter(self) -> Output:
        return self
