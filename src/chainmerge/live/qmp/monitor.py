# SPDX-License-Identifier: Apache-2.0
"""The QMP monitor of a VM that others started."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from chainmerge.engines.qemu.qmp import Qmp, QmpLost, QmpRefused
from chainmerge.live.errors import VmRefused, VmUnreachable
from chainmerge.live.qemu_processes import listener_of, qemu_connected_to

if TYPE_CHECKING:
    from collections.abc import Mapping

_GREETING_SECONDS: Final = 10.0
# Removing a bitmap can flush, and a flush takes as long as the storage likes.
_ANSWER_SECONDS: Final = 120.0


class Monitor:
    """The QMP socket of a VM, at ``path``; a context manager. Messages call the VM ``name``.

    QEMU serves one client of a monitor at a time, and managers such as Proxmox VE have no other.
    So the connection is given up where others are let in, and taken up again by the next command.
    """

    def __init__(self, path: str, hold_seconds: float | None = None) -> None:
        """Connect to the socket at *path*.

        Args:
            path: of the socket.
            hold_seconds: how long the connection is held at a time while there is nothing to do
                but to wait; None for as long as there is one.

        Raises:
            VmUnreachable: nobody answers there, or somebody else is connected.
        """
        self.name = f"the VM at {path}"
        self.path = path
        self._hold_seconds = hold_seconds
        self._listener: int | None = None
        self._process: int | None = None
        self._undo = contextlib.ExitStack()
        self._qmp: Qmp | None = None
        self._connected_at = 0.0
        self._connect(_GREETING_SECONDS)

    def _connect(self, greeting_seconds: float) -> Qmp:
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX))
            try:
                _connect(connection, self.path)
            except OSError as error:
                raise VmUnreachable(self.name, error.strerror or str(error)) from error
            except ValueError as error:
                raise VmUnreachable(self.name, str(error)) from error
            self._listener = listener_of(connection)
            number = os.fstat(connection.fileno()).st_ino
            try:
                qmp = undo.enter_context(Qmp(connection, greeting_seconds))
            except QmpLost as lost:
                raise VmUnreachable(self.name, str(lost)) from lost
            self._process = qemu_connected_to(number, self._listener)
            self._undo = undo.pop_all()
        self._qmp = qmp
        self._connected_at = time.monotonic()
        return qmp

    def _connected(self) -> Qmp:
        # Others who are served first have theirs done in less.
        return self._qmp or self._connect(_ANSWER_SECONDS)

    def __enter__(self) -> Self:
        """Return the connection itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """As :meth:`close`."""
        self.close()

    def close(self) -> None:
        """Disconnect; the VM goes on with whatever it does."""
        self._qmp = None
        self._undo.close()

    def let_others_in(self) -> None:
        """Disconnect until the next command, unless the connection is to be held."""
        if self._hold_seconds is not None:
            self.close()

    @property
    def working_directory(self) -> Path | None:
        """From where the VM counts names of files; None where that cannot be told."""
        try:
            return Path(f"/proc/{self.process or self._listener}/cwd").readlink()
        except OSError:
            return None

    @property
    def process(self) -> int | None:
        """The id of the QEMU at the other end; None where it cannot be told, or is elsewhere."""
        return self._process

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a command and return its result, as parsed from JSON.

        Raises:
            VmRefused: the VM answered with an error.
            VmUnreachable: it did not answer.
        """
        qmp = self._connected()
        try:
            return qmp.execute(command, arguments, _ANSWER_SECONDS)
        except QmpRefused as refused:
            raise VmRefused(self.name, command, str(refused)) from refused
        except QmpLost as lost:
            raise VmUnreachable(self.name, str(lost)) from lost

    def wait_for_event(self, seconds: float) -> None:
        """Return when an event has come, at the latest after so many seconds."""
        qmp = self._connected()
        qmp.next_event(seconds)
        # More than one is no more reason to look than one.
        qmp.drop_events()

    def rest(self, seconds: float) -> None:
        """As :meth:`wait_for_event`; where the connection was held long enough, others get in.

        Events that come meanwhile are not heard of.
        """
        hold = self._hold_seconds
        if hold is not None and time.monotonic() - self._connected_at >= hold:
            self.close()
            time.sleep(seconds)
        else:
            self.wait_for_event(seconds)


def _connect(connection: socket.socket, path: str) -> None:
    """Connect to a socket, however long its name is: sun_path takes 107 bytes."""
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_CLOEXEC)  # noqa: PTH120
    try:
        connection.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")  # noqa: PTH119
    finally:
        os.close(directory)
