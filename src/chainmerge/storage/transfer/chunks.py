# SPDX-License-Identifier: Apache-2.0
"""A buffer's worth of bytes to move: where they come from, and where they go.

A chunk consists of runs, each of them written by one request, that are filled by pieces
from any number of places. A run lies in the buffer so that addresses are aligned where
offsets in the target are. Positions count from the beginning of the buffer, in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from msgspec import Struct, field

from chainmerge.arithmetic.rounding import round_up
from chainmerge.storage.transfer.direct import ALIGNMENT, DirectFile
from chainmerge.storage.transfer.pieces import ByteSource, Produced, produced_by
from chainmerge.storage.transfer.readback import Checksum

# Linux takes up to 1024 buffers in one request (UIO_MAXIOV).
_MOST_VIEWS: Final = 1024


class Run(Struct):
    """Bytes that follow each other in the target."""

    target: int
    position: int
    length: int


class DirectRead(Struct):
    """One request past the page cache, into one or more places (position, length)."""

    file: DirectFile
    offset: int
    length: int
    places: list[tuple[int, int]]

    def fill(self, buffer: memoryview) -> None:
        """Read into the buffer."""
        views = [buffer[position : position + length] for position, length in self.places]
        self.file.read_into(views, self.offset)


class PlainRead(Struct, frozen=True):
    """What has no alignment, or is no file."""

    source: ByteSource
    offset: int
    length: int
    position: int

    def fill(self, buffer: memoryview) -> None:
        """Read into the buffer."""
        data = self.source.read(self.offset, self.length)
        buffer[self.position : self.position + self.length] = data


class Making(Struct, frozen=True):
    """What has to be made."""

    item: Produced
    position: int

    def fill(self, buffer: memoryview) -> None:
        """Make it, into the buffer."""
        buffer[self.position : self.position + self.item.length] = produced_by(self.item)


class Zeros(Struct, frozen=True):
    """Nothing."""

    position: int
    length: int

    def fill(self, buffer: memoryview) -> None:
        """Overwrite what an earlier chunk left in the buffer."""
        buffer[self.position : self.position + self.length] = bytes(self.length)


ChecksumsOf: TypeAlias = Callable[[int, memoryview], Sequence[Checksum]]
Fill: TypeAlias = DirectRead | PlainRead | Making | Zeros


class Moved(Struct, frozen=True):
    """What happened to a chunk.

    Attributes:
        length: Bytes that it had.
        checksums: Of its runs, where they are wanted.
        edges: Offset and content of what is not aligned at the ends of runs, and is not
            written yet.
    """

    length: int
    checksums: Sequence[Checksum]
    edges: Sequence[tuple[int, bytes]]


class Chunk(Struct):
    """See the module.

    Attributes:
        capacity: Bytes of the buffer that it should not outgrow.
        used: Bytes of the buffer that it needs.
        length: Bytes that it moves.
    """

    capacity: int
    used: int = 0
    length: int = 0
    _runs: list[Run] = field(default_factory=list)
    _fills: list[Fill] = field(default_factory=list)

    def room_at(self, target: int) -> int:
        """How many bytes that go to *target* it can still take."""
        return self.capacity - self._position_for(target)

    def place(self, target: int, length: int) -> int:
        """Take up bytes, to be filled in from the position that is returned."""
        position = self._position_for(target)
        if self._continues_at(target):
            self._runs[-1].length += length
        else:
            self._runs.append(Run(target, position, length))
        self.used = position + length
        self.length += length
        return position

    def fill(self, piece: PlainRead | Making | Zeros) -> None:
        """Add where a place gets its bytes from."""
        self._fills.append(piece)

    def read_direct(self, file: DirectFile, offset: int, position: int, length: int) -> None:
        """Add that a place is read past the page cache; everything is aligned."""
        last = self._fills[-1] if self._fills else None
        if (
            isinstance(last, DirectRead)
            and last.file is file
            and last.offset + last.length == offset
            and len(last.places) < _MOST_VIEWS
        ):
            last.length += length
            start, so_far = last.places[-1]
            if start + so_far == position:
                last.places[-1] = (start, so_far + length)
            else:
                last.places.append((position, length))
        else:
            self._fills.append(DirectRead(file, offset, length, [(position, length)]))

    def move(self, buffer: memoryview, target: DirectFile, checksums_of: ChecksumsOf) -> Moved:
        """Fill the buffer and write what is aligned in the target.

        Raises:
            ReadFailed, WriteFailed, NoSpaceLeft: the storage reported an error.
        """
        for fill in self._fills:
            fill.fill(buffer)
        checksums: list[Checksum] = []
        edges: list[tuple[int, bytes]] = []
        for run in self._runs:
            view = buffer[run.position : run.position + run.length]
            checksums += checksums_of(run.target, view)
            start, end = inner_range(run.target, run.length, target.alignment)
            head, tail = start - run.target, end - run.target
            target.write(view[head:tail], start)
            if head:
                edges.append((run.target, bytes(view[:head])))
            if tail < run.length:
                edges.append((end, bytes(view[tail:])))
        return Moved(self.length, checksums, edges)

    def _continues_at(self, target: int) -> bool:
        return bool(self._runs) and self._runs[-1].target + self._runs[-1].length == target

    def _position_for(self, target: int) -> int:
        if self._continues_at(target):
            return self.used
        return round_up(self.used, ALIGNMENT) + target % ALIGNMENT


def inner_range(offset: int, length: int, alignment: int) -> tuple[int, int]:
    """Start and end of the aligned part of a range; both its end if it has no such part."""
    end = offset + length
    start, stop = round_up(offset, alignment), end // alignment * alignment
    return (start, stop) if start < stop else (end, end)
