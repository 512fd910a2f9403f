# SPDX-License-Identifier: Apache-2.0
"""Reading many equally large pieces of a file in few requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def _contiguous(offsets: U64Array, size: int) -> Iterator[tuple[int, int]]:
    """Runs of pieces that follow each other, as (file offset, number of pieces)."""
    if not len(offsets):
        return
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + np.uint64(size)) + 1
    heads = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((heads, [len(offsets)])))
    yield from zip(offsets[heads].tolist(), lengths.tolist(), strict=True)
