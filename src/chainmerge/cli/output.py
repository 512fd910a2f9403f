# SPDX-License-Identifier: Apache-2.0
"""Where results and errors go: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar, cast

from rich.text import Text

from chainmerge.cli.streams import console_on, write_message, write_report
from chainmerge.report import layout
from chainmerge.report.layout import words

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from chainmerge.errors import ChainmergeError
    from chainmerge.report.progress import ProgressDisplay

Report = TypeVar("Report")


class Output(Protocol):
    """One way to tell the caller what happened."""

    def document(self, report: Report, table: Callable[[Report], RenderableType]) -> None:
        """Show the result of a command that has one."""
        ...

    def last_event(self, report: Report, table: Callable[[Report], RenderableType]) -> None:
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

    def document(self, report: Report, table: Callable[[Report], RenderableType]) -> None:
        console = console_on(sys.stdout)
        with console.capture() as captured:
            # Commands are not broken: they are to be copied from there.
            console.print(table(report), crop=False)
        # Tables are padded on the right to the width of their columns.
        write_report("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def last_event(self, report: Report, table: Callable[[Report], RenderableType]) -> None:
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
        message = Text.assemble(
            words("chainmerge: ", layout.BAD), words(error.sentence), "\n",
            words("  what to do: ", layout.QUIET), words(error.advice), "\n",
            words("  more: ", layout.QUIET), words(f"chainmerge explain {error.code}"),
        )  # fmt: skip
        console = console_on(sys.stderr)
        with console.capture() as captured:
            console.print(message, soft_wrap=True)
        write_message(captured.get())


class JsonOutput:
    """JSON on standard output, one document or event a line, errors included."""

    def document(self, report: Any, table: Callable[[Any], RenderableType]) -> None:
        del table
        from chainmerge.report.json import encode  # noqa: PLC0415

        write_report(f"{encode(report)}\n")

    def last_event(self, report: Any, table: Callable[[Any], RenderableType]) -> None:
        del table
        from chainmerge.report.json import encode_event  # noqa: PLC0415

        write_report(f"{encode_event('report', report)}\n")

    def progress(self) -> ProgressDisplay:
        from chainmerge.report.progress import ForgivingStream, JsonProgress  # noqa: PLC0415

        return JsonProgress(cast("TextIO", ForgivingStream(sys.stdout)))

    def error(self, error: ChainmergeError) -> None:
        from chainmerge.report.json import encode_error  # noqa: PLC0415

        write_report(f"{encode_error(error)}\n")
