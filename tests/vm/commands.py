# SPDX-License-Identifier: Apache-2.0
"""The chainmerge command, in a process that need not import it anew.

Importing numpy takes seconds in a machine that is emulated. A child that is forked from the
tests has it already; from there on it is the command as the user meets it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import chainmerge.cli.main
import chainmerge.cli.merge
import chainmerge.cli.plan

# Loaded here, so that children have them.
import chainmerge.merging.by_native
from tests.support.cli import Ran

if TYPE_CHECKING:
    from pathlib import Path


def chainmerge_forked(*arguments: str | Path) -> Ran:
    """Run a command to its end."""
    return Running(*arguments).wait()


class Running:
    """A command that has been started."""

    def __init__(self, *arguments: str | Path) -> None:
        self._out, self._err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        self.pid = os.fork()
        if self.pid == 0:
            _become_command([str(argument) for argument in arguments], self._out, self._err)

    def wait(self) -> Ran:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ran(status, _text_of(self._out), _text_of(self._err))

    def has_ended(self) -> bool:
        """Whether :meth:`wait` returns at once."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _become_command(arguments: list[str], out: BinaryIO, err: BinaryIO) -> NoReturn:
    status = 99
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        # Those of the parent are pytest's.
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        status = chainmerge.cli.main.run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _text_of(file: BinaryIO) -> str:
    file.seek(0)
    text = file.read().decode("utf-8", "surrogateescape")
    file.close()
    return text
