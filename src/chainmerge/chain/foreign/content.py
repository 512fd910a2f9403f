# SPDX-License-Identifier: Apache-2.0
"""What the guest sees of an image that only QEMU reads.

``qemu-nbd`` serves it, from the first byte that is asked for on: where a merge needs nothing of
the image, QEMU is not started. It ends with the connection, and so with this process, however
that ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from chainmerge.chain.foreign.formats import (
    LIMITS_TO_READ,
    QemuName,
    not_started,
    opened_for_qemu,
    unreadable,
)
from chainmerge.chain.foreign.nbd import NbdClient, NbdFailed
from chainmerge.storage.errors import ReadFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.model import ImageInfo

_PROGRAM: Final = "qemu-nbd"
_TIMEOUT_SECONDS: Final = 120.0
_SECONDS_TO_END: Final = 10.0
_MOST_AT_ONCE: Final = 16 << 20
_MESSAGE_BYTES: Final = 4096

# A server that is given its socket finds it as descriptor 3, if it is the process that is meant
# (sd_listen_fds(3)). It comes as standard input, as a shell moves single digits only.
_AS_SERVICE: Final = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 </dev/null'


class ForeignContent:
    """A :class:`~chainmerge.qcow2.readable.Readable` of the guest's disk; a context manager.

    May be read by several threads.
    """

    def __init__(self, image: ImageInfo) -> None:
        """Of an image as it was found. Nothing is opened yet."""
        self._image = image
        self._lock = threading.Lock()
        self._undo = contextlib.ExitStack()
        self._client: NbdClient | None = None

    @property
    def name(self) -> str:
        """The image's path."""
        return str(self._image.path)

    @property
    def size(self) -> int:
        """Bytes of the guest's disk. Raises what says why nobody knows."""
        return self._image.virtual_size

    @property
    def is_served(self) -> bool:
        """Whether QEMU was needed."""
        return self._client is not None

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly *length* bytes; what lies past the end reads as zeros.

        Raises:
            ReadFailed: QEMU cannot read it, or has ended.
            ForeignUnreadable: QEMU does not open it.
        """
        end = min(offset + length, self.size)
        pieces = []
        for at in range(offset, end, _MOST_AT_ONCE):
            count = min(_MOST_AT_ONCE, end - at)
            with self._lock, self._failing_at(at, count):
                pieces.append(self._served().read(at, count))
        return b"".join(pieces).ljust(length, b"\0")

    def zeroes(self, start: int, end: int) -> Iterator[list[tuple[int, int, bool]]]:
        """Yield start and end of runs, and whether each reads as zeros, without gaps.

        Raises what :meth:`read` raises.
        """
        while start < end:
            with self._lock, self._failing_at(start, end - start):
                runs = self._served().zeroes(start, end - start)
            told = []
            for length, is_zero in runs:
                told.append((start, start + length, is_zero))
                start += length
            yield told

    def close(self) -> None:
        """End QEMU, if it was needed."""
        self._client = None
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _failing_at(self, offset: int, length: int) -> Iterator[None]:
        try:
            yield
        except NbdFailed as error:
            raise ReadFailed(self.name, offset, length, f"qemu-nbd: {error}") from error

    def _served(self) -> NbdClient:
        if self._client is None:
            self._client = self._serve()
        return self._client

    def _serve(self) -> NbdClient:
        with contextlib.ExitStack() as undo:
            messages = undo.enter_context(tempfile.TemporaryFile())
            listening, connection = _connected_sockets()
            undo.callback(connection.close)
            with listening, opened_for_qemu(self._image) as name:
                process = self._started(name, listening, messages.fileno())
            undo.callback(_end, process)
            # Done first: it is what ends the process.
            undo.callback(connection.close)
            try:
                client = NbdClient(connection)
            except NbdFailed as error:
                _end(process)
                messages.seek(0)
                said = name.said(messages.read(_MESSAGE_BYTES))
                raise unreadable(self._image, said) from error
            if client.size != self.size:
                reason = f"its disk has {client.size} bytes now, and had {self.size}"
                raise unreadable(self._image, reason)
            self._undo = undo.pop_all()
            return client

    def _started(
        self, name: QemuName, listening: socket.socket, messages: int
    ) -> subprocess.Popen[bytes]:
        program = shutil.which(_PROGRAM)
        if program is None:
            raise unreadable(self._image, f"{_PROGRAM}, which reads it, is not installed")
        serve = [*LIMITS_TO_READ, program, "--read-only", name.filename]
        try:
            return subprocess.Popen(
                ["sh", "-c", _AS_SERVICE, "sh", *serve],
                stdin=listening.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=messages,
                pass_fds=name.descriptors,
                # A Ctrl-C on the terminal is for us.
                start_new_session=True,
            )
        except OSError as error:
            raise not_started(self._image, _PROGRAM, error) from error


def _connected_sockets() -> tuple[socket.socket, socket.socket]:
    """A socket that listens, and one that is connected to it, and that nobody else can reach."""
    with tempfile.TemporaryDirectory(prefix="chainmerge-") as directory:
        # Names of sockets are short, those of directories need not be.
        home = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        try:
            address = str(Path("/proc/self/fd") / str(home) / "nbd")
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(address)
            listening.listen(1)
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(_TIMEOUT_SECONDS)
            connection.connect(address)
        finally:
            os.close(home)
    return listening, connection


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
