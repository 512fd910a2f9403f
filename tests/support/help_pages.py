# SPDX-License-Identifier: Apache-2.0
"""What ``--help`` shows: which commands there are, and which options each has."""

from __future__ import annotations

import contextlib
import io
import os
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from chainmerge.cli.main import run

if TYPE_CHECKING:
    from collections.abc import Iterator

# Wide enough that no option is folded.
_COLUMNS: Final = "200"
_PANEL: Final = re.compile(r"^╭─ (.+?) ─+╮$(.*?)^╰─+╯$", re.MULTILINE | re.DOTALL)
_COMMAND: Final = re.compile(r"^│ ([a-z][a-z-]*)  ", re.MULTILINE)
# Where one has to be given, it has an asterisk, and the others have a column less.
_OPTIONS: Final = re.compile(
    r"^│ (?:[* ]  )?((?:--?[a-z][\w-]*[ ,/]*)+)", re.MULTILINE | re.IGNORECASE
)
_SPELLING: Final = re.compile(r"--?[a-z][\w-]*", re.IGNORECASE)


@dataclass(frozen=True)
class Help:
    """What help shows of a command, which is called by its words behind the program's name."""

    words: tuple[str, ...]
    commands: tuple[str, ...]
    options: frozenset[str]

    @property
    def page(self) -> str:
        """What its page is to be called."""
        return "-".join(("chainmerge", *self.words))


@cache
def all_help() -> tuple[Help, ...]:
    """Everything that help leads to, from the program's own on."""
    return tuple(_below(()))


def _below(words: tuple[str, ...]) -> Iterator[Help]:
    shown = _help_of(words)
    yield shown
    for name in shown.commands:
        yield from _below((*words, name))


def _help_of(words: tuple[str, ...]) -> Help:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), _wide_terminal():
        assert run([*words, "--help"]) == 0
    panels = _PANEL.findall(said.getvalue())
    commands = [
        name for title, rows in panels if title == "Commands" for name in _COMMAND.findall(rows)
    ]
    options = [
        spelling
        for title, rows in panels
        if title != "Commands"
        for spellings in _OPTIONS.findall(rows)
        for spelling in _SPELLING.findall(spellings)
    ]
    return Help(words, tuple(commands), frozenset(options))


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _COLUMNS
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
