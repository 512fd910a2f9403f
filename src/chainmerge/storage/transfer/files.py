# SPDX-License-Identifier: Apache-2.0
"""Moving bytes from files into a file or block device as fast as the storage allows.

For each stretch the first of these that works:

1. The file system lets the target share the source's blocks (see
   :func:`chainmerge.storage.transfer.offload.clone_range`).
2. The server that both files are on copies by itself.
3. Zeros: the file system or the device makes a range read as zeros.
4. Several chunks at a time are read and written past the page cache.

What is not aligned at the ends of a chunk goes through the page cache, but only while no
chunk is being written: the kernel does not keep the two apart well enough, on block devices
least of all (a page that is dirty next to a direct write becomes an I/O error of the next
flush).
"""

from __future__ import annotations

import errno
import os
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Self

from chainmerge.storage import allocation, block
from chainmerge.storage.errors import ReadBackDiffers
from chainmerge.storage.files import write_error
from chainmerge.storage.locks import AnyFile
from chainmerge.storage.transfer import offload
from chainmerge.storage.transfer.chunks import Chunk, Making, Moved, PlainRead, Zeros, inner_range
from chainmerge.storage.transfer.direct import ALIGNMENT, DirectFile
from chainmerge.storage.transfer.pacing import Pacing
from chainmerge.storage.transfer.pieces import (
    Produced,
    ReadBack,
    Stretch,
    ZeroedSpace,
    joined_items,
)
from chainmerge.storage.transfer.readback import Checksum, Ledger, checksum_of
from chainmerge.storage.transfer.workers import Depth, Workers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chainmerge.storage.files import WritablePort
    from chainmerge.storage.transfer.pieces import ByteSource, IsToStop, Item, OnBytes

# Larger chunks, fewer at a time, are no faster on one stretch and slower on scattered clusters:
# each chunk reads and writes its pieces one after the other.
CHUNK: Final = 1 << 20
_FEWEST_CHUNKS: Final = 4
_MOST_CHUNKS: Final = 16

# A stretch is not cut into smaller parts than this to fill a chunk up.
_SMALLEST_PART: Final = 64 << 10
# With a bandwidth, a chunk takes this part of a second, so that the flow is even.
_CHUNKS_PER_SECOND: Final = 8
# One request to the file system is no larger than this; Ctrl-C gets through between two.
_CLONE_BYTES: Final = 1 << 30
_ZERO_FILE_BYTES: Final = 1 << 30
_ZERO_DEVICE_BYTES: Final = 64 << 20
_SERVER_COPY_BYTES: Final = 64 << 20
# Fewer zeros than this are written: asking for them stops all other writes for a moment.
_FEWEST_ZEROS: Final = 256 << 10
_MOST_EDGES: Final = 1024

_ZERO_IN_FILE: Final = MappingProxyType(
    {
        ZeroedSpace.KEPT: allocation.zero_range,
        ZeroedSpace.GIVEN_BACK: allocation.punch_hole,
    }
)
_NO_SUCH_FUNCTION: Final = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)


class FileTransfer:
    """A :class:`~chainmerge.storage.transfer.pieces.Transfer`; sources stay open until closed."""

    def __init__(
        self,
        port: WritablePort,
        *,
        on_progress: OnBytes,
        should_stop: IsToStop,
        bandwidth: int | None,
        read_back: ReadBack,
        zeroed: ZeroedSpace,
    ) -> None:
        """Prepare to write to *port*; see :func:`.copying.transfer_into`."""
        self._port = port
        self._on_progress = on_progress
        self._pacing = Pacing(should_stop, bandwidth)
        self._chunk_bytes = CHUNK
        if bandwidth is not None:
            wanted = bandwidth // _CHUNKS_PER_SECOND // ALIGNMENT * ALIGNMENT
            self._chunk_bytes = max(_SMALLEST_PART, min(CHUNK, wanted))
        self._target = DirectFile(port, os.O_RDWR)
        self._sources: dict[int, DirectFile] = {}
        self._workers = Workers(Depth(_FEWEST_CHUNKS, _MOST_CHUNKS), self._chunk_bytes)
        self._chunk = Chunk(self._chunk_bytes)
        self._edges: list[tuple[int, bytes]] = []
        self._read_back = read_back
        self._ledger = Ledger(read_back)
        self._copied_by_server: list[Stretch] = []
        self._cannot_share: set[tuple[int, int]] = set()
        self._cannot_copy_on_server: set[tuple[int, int]] = set()
        self._can_zero = True
        self._zeroed = zeroed
        self._bytes_done = 0

    def move(self, items: Iterable[Item]) -> None:
        """See :class:`chainmerge.storage.transfer.pieces.Transfer`."""
        self._port.refuse_after_failed_flush()
        self._edges.clear()
        self._chunk = Chunk(self._chunk_bytes)
        try:
            with self._workers.at_work():
                for item in joined_items(items):
                    if isinstance(item, Produced):
                        self._add_produced(item)
                    elif item.source is None:
                        self._zero(item.target, item.length)
                    else:
                        self._add_stretch(item)
                self._send_chunk()
            self._write_edges()
        finally:
            self._port.refresh_size()

    @property
    def bytes_to_read_back(self) -> int:
        """See :class:`chainmerge.storage.transfer.pieces.Transfer`."""
        by_server = sum(item.length for item in self._copied_by_server)
        return self._ledger.total_bytes + by_server

    def verify(self, on_progress: OnBytes | None = None) -> None:
        """See :class:`chainmerge.storage.transfer.pieces.Transfer`."""
        self._port.refuse_after_failed_flush()
        compared = 0

        def done(length: int) -> None:
            nonlocal compared
            compared += length
            if on_progress is not None:
                on_progress(compared)

        with self._workers.at_work():
            batch: list[list[Checksum]] = []
            batch_bytes = 0
            for run in self._ledger.runs(self._chunk_bytes):
                length = sum(checksum.length for checksum in run)
                if batch_bytes + length > self._chunk_bytes and batch:
                    self._send_comparison(batch, done)
                    batch, batch_bytes = [], 0
                batch.append(run)
                batch_bytes += length
            if batch:
                self._send_comparison(batch, done)
            for part in self._parts_copied_by_server():
                self._pacing.wait_for_turn(2 * part.length)
                self._workers.submit(partial(self._compare_with_source, part), part.length, done)

    def close(self) -> None:
        """See :class:`chainmerge.storage.transfer.pieces.Transfer`."""
        self._workers.close()
        for file in (self._target, *self._sources.values()):
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_produced(self, item: Produced) -> None:
        if self._chunk.length and self._chunk.room_at(item.target) < item.length:
            self._send_chunk()
        position = self._chunk.place(item.target, item.length)
        self._chunk.fill(Making(item, position))

    def _add_stretch(self, item: Stretch) -> None:
        source, done = item.source, 0
        assert source is not None
        if isinstance(source, AnyFile):
            done = self._share(item, source) or self._copy_on_server(item, source)
        for start, position, length in self._places(item.target + done, item.length - done):
            offset = item.offset + start - item.target
            self._read_into_chunk(source, offset, position, length)

    def _read_into_chunk(self, source: ByteSource, offset: int, position: int, length: int) -> None:
        start = end = offset + length
        if isinstance(source, AnyFile):
            file = self._direct(source)
            start, end = inner_range(offset, length, file.alignment)
            if start < end and file.aligns(start, position + start - offset):
                self._plain_read(source, offset, position, start - offset)
                self._chunk.read_direct(file, start, position + start - offset, end - start)
                self._plain_read(source, end, position + end - offset, offset + length - end)
                return
        self._plain_read(source, offset, position, length)

    def _plain_read(self, source: ByteSource, offset: int, position: int, length: int) -> None:
        if length:
            self._chunk.fill(PlainRead(source, offset, length, position))

    def _places(self, target: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Parts of a range of the target: where, its position in the chunk, and its length.

        The chunk is another one for each part.
        """
        end = target + length
        while target < end:
            part = min(end - target, self._chunk.room_at(target))
            if target + part < end:
                part -= (target + part) % ALIGNMENT
                if part < _SMALLEST_PART and self._chunk.length:
                    self._send_chunk()
                    continue
            yield target, self._chunk.place(target, part), part
            target += part

    def _send_chunk(self) -> None:
        chunk, self._chunk = self._chunk, Chunk(self._chunk_bytes)
        if not chunk.length:
            return
        if len(self._edges) > _MOST_EDGES:
            self._workers.drain()
            self._write_edges()
        self._pacing.wait_for_turn(chunk.length)
        move = partial(chunk.move, target=self._target, checksums_of=self._ledger.checksums_of)
        self._workers.submit(move, chunk.used, self._account_for)

    def _account_for(self, moved: Moved) -> None:
        for checksum in moved.checksums:
            self._ledger.record(checksum)
        self._edges += moved.edges
        self._report(moved.length)

    def _write_edges(self) -> None:
        for offset, data in self._edges:
            self._port.write(offset, data)
        self._edges.clear()

    def _report(self, length: int) -> None:
        self._bytes_done += length
        self._on_progress(self._bytes_done)

    def _direct(self, source: AnyFile) -> DirectFile:
        file = self._sources.get(id(source))
        if file is None:
            file = self._sources[id(source)] = DirectFile(source, os.O_RDONLY)
        return file

    def _zero(self, target: int, length: int) -> None:
        start, end = target, target
        if self._can_zero and length >= _FEWEST_ZEROS:
            start, stop = inner_range(target, length, self._target.alignment)
            end = self._zeroed_up_to(start, stop)
            self._write_zeros(target, start - target)
        self._write_zeros(end, target + length - end)

    def _write_zeros(self, target: int, length: int) -> None:
        for _, position, part in self._places(target, length):
            self._chunk.fill(Zeros(position, part))

    def _zeroed_up_to(self, start: int, stop: int) -> int:
        """Have the storage make a range zeros; returns how far it came."""
        is_device = self._port.is_block_device
        zero = block.zero_out if is_device else _ZERO_IN_FILE[self._zeroed]
        most = _ZERO_DEVICE_BYTES if is_device else _ZERO_FILE_BYTES
        while start < stop:
            length = min(stop - start, most)
            # A device that cannot do it by itself is written to by the kernel.
            self._pacing.wait_for_turn(length if is_device else 0)
            try:
                zero(self._port.fd, start, length)
            except OSError as error:
                if error.errno not in _NO_SUCH_FUNCTION:
                    raise write_error(self._port.name, start, length, error) from error
                self._can_zero = False
                break
            self._ledger.record_zeros(start, length, self._chunk_bytes)
            self._report(length)
            start += length
        return start

    def _share(self, item: Stretch, source: AnyFile) -> int:
        """Share the source's blocks; returns for how many bytes, from the beginning."""
        if source.identity in self._cannot_share or not offload.may_reflink(source, self._port):
            return 0
        done = 0
        try:
            unit = offload.block_size(self._port)
            if item.target % unit or item.offset % unit:
                return 0
            # Nothing can be shared beyond the end that the source has now.
            there = os.fstat(source.fd).st_size - item.offset
            whole = min(item.length, there) // unit * unit
            while done < whole:
                self._pacing.wait_for_turn(0)
                part = min(whole - done, _CLONE_BYTES)
                offset, target = item.offset + done, item.target + done
                offload.clone_range(source, offset, self._port, target, part)
                self._report(part)
                done += part
        except OSError:
            # Whatever the reason, a copy does; if the storage has a fault, copying shows it.
            self._cannot_share.add(source.identity)
        return done

    def _copy_on_server(self, item: Stretch, source: AnyFile) -> int:
        """Have the server copy; returns how many bytes, from the beginning."""
        if source.identity in self._cannot_copy_on_server:
            return 0
        if not offload.server_copies(source, self._port):
            self._cannot_copy_on_server.add(source.identity)
            return 0
        done = 0
        try:
            while done < item.length:
                part = min(item.length - done, _SERVER_COPY_BYTES)
                self._pacing.wait_for_turn(part)
                offset, target = item.offset + done, item.target + done
                count = os.copy_file_range(source.fd, self._port.fd, part, offset, target)
                if count == 0:
                    break
                if self._read_back is ReadBack.COMPARED:
                    self._copied_by_server.append(Stretch(target, count, source, offset))
                self._report(count)
                done += count
        except OSError:
            self._cannot_copy_on_server.add(source.identity)
        return done

    def _send_comparison(self, batch: Sequence[Sequence[Checksum]], done: OnBytes) -> None:
        length = sum(checksum.length for run in batch for checksum in run)
        longest = max(run[-1].target + run[-1].length - run[0].target for run in batch)
        self._pacing.wait_for_turn(length)
        self._workers.submit(partial(self._compare, tuple(batch)), longest, done)

    def _compare(self, batch: Sequence[Sequence[Checksum]], buffer: memoryview) -> int:
        compared = 0
        for run in batch:
            start, last = run[0].target, run[-1]
            view = self._target.read_back(buffer, start, last.target + last.length - start)
            for target, length, value in run:
                if checksum_of(view[target - start :][:length]) != value:
                    raise ReadBackDiffers(self._port.name, target, length)
                compared += length
        return compared

    def _parts_copied_by_server(self) -> Iterator[Stretch]:
        for item in self._copied_by_server:
            for done in range(0, item.length, self._chunk_bytes):
                length = min(self._chunk_bytes, item.length - done)
                yield Stretch(item.target + done, length, item.source, item.offset + done)

    def _compare_with_source(self, part: Stretch, buffer: memoryview) -> int:
        assert part.source is not None
        expected = checksum_of(part.source.read(part.offset, part.length))
        if checksum_of(self._target.read_back(buffer, part.target, part.length)) != expected:
            raise ReadBackDiffers(self._port.name, part.target, part.length)
        return part.length
