# SPDX-License-Identifier: Apache-2.0
"""The QMP monitor of a VM that others started: a synchronous client.

Besides :mod:`chainmerge.engines.qemu.daemon`, this is the only module that knows the ``qemu.qmp``
package. A command that is not answered in time is a lost connection: whether it took effect is
not known, and an answer that comes later must not be taken for that to another command.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from chainmerge.engines.qemu.event_loops import SynchronousLoop
from chainmerge.live.errors import VmRefused, VmUnreachable
from chainmerge.live.peer import peer_of, qemu_behind

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from types import TracebackType

_GREETING_SECONDS: Final = 10.0
# Removing a bitmap can flush, and a flush takes as long as the storage likes.
_ANSWER_SECONDS: Final = 120.0

_T = TypeVar("_T")

logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


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
            self._peer = peer_of(connection)
            self._socket_number = os.fstat(connection.fileno()).st_ino
            self._runner = undo.enter_context(SynchronousLoop())
            self._client = QMPClient()
            self._run(self._client.connect(connection), _GREETING_SECONDS)
            undo.callback(self._disconnect)
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        """Return the connection itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect; the VM goes on with whatever it does."""
        self._undo.close()

    @property
    def working_directory(self) -> Path | None:
        """From where the VM counts names of files; None where that cannot be told."""
        try:
            return Path(f"/proc/{self.process or self._peer}/cwd").readlink()
        except OSError:
            return None

    @property
    def process(self) -> int | None:
        """The id of the QEMU at the other end; None where it cannot be told, or is elsewhere."""
        return qemu_behind(self._socket_number, self._peer)

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a command and return its result, as parsed from JSON.

        Raises:
            VmRefused: the VM answered with an error.
            VmUnreachable: it did not answer.
        """
        try:
            return self._run(self._client.execute(command, dict(arguments or {})), _ANSWER_SECONDS)
        except ExecuteError as refused:
            raise VmRefused(self.name, command, str(refused)) from refused

    def wait_for_event(self, seconds: float) -> None:
        """Return when an event has come, at the latest after so many seconds."""
        with contextlib.suppress(TimeoutError):
            self._runner.run(asyncio.wait_for(self._client.events.get(), seconds))
        # More than one is no more reason to look than one.
        self._client.events.clear()

    def _run(self, work: Coroutine[Any, Any, _T], seconds: float) -> _T:
        try:
            return self._runner.run(asyncio.wait_for(work, seconds))
        except ExecuteError:
            raise
        except TimeoutError as error:
            reason = f"no answer within {seconds:.0f} s"
            raise VmUnreachable(self.name, reason) from error
        except (QMPError, OSError, EOFError) as error:
            raise VmUnreachable(self.name, str(error) or type(error).__name__) from error

    def _disconnect(self) -> None:
        with contextlib.suppress(VmUnreachable):
            self._run(self._client.disconnect(), _GREETING_SECONDS)


def _connect(connection: socket.socket, path: str) -> None:
    """Connect to a socket, however long its name is: sun_path takes 107 bytes."""
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_CLOEXEC)  # noqa: PTH120
    try:
        connection.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")  # noqa: PTH119
    finally:
        os.close(directory)
