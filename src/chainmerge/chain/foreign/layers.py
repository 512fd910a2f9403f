# SPDX-License-Identifier: Apache-2.0
"""An image that only QEMU reads as a layer of a chain; it is the lowest one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.chain.foreign.content import ForeignContent
from chainmerge.qcow2.extents import Extents, Kind
from chainmerge.qcow2.header import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator


class ForeignLayer(Struct, frozen=True):
    """A foreign image of which everything is taken for data, so that QEMU need not be asked."""

    source: ForeignContent

    @property
    def name(self) -> str:
        """What messages call the image."""
        return self.source.name

    @property
    def virtual_size(self) -> int:
        """Bytes of the guest's disk."""
        return self.source.size

    @property
    def cluster_size(self) -> int:
        """Nothing is known of its clusters."""
        return SECTOR

    def iter_extents(self, start: int, end: int, window: int) -> Iterator[Extents]:
        """One extent of data; *window* is not used."""
        del window
        end = min(end, self.virtual_size)
        if start < end:
            yield _extents([(start, end, False)])

    def read_data(self, host: int, length: int) -> bytes:
        """Have QEMU read: host offsets are those of the guest.

        Raises what :meth:`ForeignContent.read` raises.
        """
        return self.source.read(host, length)

    def read_compressed(self, host: int, csize: int) -> bytes:
        """QEMU unpacks whatever is compressed."""
        raise AssertionError(f"{self.name}: nothing is seen to be compressed ({host}, {csize})")


class MappedForeignLayer(ForeignLayer, frozen=True):
    """A foreign image whose data moves: QEMU tells what of it is zeros."""

    def iter_extents(self, start: int, end: int, window: int) -> Iterator[Extents]:
        """DATA and ZERO extents; *window* is not used, as QEMU tells no more than so much."""
        del window
        yield from map(_extents, self.source.zeroes(start, min(end, self.virtual_size)))


def _extents(runs: list[tuple[int, int, bool]]) -> Extents:
    start = np.array([run[0] for run in runs], np.uint64)
    end = np.array([run[1] for run in runs], np.uint64)
    zero = np.array([run[2] for run in runs], np.bool_)
    kind = np.where(zero, np.uint8(Kind.ZERO), np.uint8(Kind.DATA))
    host = np.where(zero, np.uint64(0), start)
    return Extents(start, end - start, kind, host, np.zeros(len(runs), np.uint32))
