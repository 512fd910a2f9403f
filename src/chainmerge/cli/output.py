# SPDX-License-Identifier: Apache-2.0
"""Where results and errors go: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar, cast

from chainmerge.cli.streams import console_on, has_edge, write_message, write_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.errors import ChainmergeError
    from chainmerge.report.layout import Block
    from chainmerge.report.progress import ProgressDisplay

Report = TypeVar("Report")


class Output(Protocol):
    """One way to tell the caller what happened."""

    def document(self, report: Report, table: Callable[[Report], Block]) -> None:
        """Show the result of a command that has one."""
        ...

    def last_event(self, report: Report, table: Callable[[Report], Block]) -> None:
        """Show the result of a command that has shown progress before."""
        ...

    def progress(self) -> ProgressDisplay:
        """Return a display of progress."""
        ...

    def error(self, error: ChainmergeError) -> None:
        """Show why a command did not do what was requested."""
        ...


class TextOutput:
    """Tables on standard output; progress and errors on standard error."""

    def document(self, report: Report, table: Callable[[Report], Block]) -> None:
        write_report(_shown_on(sys.stdout, table(report)))

    def last_event(self, report: Report, table: Callable[[Report], Block]) -> None:
        self.document(report, table)

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

    def document(self, report: Any, table: Callable[[Any], Block]) -> None:
        del table
        from chainmerge.report.json import encode  # noqa: PLC0415

        write_report(f"{encode(report)}\n")

    def last_event(self, report: Any, table: Callable[[Any], Block]) -> None:
        del table
        from chainmerge.report.json import encode_event  # noqa: PLC0415

        write_report(f"{encode_event('report', report)}\n")

    def progress(self) -> ProgressDisplay:
        from chainmerge.report.progress import ForgivingStream, JsonProgress  # noqa: PLC0415

        return JsonProgress(cast("TextIO", ForgivingStream(sys.stdout)))

    def error(self, error: ChainmergeError) -> None:
        from chainmerge.report.json import encode_error  # noqa: PLC0415

        write_report(f"{encode_error(error)}\n")
