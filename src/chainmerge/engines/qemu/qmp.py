# SPDX-License-Identifier: Apache-2.0
"""A QMP client for synchronous code, over a socket that is connected already.

Only this module knows the ``qemu.qmp`` package. Its asynchronous client becomes a few synchronous
methods, and its exceptions become two: QEMU said no (:class:`QmpRefused`), or nobody knows what
it did (:class:`QmpLost`). Who uses the client says in its own errors which process that was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Self, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from chainmerge.engines.qemu.event_loops import SynchronousLoop

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine, Mapping

_T = TypeVar("_T")

# qemu.qmp logs a lost connection as an error. We raise one; without a handler, Python would
# print the log record on top of that.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class QmpRefused(Exception):
    """QEMU answered a command with an error, which this is as text."""


class QmpLost(Exception):
    """The connection broke, or an answer did not come in time; why, as text."""


class Qmp:
    """A QMP connection; a context manager.

    A command that is not answered in time is a lost connection: whether it took effect is not
    known, and an answer that comes later must not be taken for that to another command.
    """

    def __init__(self, connection: socket.socket, greeting_seconds: float | None = None) -> None:
        """Negotiate with the QEMU at the other end of *connection*.

        Args:
            connection: a connected socket; closing it is left to the caller.
            greeting_seconds: how long the greeting may take; None for as long as it likes.

        Raises:
            QmpLost: there is no QMP at the other end, or no greeting in time.
        """
        self._client = QMPClient()
        self._greeting_seconds = greeting_seconds
        with contextlib.ExitStack() as undo:
            self._loop = undo.enter_context(SynchronousLoop())
            self._run(self._client.connect(connection), greeting_seconds)
            undo.callback(self._disconnect)
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        """Return the connection itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect."""
        self._undo.close()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        answer_seconds: float | None = None,
    ) -> Any:
        """Run a command and return its result, as parsed from JSON.

        Args:
            command: its name.
            arguments: its arguments.
            answer_seconds: how long the answer may take; None for as long as it likes.

        Raises:
            QmpRefused: QEMU answered with an error.
            QmpLost: it did not answer.
        """
        return self._run(self._client.execute(command, dict(arguments or {})), answer_seconds)

    def next_event(self, seconds: float) -> str | None:
        """Return the name of the next event; None if there is none within *seconds*.

        A QEMU that is gone sends no events: ask it something from time to time.
        """
        try:
            event = self._loop.run(asyncio.wait_for(self._client.events.get(), seconds))
        except TimeoutError:
            return None
        return str(event["event"])

    def drop_events(self) -> None:
        """Forget the events that have come so far."""
        self._client.events.clear()

    def _run(self, work: Coroutine[Any, Any, _T], seconds: float | None) -> _T:
        try:
            return self._loop.run(asyncio.wait_for(work, seconds))
        except ExecuteError as refused:
            raise QmpRefused(str(refused)) from refused
        except TimeoutError as error:
            raise QmpLost(f"no answer within {seconds or 0:.0f} s") from error
        except (QMPError, OSError, EOFError, ValueError, RecursionError) as error:
            # The last two are of a line that is longer, or nested deeper, than can be read.
            raise QmpLost(str(error) or type(error).__name__) from error

    def _disconnect(self) -> None:
        with contextlib.suppress(QmpLost):
            self._run(self._client.disconnect(), self._greeting_seconds)
