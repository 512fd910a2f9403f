# SPDX-License-Identifier: Apache-2.0
"""What a transfer moves, where from and where to; all offsets and lengths are in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Final, Protocol, TypeAlias

from msgspec import Struct

# Joining goes on up to here, so that the first bytes are moved before all items are known.
_MOST_JOINED: Final = 64 << 20


class ByteSource(Protocol):
    """What plain bytes are read from: a file, or anything that reads like one."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly *length* bytes; what lies past the end reads as zeros.

        A transfer into a file calls this in several threads at once, unless the source is a
        :class:`chainmerge.storage.files.FileReadable`, which it reads by itself.
        """


class TransferPort(ByteSource, Protocol):
    """What bytes are moved into."""

    @property
    def size(self) -> int:
        """Bytes that it has now."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of *data*."""


class Stretch(Struct, frozen=True):
    """Plain bytes that go to one place.

    Attributes:
        target: Offset in the target.
        length: How many.
        source: Where they come from; None for zeros.
        offset: Offset in the source; what lies past its end is zeros.
    """

    target: int
    length: int
    source: ByteSource | None
    offset: int


class Produced(Struct, frozen=True):
    """Bytes that have to be made, by decompression for example.

    Attributes:
        target: Offset in the target.
        length: How many.
        produce: Returns exactly so many bytes; called once, perhaps in another thread.
    """

    target: int
    length: int
    produce: Callable[[], bytes]


Item: TypeAlias = Stretch | Produced
OnBytes: TypeAlias = Callable[[int], None]
IsToStop: TypeAlias = Callable[[], bool]


class ReadBack(Enum):
    """How far the storage is believed to have what it was given, once that was flushed.

    It is a choice for the whole of a transfer: what is to be compared later needs checksums
    from the beginning.
    """

    COMPARED = "compared"
    """Everything that was copied is read again and compared."""
    OMITTED = "omitted"
    """A flush without an error is enough."""


class ZeroedSpace(Enum):
    """What happens to the space of a regular file where long runs of zeros go."""

    KEPT = "kept"
    """It is the file's, or becomes so: writing there later cannot run out of it."""
    GIVEN_BACK = "given back"
    """It becomes a hole."""


class Transfer(Protocol):
    """Moves bytes into one target; no byte of the target may be given twice."""

    def move(self, items: Iterable[Item]) -> None:
        """Return when all items are written, which does not make them durable.

        Items are taken one by one as there is capacity for them. After an error an unknown
        part of what was taken is written, and nothing is being written any more.

        Raises:
            ReadFailed, WriteFailed, NoSpaceLeft: the storage reported an error.
            Interrupted: the caller wants to stop.
        """

    @property
    def bytes_to_read_back(self) -> int:
        """How many bytes :meth:`verify` would compare of what has been moved so far."""

    def verify(self, on_progress: OnBytes | None = None) -> None:
        """Read back what was moved and compare it with checksums taken while it was written.

        To be called after the target was flushed: what is read then comes from the storage
        and not from memory, as far as the file system allows. Ranges whose blocks the target
        shares with the source are left out. Does nothing with :attr:`ReadBack.OMITTED`.

        Args:
            on_progress: Called with how many bytes were compared so far.

        Raises:
            ReadBackDiffers: the storage has something else.
            ReadFailed: the storage reported an error.
            Interrupted: the caller wants to stop.
        """

    def close(self) -> None:
        """Release threads, memory and descriptors; sources and target stay open."""


def produced_by(item: Produced) -> bytes:
    """The bytes, of which there are as many as promised."""
    data = item.produce()
    if len(data) != item.length:
        raise ValueError(f"{len(data)} bytes were produced where {item.length} were promised")
    return data


def joined_items(items: Iterable[Item]) -> Iterator[Item]:
    """The same bytes in fewer items: those that continue each other at both ends become one."""
    pending: Stretch | None = None
    for item in items:
        if item.length == 0:
            continue
        if isinstance(item, Stretch) and pending is not None and _continues(pending, item):
            length = pending.length + item.length
            pending = Stretch(pending.target, length, pending.source, pending.offset)
            continue
        if pending is not None:
            yield pending
            pending = None
        if isinstance(item, Stretch):
            pending = item
        else:
            yield item
    if pending is not None:
        yield pending


def _continues(first: Stretch, second: Stretch) -> bool:
    return (
        first.length + second.length <= _MOST_JOINED
        and first.source is second.source
        and first.target + first.length == second.target
        and (first.source is None or first.offset + first.length == second.offset)
    )
