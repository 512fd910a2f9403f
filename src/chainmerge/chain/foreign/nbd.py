# SPDX-License-Identifier: Apache-2.0
"""A client of an NBD server: reads, and asks what is zeros.

As https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md describes it: fixed
newstyle negotiation, structured replies, the meta context ``base:allocation``.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

_GREETING: Final = struct.Struct(">8s8sH")
_OPTION: Final = struct.Struct(">8sII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_REQUEST: Final = struct.Struct(">IHHQQI")
_CHUNK: Final = struct.Struct(">IHHQI")
_OFFSET: Final = struct.Struct(">Q")
_HOLE: Final = struct.Struct(">QI")
_EXPORT_INFO: Final = struct.Struct(">HQH")
_NUMBER: Final = struct.Struct(">I")
_EXTENT: Final = struct.Struct(">II")

_MAGIC: Final = b"NBDMAGIC"
_OPTION_MAGIC: Final = b"IHAVEOPT"
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_REQUEST_MAGIC: Final = 0x25609513
_CHUNK_MAGIC: Final = 0x668E33EF

_FIXED_NEWSTYLE_NO_ZEROES: Final = 3
_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT = 1, 3, 4
_INFO_EXPORT: Final = 0
_READ, _BLOCK_STATUS = 0, 7
_DONE: Final = 1
_CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS = 0, 1, 2, 5
_CHUNK_ERRORS: Final = 1 << 15
_STATE_ZERO: Final = 2

_CONTEXT: Final = b"base:allocation"
_MOST_IN_REPLY: Final = 64 << 20
"""No server of ours answers with more than it was asked for, or than it may list of extents."""
_MOST_ASKED_FOR: Final = 1 << 31


class NbdFailed(Exception):
    """The server has refused a request, is gone, or does not keep to the protocol."""


class NbdClient:
    """A connection to the only export of a server.

    Attributes:
        size: bytes of the export.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Negotiate over a socket that is connected, and that the caller closes.

        Raises:
            NbdFailed
        """
        self._socket = connection
        self._cookie = 0
        magic, option_magic, _ = _GREETING.unpack(self._receive(_GREETING.size))
        if (magic, option_magic) != (_MAGIC, _OPTION_MAGIC):
            raise NbdFailed("the server does not speak NBD")
        self._send(_NUMBER.pack(_FIXED_NEWSTYLE_NO_ZEROES))
        list(self._option(_OPT_STRUCTURED_REPLY, b""))
        name = _NUMBER.pack(0)
        query = name + _NUMBER.pack(1) + _NUMBER.pack(len(_CONTEXT)) + _CONTEXT
        told = dict(self._option(_OPT_SET_META_CONTEXT, query))
        if _REP_META_CONTEXT not in told:
            raise NbdFailed("the server does not tell what is allocated")
        self.size = self._go(name + b"\0\0")

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly *length* bytes within the export.

        Raises:
            NbdFailed
        """
        data = bytearray(length)
        came = 0
        for kind, payload in self._request(_READ, offset, length):
            if kind == _CHUNK_DATA and len(payload) >= _OFFSET.size:
                (at,) = _OFFSET.unpack_from(payload)
                count = len(payload) - _OFFSET.size
                _require_inside(at - offset, count, length)
                data[at - offset : at - offset + count] = payload[_OFFSET.size :]
            elif kind == _CHUNK_HOLE and len(payload) == _HOLE.size:
                at, count = _HOLE.unpack(payload)
                _require_inside(at - offset, count, length)
            else:
                raise NbdFailed(f"the server sends a chunk of type {kind}")
            came += count
        if came != length:
            raise NbdFailed(f"the server sends {came} of {length} bytes")
        return bytes(data)

    def zeroes(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """How long each run from *offset* on is, and whether it reads as zeros.

        Covers at least a byte and at most *length* bytes.

        Raises:
            NbdFailed
        """
        length = min(length, _MOST_ASKED_FOR)
        runs: list[tuple[int, bool]] = []
        for kind, payload in self._request(_BLOCK_STATUS, offset, length):
            if kind != _CHUNK_STATUS or (len(payload) - _NUMBER.size) % _EXTENT.size:
                raise NbdFailed(f"the server sends a chunk of type {kind}")
            for count, flags in _EXTENT.iter_unpack(payload[_NUMBER.size :]):
                # The last one may reach further than was asked for.
                inside = min(count, length)
                if not inside:
                    break
                runs.append((inside, bool(flags & _STATE_ZERO)))
                length -= inside
        if not runs:
            raise NbdFailed("the server does not tell what is allocated")
        return runs

    def _go(self, question: bytes) -> int:
        size = None
        for kind, payload in self._option(_OPT_GO, question):
            if kind == _REP_INFO and len(payload) == _EXPORT_INFO.size:
                which, told, _ = _EXPORT_INFO.unpack(payload)
                size = told if which == _INFO_EXPORT else size
        if size is None:
            raise NbdFailed("the server does not tell the size of its export")
        return int(size)

    def _option(self, option: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Ask for an option; yields the replies before the one that agrees to it."""
        self._send(_OPTION.pack(_OPTION_MAGIC, option, len(data)) + data)
        while True:
            magic, about, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
            if (magic, about) != (_OPTION_REPLY_MAGIC, option):
                raise NbdFailed("the server does not keep to the protocol")
            payload = self._receive(length)
            if kind == _REP_ACK:
                return
            if kind not in {_REP_INFO, _REP_META_CONTEXT}:
                raise NbdFailed(f"the server refuses option {option}")
            yield kind, payload

    def _request(self, command: int, offset: int, length: int) -> Iterator[tuple[int, bytes]]:
        """Send a request; yields type and content of each chunk of the answer."""
        self._cookie += 1
        self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, offset, length))
        done = 0
        while not done & _DONE:
            magic, done, kind, cookie, size = _CHUNK.unpack(self._receive(_CHUNK.size))
            if (magic, cookie) != (_CHUNK_MAGIC, self._cookie):
                raise NbdFailed("the server does not keep to the protocol")
            payload = self._receive(size)
            if kind & _CHUNK_ERRORS:
                raise NbdFailed(_reason_in(payload))
            if kind != _CHUNK_NONE:
                yield kind, payload

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise NbdFailed(f"the server is gone: {error}") from error

    def _receive(self, length: int) -> bytes:
        if length > _MOST_IN_REPLY:
            raise NbdFailed(f"the server sends {length} bytes at once")
        data = bytearray(length)
        rest = memoryview(data)
        while rest:
            try:
                count = self._socket.recv_into(rest)
            except OSError as error:
                raise NbdFailed(f"the server is gone: {error}") from error
            if not count:
                raise NbdFailed("the server is gone")
            rest = rest[count:]
        return bytes(data)


def _require_inside(at: int, count: int, length: int) -> None:
    if not 0 <= at <= at + count <= length:
        raise NbdFailed("the server sends bytes that nobody has asked for")


def _reason_in(payload: bytes) -> str:
    """What a chunk says of an error: its number, the length of a text, the text."""
    if len(payload) < _NUMBER.size:
        return "the server reports an error"
    (number,) = _NUMBER.unpack_from(payload)
    text = payload[_NUMBER.size + 2 :].decode(errors="replace")
    return text or f"the server reports error {number}"
