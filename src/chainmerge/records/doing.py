# SPDX-License-Identifier: Apache-2.0
"""Who does a merge, and how far its copy has come: for whoever looks at it from outside.

Nothing is decided by this. A number of a process is given to another one later, so a process is
known by when it began, too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import msgspec

from chainmerge.records.identity import this_boot

_LONGEST_COMMAND: Final = 1000
# In /proc/PID/stat, counted from the state of the process, which follows its name.
_BEGAN: Final = 19


class Doer(msgspec.Struct, frozen=True):
    """A process that does a merge, or did.

    ``began`` is when it began, in the kernel's ticks since it booted; ``boot`` tells that run of
    the machine from others. Both are empty if nothing tells. ``command`` are its words.
    """

    pid: int
    host: str
    boot: str
    began: str
    command: list[str]

    @property
    def is_alive(self) -> bool:
        """Whether it is certainly still there, on this machine."""
        is_here = self.host == os.uname().nodename and self.boot == this_boot()
        return is_here and bool(self.boot and self.began) and _began(self.pid) == self.began


class CopiedSoFar(msgspec.Struct, frozen=True):
    """How far a copy had come when that was written down: bytes, and how long they took."""

    done: int
    total: int
    seconds: float

    @property
    def rate(self) -> int:
        """Bytes per second; 0 if it is not known."""
        return int(self.done / self.seconds) if self.seconds > 0 else 0


def this_process() -> Doer:
    """The process that asks."""
    pid = os.getpid()
    words, room = [], _LONGEST_COMMAND
    for word in sys.argv:
        room -= len(word)
        if room < 0:
            break
        words.append(word)
    return Doer(pid, os.uname().nodename, this_boot(), _began(pid), words)


def _began(pid: int) -> str:
    try:
        told = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = told.rpartition(")")[2].split()
    return fields[_BEGAN] if len(fields) > _BEGAN else ""
