# SPDX-License-Identifier: Apache-2.0
"""Standard output and standard error, made fit for whatever has to be printed."""

from __future__ import annotations

import codecs
import io
import os
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TextIO

from chainmerge.cli.errors import ReportNotDelivered

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

# What tables draw with, for an output that is not Unicode.
_PLAIN: Final[Mapping[str, str]] = MappingProxyType(
    {
        "◉": "*",
        "●": "o",
        "━": "=",
        "│": "|",
        "├": "|",
        "─": "-",
        "█": "#",
        "▓": "%",
        "▒": "=",
        "░": "-",
        "·": ".",
    }
)
_ERROR_HANDLER: Final = "chainmerge-plain"


def prepare_streams() -> None:
    """Make the standard streams take every character, whatever the locale."""
    _open_closed_streams()
    codecs.register_error(_ERROR_HANDLER, _plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERROR_HANDLER)


def _open_closed_streams() -> None:
    """Open /dev/null in place of closed streams: the next file opened would get their number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python has None for what was closed.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")


def has_edge(stream: TextIO) -> bool:
    """Whether lines are to be folded there. A file or a pipe has no edge."""
    return stream.isatty() or "COLUMNS" in os.environ


def console_on(stream: TextIO) -> Console:
    """Return a console that never reads markup, emoji or numbers into what it prints."""
    from rich.console import Console  # noqa: PLC0415 (only where something folds)

    return Console(file=stream, markup=False, emoji=False, highlight=False)


def write_report(text: str) -> None:
    """Write a report to standard output, to its end.

    A reader that went away (``| head``) has what it wanted, and that is not a failure.

    Raises:
        ReportNotDelivered: Standard output takes no more, for any other reason.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()
    except OSError as error:
        _abandon_stdout()
        raise ReportNotDelivered(error.strerror or str(error)) from error


def write_message(text: str) -> None:
    """Write to standard error, if anybody still listens there."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        return


def _abandon_stdout() -> None:
    # What is still buffered would raise once more when the interpreter ends.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _plain_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in text)
    return "".join(plain), error.end
