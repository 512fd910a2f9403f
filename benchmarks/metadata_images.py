# SPDX-License-Identifier: Apache-2.0
"""Images of any size that are metadata alone: every cluster allocated, no data written.

The file is sparse, so an image of 10 TiB takes 1.6 GiB. It is laid out as a guest leaves it
that has written its disk from start to end: every L2 table lies before the data that it
describes. Only the refcount blocks lie together at the front. In a shuffled image, the data
clusters are in another order.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pathlib import Path

_CLUSTER_BITS: Final = 16
_CLUSTER: Final = 1 << _CLUSTER_BITS
_TABLE_ENTRIES: Final = _CLUSTER // 8
_REFCOUNT_ORDER: Final = 4
_BLOCK_ENTRIES: Final = _CLUSTER // 2
_COPIED: Final = 1 << 63
# Version 3, up to and with header_length; QEMU takes what follows for extensions.
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything is, in clusters."""

    data: int
    l2_tables: int
    l1: int
    refcount_table: int
    refcount_blocks: int

    @property
    def l1_start(self) -> int:
        return 1

    @property
    def refcount_table_start(self) -> int:
        return self.l1_start + self.l1

    @property
    def refcount_blocks_start(self) -> int:
        return self.refcount_table_start + self.refcount_table

    @property
    def l2_start(self) -> int:
        return self.refcount_blocks_start + self.refcount_blocks

    @property
    def total(self) -> int:
        return self.l2_start + self.l2_tables + self.data

    def l2_table(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Clusters of L2 tables, each followed by the data of its range."""
        return self.l2_start + index * (1 + _TABLE_ENTRIES)

    def data_cluster(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Clusters of data, with the L2 tables between."""
        return self.l2_start + index + index // _TABLE_ENTRIES + 1


def write_allocated_image(path: Path, disk_size: int, *, shuffled: bool = False) -> int:
    """Write an image in which the guest's whole disk is allocated.

    Returns:
        How many clusters the file has; all are in use, each once.
    """
    layout = _lay_out(disk_size)
    with path.open("xb") as file:
        file.truncate(layout.total * _CLUSTER)
        _write_at(file, 0, _header(layout, disk_size))
        tables = layout.l2_table(np.arange(layout.l2_tables, dtype=np.int64))
        _write_at(file, layout.l1_start, _entries(tables, _COPIED))
        blocks = layout.refcount_blocks_start + np.arange(layout.refcount_blocks, dtype=np.int64)
        _write_at(file, layout.refcount_table_start, _entries(blocks, 0))
        _write_refcounts(file, layout)
        _write_l2_tables(file, layout, shuffled=shuffled)
    return layout.total


def _lay_out(disk_size: int) -> _Layout:
    data = -(-disk_size // _CLUSTER)
    tables = -(-data // _TABLE_ENTRIES)
    layout = _Layout(data, tables, -(-tables // _TABLE_ENTRIES), 1, 1)
    # Refcount blocks count themselves: until their number is enough for what it makes.
    while (blocks := -(-layout.total // _BLOCK_ENTRIES)) > layout.refcount_blocks:
        table = -(-blocks // _TABLE_ENTRIES)
        layout = _Layout(data, tables, layout.l1, table, blocks)
    return layout


def _header(layout: _Layout, disk_size: int) -> bytes:
    return _HEADER.pack(
        b"QFI\xfb",
        3,
        *(0, 0),  # no backing file
        _CLUSTER_BITS,
        disk_size,
        0,  # not encrypted
        layout.l2_tables,
        layout.l1_start * _CLUSTER,
        layout.refcount_table_start * _CLUSTER,
        layout.refcount_table,
        *(0, 0),  # no snapshots
        *(0, 0, 0),  # no features
        _REFCOUNT_ORDER,
        _HEADER.size,
    )


def _write_refcounts(file: BinaryIO, layout: _Layout) -> None:
    """One for every cluster of the file."""
    full = np.ones(_BLOCK_ENTRIES, dtype=">u2").tobytes()
    for number in range(layout.refcount_blocks):
        counted = min(_BLOCK_ENTRIES, layout.total - number * _BLOCK_ENTRIES)
        _write_at(file, layout.refcount_blocks_start + number, full[: 2 * counted])


def _write_l2_tables(file: BinaryIO, layout: _Layout, *, shuffled: bool) -> None:
    # A table at a time: memory is for 8,192 entries, however large the image is.
    stride = _coprime_stride(layout.data)
    generator = np.random.default_rng(layout.data)
    for number in range(layout.l2_tables):
        first = number * _TABLE_ENTRIES
        index = np.arange(first, min(first + _TABLE_ENTRIES, layout.data), dtype=np.int64)
        if shuffled:
            # Two permutations of the whole disk, neither of which has to be in memory:
            # within tables at random, and then across all of them.
            index = generator.permutation(index) * stride % layout.data
        entries = _entries(layout.data_cluster(index), _COPIED)
        _write_at(file, layout.l2_start + number * (1 + _TABLE_ENTRIES), entries)


def _coprime_stride(count: int) -> int:
    """A step that goes around through all of *count* places, far from one to the next."""
    stride = int(count * (math.sqrt(5) - 1) / 2) | 1
    while math.gcd(stride, count) != 1:
        stride += 2
    return stride


def _entries(clusters: npt.NDArray[np.int64], flags: int) -> bytes:
    offsets = clusters.astype(np.uint64) << np.uint64(_CLUSTER_BITS)
    return (offsets | np.uint64(flags)).astype(">u8").tobytes()


def _write_at(file: BinaryIO, cluster: int, data: bytes) -> None:
    file.seek(cluster * _CLUSTER)
    file.write(data)
