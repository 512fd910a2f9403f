# SPDX-License-Identifier: Apache-2.0
"""The order of writes: steps, each made durable before the next one begins.

=========  ===========================================================================
FILL       new clusters, and header bytes that the old header does not use
COUNT      refcounts of new clusters, 0 to 1, in the refcount blocks there are
LINK       new refcount blocks into the refcount table (left out without any)
DISTRUST   COPIED flags that are not true any more are cleared (repairs only)
SWITCH     the first 512 bytes of the image: old until here, new from here
TRUST      COPIED flags that are true now are set (repairs only)
RELEASE    refcounts of what only the old metadata used, 1 to 0
=========  ===========================================================================

Before SWITCH nothing that the old header leads to is changed, apart from refcounts that
rise: whatever subset of the writes of the running step a crash leaves, the image is the
old one with leaked clusters. After it, the image is the new one with leaked clusters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from chainmerge.engines.metadata.errors import (
    NotEnoughSpace,
    ReleaseFailed,
    RewriteFailed,
    SwitchUnknown,
)
from chainmerge.engines.metadata.refcount_blocks import Write
from chainmerge.errors import ChainmergeError, Failed
from chainmerge.qcow2.readable import Readable
from chainmerge.storage.errors import NoSpaceLeft, WriteFailed

if TYPE_CHECKING:
    from chainmerge.storage.file_space import ByteRanges


class Port(Readable, Protocol):
    """What an image is rewritten through; :class:`chainmerge.storage.files.WritablePort`."""

    @property
    def is_block_device(self) -> bool:
        """Whether the size is what it is; a regular file grows with what is written."""

    def reserve(self, offset: int, length: int) -> None:
        """Reserve space of a regular file, so that writes there cannot run out of it."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of *data*; behind the end of a regular file, extend it."""

    def truncate_to(self, size: int) -> None:
        """Make a regular file *size* bytes large; new bytes are zeros."""

    def punch(self, offset: int, length: int) -> None:
        """Give the space of a range of a regular file back; it reads as zeros afterwards."""

    def flush(self) -> None:
        """Make every write so far durable, the file's size included."""

    def forget_cached(self) -> None:
        """Have what was flushed read from the storage again."""


class StepName(StrEnum):
    """The steps, in their order."""

    FILL = "fill"
    COUNT = "count"
    LINK = "link"
    DISTRUST = "distrust"
    SWITCH = "switch"
    TRUST = "trust"
    RELEASE = "release"


class Step(Struct, frozen=True):
    """Writes that may reach the disk in any order, or torn, and the flush that follows them.

    Attributes:
        name: Which step.
        writes: The writes; made when the step is reached, from what is on disk by then.
    """

    name: StepName
    writes: Callable[[], Iterable[Write]]


def reserve(port: Port, required_size: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Make sure that writes to *ranges* (offset, length in bytes) cannot run out of space.

    Where a file system cannot reserve space, a write may still find it full, but only
    before the switch.

    Raises:
        NotEnoughSpace: there is less than *required_size* on a device, or no room for
            the ranges on a file system.
    """
    if port.is_block_device:
        if required_size > port.size:
            raise NotEnoughSpace(port.name, required_size - port.size)
        return
    missing = sum(length for _, length in ranges)
    for offset, length in ranges:
        try:
            port.reserve(offset, length)
        except NoSpaceLeft as error:
            raise NotEnoughSpace(port.name, missing) from error
        except WriteFailed:
            return
        missing -= length


def reserve_holes(port: Port, holes: ByteRanges) -> None:
    """Make sure that writes to *holes* of a regular file cannot run out of space.

    As :func:`reserve`, and where there is no room they are holes again.

    Raises:
        NotEnoughSpace: there is no room; the file is what it was.
    """
    ranges = list(holes.pairs())
    try:
        reserve(port, port.size, ranges)
    except NotEnoughSpace:
        with contextlib.suppress(ChainmergeError):
            for offset, length in ranges:
                port.punch(offset, length)
        raise


def write_steps(port: Port, steps: Sequence[Step]) -> int:
    """Run the steps; returns how many bytes were written.

    Raises:
        RewriteFailed: a step before the switch failed; the image is the old one.
        SwitchUnknown: the switch failed; the image is the old one or the new one.
        ReleaseFailed: a step after the switch failed; the image is the new one.
    """
    written = 0
    switched = False
    for step in steps:
        try:
            for offset, data in step.writes():
                port.write(offset, data)
                written += len(data)
            port.flush()
            if step.name is StepName.SWITCH:
                require_stored(port, step.writes())
        except (OSError, Failed) as error:
            reason = str(getattr(error, "reason", error))
            raise _failure(port.name, step.name, reason, switched=switched) from error
        switched = switched or step.name is StepName.SWITCH
    return written


def require_stored(port: Port, writes: Iterable[Write]) -> None:
    """Make sure that what was written and flushed is what the storage has.

    For the switch, after which things are destroyed that only the old image needs: storage can
    lose a write and say that it is done.

    Raises:
        WriteFailed: it has something else.
        ReadFailed: it cannot be read.
    """
    port.forget_cached()
    for offset, data in writes:
        if port.read(offset, len(data)) != data:
            raise WriteFailed(port.name, offset, len(data), "the storage does not have it")


def _failure(image: str, step: StepName, reason: str, *, switched: bool) -> ChainmergeError:
    if switched:
        return ReleaseFailed(image, reason)
    if step is StepName.SWITCH:
        return SwitchUnknown(image, reason)
    return RewriteFailed(image, step, reason)
