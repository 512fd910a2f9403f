# SPDX-License-Identifier: Apache-2.0
"""One ``qemu-storage-daemon`` process and the QMP connection to it.

What the process inherits and why:

- one end of a socket pair, so that there is no socket path that others could use, and
  nothing to wait for: a daemon that dies early is the end of the file on our side;
- ``PR_SET_PDEATHSIG``: it is killed when we die, for whatever reason. The kernel means the
  *thread* that started it, so a :class:`StorageDaemon` is used and closed in one thread;
- the image locks (OFD locks belong to the open file description): even if we are killed,
  they hold until the daemon is gone too, and no one can meet its last writes;
- a session of its own, so that Ctrl-C on the terminal reaches us and not the daemon.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from typing import IO, TYPE_CHECKING, Any, Self

from chainmerge.engines.qemu.errors import (
    CommandRefused,
    ConnectionLost,
    DaemonFailed,
    DaemonMissing,
)
from chainmerge.engines.qemu.qmp import Qmp, QmpLost, QmpRefused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

STORAGE_DAEMON = "qemu-storage-daemon"
MAX_COMPLAINT_BYTES = 64 << 10
SECONDS_TO_END = 60.0

# $1 is our process id. If we died before setpriv had asked for the signal, the shell has
# another parent by now: then no daemon must start, it would outlive us and keep the locks.
_EXEC_UNLESS_ORPHANED = 'test "$PPID" = "$1" && shift && exec "$@"'


class StorageDaemon:
    """A running storage daemon; a context manager.

    Leaving the context ends the process: orderly if :meth:`quit` was called or if it heeds
    a termination signal (it closes its images then), otherwise by force.
    """

    def __init__(self, inherited_fds: Sequence[int] = ()) -> None:
        """Start the daemon and connect to it.

        Args:
            inherited_fds: file descriptors that it keeps open, under the same numbers, as
                long as it lives.

        Raises:
            DaemonMissing: it is not installed.
            DaemonFailed: it did not start.
        """
        program = _found(STORAGE_DAEMON)
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                self._process = _started(program, theirs.fileno(), inherited_fds)
            self._complaints = _Complaints(self._process.stderr)
            undo.callback(self._end_process)
            try:
                self._qmp = undo.enter_context(Qmp(ours))
            except QmpLost as lost:
                raise DaemonFailed(f"did not start: {self._reason_for(lost)}") from lost
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        """Return the daemon."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process if it still runs, and release everything."""
        self._undo.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def complaints(self) -> str:
        """What it has written to standard error, at most the first 64 KiB.

        Complete only after :meth:`quit`.
        """
        return self._complaints.text()

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a QMP command and return its result, as parsed from JSON.

        Raises:
            CommandRefused: the daemon answered with an error.
            ConnectionLost: the daemon is gone.
        """
        try:
            return self._qmp.execute(command, arguments)
        except QmpRefused as refused:
            raise CommandRefused(command, str(refused)) from refused
        except QmpLost as lost:
            raise ConnectionLost(self._reason_for(lost)) from lost

    def wait_for_event(self, seconds: float) -> str | None:
        """Return the name of the next QMP event; None if there is none within *seconds*.

        A daemon that is gone sends no events: ask it something from time to time.
        """
        return self._qmp.next_event(seconds)

    def quit(self) -> None:
        """Tell the daemon to end, and wait until it has.

        Raises:
            DaemonFailed: it does not end, or exits with another status than 0.
        """
        # The connection may break before the answer arrives.
        with contextlib.suppress(ConnectionLost):
            self.execute("quit")
        try:
            status = self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired as error:
            raise DaemonFailed(f"does not end within {SECONDS_TO_END:.0f} s") from error
        self._complaints.wait()
        if status != 0:
            raise DaemonFailed(f"{_ending(status)}: {self.complaints}".rstrip(": "))

    def _reason_for(self, lost: QmpLost) -> str:
        """Why the connection broke: the daemon's own end if there is one, else *lost*."""
        try:
            # Its sockets close a moment before it can be waited for.
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return str(lost)
        self._complaints.wait()
        return f"it {_ending(status)}: {self.complaints}".rstrip(": ")

    def _end_process(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._complaints.wait()


class _Complaints:
    """Collects what a process writes to standard error, so that it never has to wait for us."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        self._stream = stream
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        with self._stream:
            for chunk in _chunks(self._stream):
                self._kept += chunk[: MAX_COMPLAINT_BYTES - len(self._kept)]

    def wait(self) -> None:
        """Wait until the process has closed its end."""
        self._thread.join()

    def text(self) -> str:
        return self._kept.decode(errors="replace").strip()


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := os.read(stream.fileno(), 4096):
        yield chunk


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise DaemonMissing(program)
    return path


def _started(program: str, qmp_fd: int, inherited_fds: Sequence[int]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            _command_line(program, qmp_fd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(qmp_fd, *inherited_fds),
            start_new_session=True,
        )
    except OSError as error:
        raise DaemonFailed(f"did not start: {error}") from error


def _command_line(program: str, qmp_fd: int) -> list[str]:
    die_with_us = ["setpriv", "--pdeathsig", "KILL", "--"]
    unless_orphaned = ["sh", "-c", _EXEC_UNLESS_ORPHANED, "sh", str(os.getpid())]
    qmp = ["--chardev", f"socket,id=qmp,fd={qmp_fd}", "--monitor", "chardev=qmp"]
    return [*die_with_us, *unless_orphaned, program, *qmp]


def _ending(status: int) -> str:
    if status < 0:
        return f"was killed by signal {-status}"
    return f"exited with status {status}"
