# SPDX-License-Identifier: Apache-2.0
"""What images say about their disks, cached for later calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.extents import Extents, concatenated_extents
from chainmerge.qcow2.gather import PieceReader
from chainmerge.qcow2.l2_tables import NO_TABLES, KnownTables, TablesRead
from chainmerge.qcow2.mapping import DEFAULT_WINDOW, iter_extents

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.qcow2.image import Qcow2Image

# 29 bytes for each, and as many entries of at most 16: together no more than some 24 MB.
_MOST_EXTENTS: Final = 512 << 10
_MOST_OF_ONE_IMAGE: Final = 64 << 10


class Walk(Protocol):
    """A way to find out what an image says: :func:`chainmerge.qcow2.mapping.iter_extents`."""

    def __call__(
        self, image: Qcow2Image, start: int = 0, end: int | None = None, *, window: int = ...
    ) -> Iterator[Extents]: ...


class MappingMemory:
    """Decodes the tables of an image once, if what they say is little.

    A merge walks through its chain several times, and reading the tables of hundreds of images
    takes most of that. For as long as nobody changes the images' mappings, but those that are
    opened anew.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._room = _MOST_EXTENTS
        self._room_for_entries = _MOST_EXTENTS
        self._known: dict[Qcow2Image, Extents | None] = {}
        self._reader = PieceReader()
        self._tables: dict[Qcow2Image, KnownTables] = {}

    def walk(
        self,
        image: Qcow2Image,
        start: int = 0,
        end: int | None = None,
        *,
        window: int = DEFAULT_WINDOW,
    ) -> Iterator[Extents]:
        """As :func:`chainmerge.qcow2.mapping.iter_extents`, perhaps all in one piece."""
        if image not in self._known:
            self._known[image] = self._remembered(image)
        known = self._known[image]
        if known is None:
            yield from iter_extents(image, start, end, window=window)
            return
        end = known.end if end is None else min(end, known.end)
        if start < end:
            yield known.clipped(start, end)

    def take_tables(self, image: Qcow2Image) -> KnownTables:
        """What is known of the image's L2 tables: all of them, some, or none. They are not kept."""
        # Who asks has walked through the chain, and needs the memory for something else.
        self._reader = PieceReader()
        return self._tables.pop(image, NO_TABLES)

    def _remembered(self, image: Qcow2Image) -> Extents | None:
        """All of it, or None if that is too much, or damaged in parts."""
        noted = TablesRead(min(self._room_for_entries, _MOST_OF_ONE_IMAGE))
        try:
            return self._all_extents(image, noted)
        finally:
            self._tables[image] = known = noted.known()
            self._room_for_entries -= len(known.entries)

    def _all_extents(self, image: Qcow2Image, noted: TablesRead) -> Extents | None:
        parts: list[Extents] = []
        room = min(self._room, _MOST_OF_ONE_IMAGE)
        try:
            for extents in iter_extents(image, reader=self._reader, noted=noted):
                room -= len(extents)
                if room < 0:
                    return None
                parts.append(extents)
        except FormatError:
            # Whether that part of the disk matters is for the one who asks for it.
            return None
        if not parts:
            return None
        whole = concatenated_extents(parts).coalesced()
        self._room -= len(whole)
        return whole
