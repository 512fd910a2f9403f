# SPDX-License-Identifier: Apache-2.0
"""Reading and writing past the page cache, and memory that the kernel can do that with.

Offsets and lengths are in bytes.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.rounding import round_up
from chainmerge.storage import block
from chainmerge.storage.errors import ReadFailed, WriteFailed, reason_of
from chainmerge.storage.files import open_clear_of_streams, write_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.storage.locks import AnyFile

# No file system or device that QEMU can use asks for more.
ALIGNMENT: Final = 4096

# The kernel's limit for a file offset (loff_t).
_MAX_OFFSET: Final = (1 << 63) - 1


def aligned_buffer(length: int) -> memoryview:
    """Memory of at least *length* bytes, zeros, that begins at a multiple of :data:`ALIGNMENT`.

    Raises:
        MemoryError: there is not as much.
    """
    try:
        return memoryview(mmap.mmap(-1, round_up(max(length, 1), ALIGNMENT)))
    except OSError as error:
        raise MemoryError from error


class DirectFile:
    """A second descriptor of an open file, past the page cache if the file system can do that.

    If it cannot, the file's own descriptor is used, and the kernel asked to forget what went
    through its cache. Any number of threads may read and write.

    Attributes:
        file: The file; not closed by this object.
        alignment: What offsets, lengths and addresses must be multiples of.
    """

    def __init__(self, file: AnyFile, access: int) -> None:
        """Open it.

        Args:
            file: The file or device.
            access: ``os.O_RDONLY`` or ``os.O_RDWR``.
        """
        self.file = file
        self.alignment = block.logical_sector_size(file.fd) if file.is_block_device else ALIGNMENT
        self._fd = -1
        # The same file, even if another has its name by now.
        with contextlib.suppress(OSError):
            self._fd = open_clear_of_streams(
                f"/proc/self/fd/{file.fd}", access | os.O_DIRECT | os.O_CLOEXEC | os.O_NOCTTY
            )
        self._is_direct = self._fd >= 0

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is left out."""
        return self._is_direct

    def aligns(self, offset: int, address: int) -> bool:
        """Whether a request can begin here; *address* counts from an aligned one."""
        return (
            offset % self.alignment == 0
            and address % self.alignment == 0
            and offset < _MAX_OFFSET - (1 << 32)
        )

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill *views*, one after the other; what lies past the file's end is zeros.

        Args:
            views: Aligned in address and length.
            offset: Where to begin; aligned.

        Raises:
            ReadFailed: the storage reported an error.
        """
        start = offset
        rest = list(views)
        while rest:
            fd = self._descriptor_for(offset)
            try:
                count = os.preadv(fd, rest, offset)
            except OSError as error:
                if self._is_refusal(fd, error):
                    continue
                length = sum(map(len, rest))
                raise ReadFailed(self.file.name, offset, length, reason_of(error)) from error
            if count == 0:
                for view in rest:
                    view[:] = bytes(len(view))
                break
            offset += count
            rest = _behind(rest, count)
        self._forget_cached(start, offset - start)

    def read_back(self, buffer: memoryview, offset: int, length: int) -> memoryview:
        """The bytes that the storage has in a range of any alignment, as a part of *buffer*.

        Without direct I/O they can come from the page cache where that cannot be dropped.

        Args:
            buffer: Aligned, with room for :data:`ALIGNMENT` bytes more than *length*, twice.
            offset: Where the range begins.
            length: Of the range.

        Raises:
            ReadFailed: the storage reported an error.
        """
        start = offset // self.alignment * self.alignment
        end = round_up(offset + length, self.alignment)
        self._forget_cached(start, end - start)
        self.read_into([buffer[: end - start]], start)
        return buffer[offset - start :][:length]

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of *view*; its address and length, and *offset*, are aligned.

        Raises:
            NoSpaceLeft, WriteFailed: the storage reported an error.
        """
        start = offset
        while view:
            fd = self._descriptor_for(offset)
            try:
                count = os.pwritev(fd, [view], offset)
            except OSError as error:
                if self._is_refusal(fd, error):
                    continue
                raise write_error(self.file.name, offset, len(view), error) from error
            if count == 0:
                raise WriteFailed(self.file.name, offset, len(view), "nothing was written")
            offset += count
            view = view[count:]
        self._forget_cached(start, offset - start)

    def close(self) -> None:
        """Close the second descriptor. May be called more than once."""
        fd, self._fd, self._is_direct = self._fd, -1, False
        if fd >= 0:
            os.close(fd)

    def _descriptor_for(self, offset: int) -> int:
        # Behind a request that ended early (at the end of the file) nothing is aligned.
        if self._is_direct and offset % self.alignment == 0:
            return self._fd
        return self.file.fd

    def _is_refusal(self, fd: int, error: OSError) -> bool:
        """Whether it was direct I/O that was refused; from now on it is not tried again."""
        if error.errno != errno.EINVAL or fd != self._fd:
            return False
        self._is_direct = False
        return True

    def _forget_cached(self, offset: int, length: int) -> None:
        if not self._is_direct and length:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.file.fd, offset, length, os.POSIX_FADV_DONTNEED)


def _behind(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of *views* after *count* bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []
