# SPDX-License-Identifier: Apache-2.0
"""The QMP monitor of a VM that others started."""

from __future__ import annotations

import contextlib
import os
import socket
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
    """A connection to a QMP socket; a context manager."""

    def __init__(self, path: str) -> None:
        """Connect to the socket at *path*.

        Raises:
            VmUnreachable: nobody answers there, or somebody else is connected.
        """
        self.name = f"the VM at {path}"
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX))
            try:
                _connect(connection, path)
            except OSError as error:
                raise VmUnreachable(self.name, error.strerror or str(error)) from error
            except ValueError as error:
                raise VmUnreachable(self.name, str(error)) from error
            self._listener = listener_of(connection)
            self._socket_number = os.fstat(connection.fileno()).st_ino
            try:
                self._qmp = undo.enter_context(Qmp(connection, _GREETING_SECONDS))
            except QmpLost as lost:
                raise VmUnreachable(self.name, str(lost)) from lost
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        """Return the connection itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """As :meth:`close`."""
        self.close()

    def close(self) -> None:
        """Disconnect; the VM goes on with whatever it does."""
        self._undo.close()

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
        return qemu_connected_to(self._socket_number, self._listener)

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a command and return its result, as parsed from JSON.

        Raises:
            VmRefused: the VM answered with an error.
            VmUnreachable: it did not answer.
        """
        try:
            return self._qmp.execute(command, arguments, _ANSWER_SECONDS)
        except QmpRefused as refused:
            raise VmRefused(self.name, command, str(refused)) from refused
        except QmpLost as lost:
            raise VmUnreachable(self.name, str(lost)) from lost

    def wait_for_event(self, seconds: float) -> None:
        """Return when an event has come, at the latest after so many seconds."""
        self._qmp.next_event(seconds)
        # More than one is no more reason to look than one.
        self._qmp.drop_events()


def _connect(connection: socket.socket, path: str) -> None:
    """Connect to a socket, however long its name is: sun_path takes 107 bytes."""
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_CLOEXEC)  # noqa: PTH120
    try:
        connection.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")  # noqa: PTH119
    finally:
        os.close(directory)
