# SPDX-License-Identifier: Apache-2.0
"""Moving bytes from several sources into one target: what to use, and the plain way.

Offsets and lengths are in bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from chainmerge.storage.errors import ReadBackDiffers
from chainmerge.storage.files import WritablePort
from chainmerge.storage.transfer.files import FileTransfer
from chainmerge.storage.transfer.offload import can_reflink
from chainmerge.storage.transfer.pacing import Pacing
from chainmerge.storage.transfer.pieces import (
    ByteSource,
    Produced,
    ReadBack,
    Stretch,
    Transfer,
    TransferPort,
    ZeroedSpace,
    joined_items,
    produced_by,
)
from chainmerge.storage.transfer.readback import Ledger, checksum_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chainmerge.storage.transfer.pieces import IsToStop, Item, OnBytes

__all__ = [
    "ByteSource",
    "FileTransfer",
    "PortTransfer",
    "Produced",
    "ReadBack",
    "Stretch",
    "Transfer",
    "TransferPort",
    "ZeroedSpace",
    "can_reflink",
    "transfer_into",
]

_LARGEST_WRITE: Final = 1 << 20


def transfer_into(
    port: TransferPort,
    *,
    on_progress: OnBytes,
    should_stop: IsToStop,
    bandwidth: int | None,
    read_back: ReadBack,
    zeroed: ZeroedSpace = ZeroedSpace.KEPT,
) -> Transfer:
    """The best way to move bytes into a target.

    Args:
        port: The target. A regular file need not have the space or the size, but writing
            beyond its end is slower than into what was reserved and extended before.
        on_progress: Called in the thread that moves, with how many bytes were moved so far.
        should_stop: Asked in the same thread, before every piece of at most a few MiB.
        bandwidth: Bytes per second that are copied, or read back, at most; None for no limit.
            What needs no copying does not count.
        read_back: What :meth:`Transfer.verify` is to do.
        zeroed: What becomes of a regular file's space where long runs of zeros go.
    """
    if isinstance(port, WritablePort):
        return FileTransfer(
            port,
            on_progress=on_progress,
            should_stop=should_stop,
            bandwidth=bandwidth,
            read_back=read_back,
            zeroed=zeroed,
        )
    return PortTransfer(
        port,
        on_progress=on_progress,
        should_stop=should_stop,
        bandwidth=bandwidth,
        read_back=read_back,
    )


class PortTransfer:
    """See :class:`Transfer`: one write after the other, in the order of the items."""

    def __init__(
        self,
        port: TransferPort,
        *,
        on_progress: OnBytes,
        should_stop: IsToStop,
        bandwidth: int | None,
        read_back: ReadBack,
    ) -> None:
        """Prepare to write to *port*; see :func:`transfer_into`."""
        self._port = port
        self._on_progress = on_progress
        self._pacing = Pacing(should_stop, bandwidth)
        self._ledger = Ledger(read_back)
        self._bytes_done = 0

    def move(self, items: Iterable[Item]) -> None:
        """See :class:`Transfer`."""
        start, pending = 0, bytearray()
        for target, data in self._contents(items):
            if target != start + len(pending) or len(pending) + len(data) > _LARGEST_WRITE:
                self._write(start, bytes(pending))
                start, pending = target, bytearray()
            pending += data
        self._write(start, bytes(pending))

    @property
    def bytes_to_read_back(self) -> int:
        """See :class:`Transfer`."""
        return self._ledger.total_bytes

    def verify(self, on_progress: OnBytes | None = None) -> None:
        """See :class:`Transfer`."""
        compared = 0
        for target, length, value in self._ledger.in_target_order():
            self._pacing.wait_for_turn(length)
            if checksum_of(self._port.read(target, length)) != value:
                raise ReadBackDiffers(self._port.name, target, length)
            compared += length
            if on_progress is not None:
                on_progress(compared)

    def close(self) -> None:
        """See :class:`Transfer`; there is nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _contents(self, items: Iterable[Item]) -> Iterator[tuple[int, bytes]]:
        """Offset in the target and content of pieces that one write can hold."""
        for item in joined_items(items):
            made = produced_by(item) if isinstance(item, Produced) else b""
            for done in range(0, item.length, _LARGEST_WRITE):
                length = min(_LARGEST_WRITE, item.length - done)
                if isinstance(item, Produced):
                    data = made[done : done + length]
                elif item.source is None:
                    data = bytes(length)
                else:
                    data = item.source.read(item.offset + done, length)
                yield item.target + done, data

    def _write(self, target: int, data: bytes) -> None:
        if not data:
            return
        self._pacing.wait_for_turn(len(data))
        self._port.write(target, data)
        for checksum in self._ledger.checksums_of(target, data):
            self._ledger.record(checksum)
        self._bytes_done += len(data)
        self._on_progress(self._bytes_done)
