# SPDX-License-Identifier: Apache-2.0
"""Reading many equally large pieces of a file in few requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.arithmetic.arrays import U64Array
    from chainmerge.qcow2.readable import Readable


def read_pieces(readable: Readable, offsets: U64Array, size: int) -> bytes:
    """The *size* bytes at each of *offsets* (file offsets in bytes), one after another.

    Neighbours that follow each other in the file are read together, so the caller bounds
    both the memory and the largest request by the number of offsets.
    """
    return b"".join(
        readable.read(start, count * size) for start, count in _contiguous(offsets, size)
    )


@runtime_checkable
class ReadsAhead(Protocol):
    """A readable that can be told what is going to be read."""

    def read_ahead(self, offset: int, length: int) -> None:
        """Begin to read *length* bytes from *offset*, without waiting for them."""


def read_ahead(readable: Readable, offsets: U64Array, size: int) -> None:
    """Have the *size* bytes at each of *offsets* read at the same time, if that is possible.

    Those who read small pieces here and there one after the other wait for each of them.
    """
    if isinstance(readable, ReadsAhead):
        for start, count in _contiguous(offsets, size):
            readable.read_ahead(start, count * size)


@runtime_checkable
class ReadsInto(Protocol):
    """A readable that can put what it reads where it is told."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As :meth:`Readable.read`, as many bytes as *buffer* has."""


class PieceReader:
    """Reads pieces of files into one buffer, again and again.

    To take fresh memory for each of many reads costs several times as much as the reading.
    """

    def __init__(self) -> None:
        """Begin without a buffer."""
        self._buffer = bytearray()

    def read(self, readable: Readable, offsets: U64Array, sizes: U64Array) -> memoryview:
        """The pieces of these *sizes* at *offsets*, in bytes, one after another.

        Valid until the next call, and only to be read. The caller bounds the sum of sizes.
        """
        total = int(sizes.sum())
        if len(self._buffer) < total:
            self._buffer = bytearray(total)
        view = memoryview(self._buffer)[:total]
        follows = offsets[1:] == offsets[:-1] + sizes[:-1]
        heads = np.concatenate([[0], np.flatnonzero(~follows) + 1])
        into = readable.read_into if isinstance(readable, ReadsInto) else _copying(readable)
        done = 0
        for offset, length in zip(
            offsets[heads].tolist(), np.add.reduceat(sizes, heads).tolist(), strict=True
        ):
            into(offset, view[done : done + length])
            done += length
        return view.toreadonly()


def _copying(readable: Readable) -> Callable[[int, memoryview], None]:
    def read_into(offset: int, buffer: memoryview) -> None:
        buffer[:] = readable.read(offset, len(buffer))

    return read_into


def _contiguous(offsets: U64Array, size: int) -> Iterator[tuple[int, int]]:
    """Runs of pieces that follow each other, as (file offset, number of pieces)."""
    if not len(offsets):
        return
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + np.uint64(size)) + 1
    heads = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((heads, [len(offsets)])))
    yield from zip(offsets[heads].tolist(), lengths.tolist(), strict=True)
