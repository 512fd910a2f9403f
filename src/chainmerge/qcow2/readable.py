# SPDX-License-Identifier: Apache-2.0
"""What the format layer reads from: anything with a name, a size and positioned reads."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct


class Readable(Protocol):
    """Random access to the bytes of one file or block device."""

    @property
    def name(self) -> str:
        """What messages call it: the image's path."""

    @property
    def size(self) -> int:
        """Bytes; for a block device those of the device."""

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly *length* bytes; what lies past the end reads as zeros."""


class BytesReadable(Struct, frozen=True):
    """An image held in memory."""

    name: str
    data: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly *length* bytes; what lies past the end reads as zeros."""
        return self.data[offset : offset + length].ljust(length, b"\0")


class Overlaid(Struct, frozen=True):
    """Something readable in which the bytes from *at* on are *instead*."""

    below: Readable
    at: int
    instead: bytes

    @property
    def name(self) -> str:
        """See :class:`Readable`."""
        return self.below.name

    @property
    def size(self) -> int:
        """See :class:`Readable`."""
        return self.below.size

    def read(self, offset: int, length: int) -> bytes:
        """See :class:`Readable`."""
        data = self.below.read(offset, length)
        low, high = max(offset, self.at), min(offset + length, self.at + len(self.instead))
        if low >= high:
            return data
        changed = self.instead[low - self.at : high - self.at]
        return data[: low - offset] + changed + data[high - offset :]
