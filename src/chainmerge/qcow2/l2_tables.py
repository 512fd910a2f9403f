# SPDX-License-Identifier: Apache-2.0
"""The L2 tables of an image, read in groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import I64Array, U64Array
from chainmerge.arithmetic.distinct import distinct

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNIQUE_AT_ONCE = 1 << 20


class L2Group(Struct, frozen=True):
    """Different L2 tables that are referred to equally often."""

    offsets: U64Array
    references: int
    """From all L1 tables."""
    active: int
    """From the active L1 table."""


class L2Tables:
    """The L2 tables of all L1 tables, each one once."""

    def __init__(self) -> None:
        self._active: U64Array = np.empty(0, np.uint64)
        self._offsets: U64Array = np.empty(0, np.uint64)
        self._references: I64Array = np.empty(0, np.int64)
        self._pending: list[U64Array] = []
        self._pending_count = 0

    def add_active(self, offsets: U64Array) -> None:
        """Add the L2 tables of the active L1 table."""
        # QEMU judges no COPIED flags in what an entry without an offset leads to.
        self._active = np.sort(offsets[offsets != 0])
        self.add(offsets)

    def add(self, offsets: U64Array) -> None:
        """Add the L2 tables of some L1 table."""
        self._pending.append(offsets)
        self._pending_count += len(offsets)
        if self._pending_count > _UNIQUE_AT_ONCE:
            self._digest()

    def groups(self) -> Iterator[L2Group]:
        """The tables by how often they are referred to, each group in the order of the file."""
        self._digest()
        first = np.searchsorted(self._active, self._offsets, "left")
        active = np.searchsorted(self._active, self._offsets, "right") - first
        # Both numbers in one: an L1 table has at most 2^22 entries, and there are at most 2^16.
        kinds = (self._references << 23) + active
        for kind in distinct(kinds).tolist():
            yield L2Group(self._offsets[kinds == kind], kind >> 23, kind & (1 << 23) - 1)

    def _digest(self) -> None:
        if not self._pending:
            return
        offsets = np.concatenate([self._offsets, *self._pending])
        ones = np.ones(self._pending_count, np.int64)
        weights = np.concatenate([self._references, ones])
        self._offsets = distinct(offsets)
        self._references = np.zeros(len(self._offsets), np.int64)
        np.add.at(self._references, np.searchsorted(self._offsets, offsets), weights)
        self._pending, self._pending_count = [], 0
