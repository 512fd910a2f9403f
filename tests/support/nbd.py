# SPDX-License-Identifier: Apache-2.0
"""A client of the NBD protocol, just enough to read and write as a guest would.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: fixed newstyle negotiation,
NBD_OPT_EXPORT_NAME, simple replies.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _WRITE_ZEROES = 0, 1, 2, 3, 4, 6


class NbdError(AssertionError):
    """The server answered a request with an error: the guest has seen one."""


class NbdClient:
    """A connection to one export; a context manager."""

    def __init__(self, path: Path, export: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        # Names of sockets are short, those of directories for tests are not.
        directory = os.open(path.parent, os.O_PATH)
        try:
            self._socket.connect(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
        self._handle = 0
        magic, option_magic, _flags = struct.unpack(">8s8sH", self._receive(18))
        assert (magic, option_magic) == (b"NBDMAGIC", b"IHAVEOPT")
        # Fixed newstyle, and no zeroes behind the answer.
        self._socket.sendall(struct.pack(">I", 3))
        name = export.encode()
        self._socket.sendall(struct.pack(">8sII", b"IHAVEOPT", 1, len(name)) + name)
        self.size, self.flags = struct.unpack(">QH", self._receive(10))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye, if anybody listens still."""
        try:
            self._request(_DISCONNECT, 0, 0, b"")
        except OSError:
            pass
        finally:
            self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        """Read, at most 32 MiB."""
        self._request(_READ, offset, length, b"")
        self._reply()
        return self._receive(length)

    def write(self, offset: int, data: bytes) -> None:
        """Write, and return when the server has taken it."""
        self._request(_WRITE, offset, len(data), data)
        self._reply()

    def write_zeroes(self, offset: int, length: int) -> None:
        """Write zeros; the server may make a hole."""
        self._request(_WRITE_ZEROES, offset, length, b"")
        self._reply()

    def flush(self) -> None:
        """Make what was written durable."""
        self._request(_FLUSH, 0, 0, b"")
        self._reply()

    def _request(self, kind: int, offset: int, length: int, data: bytes) -> None:
        self._handle += 1
        header = struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, kind, self._handle, offset, length)
        self._socket.sendall(header + data)

    def _reply(self) -> None:
        magic, error, handle = struct.unpack(">IIQ", self._receive(16))
        assert (magic, handle) == (_REPLY_MAGIC, self._handle)
        if error:
            raise NbdError(f"the guest sees error {error}")

    def _receive(self, length: int) -> bytes:
        parts = []
        while length:
            part = self._socket.recv(min(length, 1 << 20))
            if not part:
                raise ConnectionResetError("the server went away")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)
