# SPDX-License-Identifier: Apache-2.0
"""The L2 tables of an image: which there are, and what has been read of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import BoolArray, I64Array, U64Array
from chainmerge.arithmetic.distinct import distinct

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

BigEndian: TypeAlias = "npt.NDArray[np.unsignedinteger[Any]]"

_UNIQUE_AT_ONCE = 1 << 20


class L2Group(Struct, frozen=True):
    """Different L2 tables that are referred to equally often."""

    offsets: U64Array
    references: int
    """From all L1 tables."""
    active: int
    """From the active L1 table."""


class KnownTables(Struct, frozen=True):
    """What has been read of some L2 tables: their entries that are not zero."""

    offsets: U64Array
    """Of the tables in the file, ascending."""
    count: I64Array
    """Of each table's entries."""
    entries: U64Array
    """Or their first halves where L2 entries are extended, table by table."""
    subclusters: U64Array | None
    """Their second halves; None where L2 entries are not extended."""

    def among(self, offsets: U64Array) -> BoolArray:
        """Which of *offsets*, ascending, are those of tables that are known."""
        place = np.searchsorted(self.offsets, offsets)
        known: BoolArray = place < len(self.offsets)
        known[known] = self.offsets[place[known]] == offsets[known]
        return known

    def entries_of(self, offsets: U64Array) -> tuple[U64Array, U64Array | None]:
        """The entries of tables that are known, and their subclusters."""
        chosen = np.zeros(len(self.offsets), np.bool_)
        chosen[np.searchsorted(self.offsets, offsets)] = True
        if chosen.all():
            return self.entries, self.subclusters
        of_chosen = np.repeat(chosen, self.count)
        subclusters = None if self.subclusters is None else self.subclusters[of_chosen]
        return self.entries[of_chosen], subclusters


NO_TABLES: Final = KnownTables(
    np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.uint64), None
)


class TablesRead:
    """Collects what is read of the L2 tables of an image, as long as that is little."""

    def __init__(self, room: int) -> None:
        """Keep at most *room* entries."""
        self.room = room
        self._parts: list[KnownTables] = []

    def note(
        self,
        offsets: U64Array,
        entries: BigEndian,
        subclusters: BigEndian | None,
        in_use: BoolArray,
    ) -> None:
        """Take note of equally large tables.

        Args:
            offsets: of the tables in the file.
            entries: what stands in them, one table after another, or the first halves of that.
            subclusters: the second halves.
            in_use: which of the entries are not zero.
        """
        self.room -= int(np.count_nonzero(in_use))
        if self.room < 0:
            self._parts.clear()
            return
        found = np.flatnonzero(in_use)
        edges = np.arange(len(offsets) + 1) * (len(in_use) // len(offsets))
        count = np.diff(np.searchsorted(found, edges))
        second = None if subclusters is None else subclusters[found].astype(np.uint64)
        self._parts.append(KnownTables(offsets, count, entries[found].astype(np.uint64), second))

    def known(self) -> KnownTables:
        """All of it; nothing where it was too much."""
        if self.room < 0 or not self._parts:
            return NO_TABLES
        offsets = np.concatenate([part.offsets for part in self._parts])
        count = np.concatenate([part.count for part in self._parts])
        order = np.argsort(offsets)
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        by_table = np.argsort(np.repeat(rank, count), kind="stable")
        entries = np.concatenate([part.entries for part in self._parts])[by_table]
        halves = [part.subclusters for part in self._parts if part.subclusters is not None]
        subclusters = np.concatenate(halves)[by_table] if halves else None
        return KnownTables(offsets[order], count[order], entries, subclusters)


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
