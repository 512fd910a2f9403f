# SPDX-License-Identifier: Apache-2.0
"""A command in a real pseudo-terminal, and what is to be read on its screen afterwards."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import termios
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.support.cli import COMMAND, environment

if TYPE_CHECKING:
    from pathlib import Path

HEIGHT: Final = 24
# Of the terminal of the tests.
_OF_OURS: Final = frozenset({"LINES", "NO_COLOR"})
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
# Commands, and errors with the way out.
_LEFT_TO_THE_TERMINAL: Final = re.compile(
    r"\s*(?:[A-Z][a-z ]+: )?chainmerge [a-z]+ |chainmerge: |  what to do: "
)
_ALONE: Final = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")


@dataclass(frozen=True)
class Screen:
    """What a command has shown, and how it ended."""

    status: int
    sent: str
    """All that it has sent to the terminal."""
    width: int

    @property
    def raw(self) -> str:
        """The same without what moves the cursor or sets colours."""
        return _ESCAPES.sub("", self.sent)

    @property
    def drawn(self) -> list[str]:
        """All lines, those that were drawn over included."""
        return [part for line in self.raw.split("\n") for part in line.split("\r")]

    @property
    def lines(self) -> list[str]:
        """The lines that stay."""
        return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in self.raw.split("\n")]

    @property
    def rows(self) -> list[str]:
        """The same as the terminal has them: folded where they are wider."""
        return [
            line[at : at + self.width]
            for line in self.lines
            for at in range(0, max(1, len(line)), self.width)
        ]

    @property
    def too_wide(self) -> list[str]:
        """Lines that do not fit. What is to be copied as one line is left to the terminal."""
        wide = [line for line in self.drawn if len(line) > self.width]
        return [line for line in wide if not _LEFT_TO_THE_TERMINAL.match(line)]

    @property
    def first(self) -> str:
        """What is to be read without scrolling back, as one text."""
        rows = self.rows[:HEIGHT]
        full = (row if len(row) == self.width else f"{row} " for row in rows)
        return " ".join("".join(full).split())

    @property
    def height(self) -> int:
        """Rows in use, from the first to the last one."""
        return len("\n".join(self.rows).rstrip().split("\n"))


def typed(
    *arguments: str,
    where: Path,
    width: int = 80,
    answer: str = "",
    alone: bool = True,
    **more: str,
) -> Screen:
    """Run ``chainmerge`` in a terminal of so many columns and 24 lines, in that directory.

    *answer* is what is typed to whatever it asks. Unless *alone* is false, it does not see what
    else runs on this machine.
    """
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, width, 0, 0))
    env = environment(**{"TERM": "xterm-256color", **more})
    process = subprocess.Popen(
        [*(_ALONE if alone else ()), *COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=where,
        env={name: value for name, value in env.items() if name in more or name not in _OF_OURS},
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    try:
        # The terminal hangs up (EIO) when the last one who has it open is gone.
        while piece := _read(ours):
            shown += piece
            if answer and shown.endswith(b": "):
                os.write(ours, answer.encode())
                answer = ""
    finally:
        os.close(ours)
    text = shown.decode(errors="replace").replace("\r\n", "\n")
    return Screen(process.wait(), text, width)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""
