# SPDX-License-Identifier: Apache-2.0
"""Commands as a user types them, each in a process that may be killed at a chosen moment."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import chainmerge.cli.main

if TYPE_CHECKING:
    from pathlib import Path

# What changes something that outlives the process.
_CHANGES: Final = (
    "pwrite", "pwritev", "ftruncate", "truncate", "posix_fallocate", "copy_file_range",
    "fdatasync", "fsync", "rename", "replace", "unlink", "link",
)  # fmt: skip
_RECORDS: Final = ("chainmerge.records.files", "chainmerge.state_files")

KILLED: Final = -signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


def carry_out(arguments: list[str], state: Path, *, dies_at: int | None = None) -> Ended:
    """Run ``chainmerge`` with *arguments*; with *dies_at* it is killed before that change.

    *state* is where it keeps what it knows of block devices.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                # The runner of the tests has put its own in their place.
                sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape")
                sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="surrogateescape")
                _keep_state_in(state)
                if dies_at is not None:
                    _die_at(dies_at)
                status = chainmerge.cli.main.run(arguments)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        said = (one.read().decode("utf-8", "surrogateescape") for one in (out, err))
        return Ended(status, *said)


def _keep_state_in(directory: Path) -> None:
    for name in _RECORDS:
        with contextlib.suppress(ImportError):
            setattr(importlib.import_module(name), "STATE_DIRECTORY", directory)  # noqa: B010


def _die_at(number: int) -> None:
    left = number

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in _CHANGES:
        setattr(os, name, counted(getattr(os, name)))
