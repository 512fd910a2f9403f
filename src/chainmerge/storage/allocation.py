# SPDX-License-Identifier: Apache-2.0
"""Space of regular files: reserving it beyond the file's end, and giving it back.

Every function takes the file descriptor of a regular file; offsets, lengths and sizes are in
bytes. OSError passes through.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

STAT_BLOCK: Final = 512
"""The unit of ``st_blocks``."""

# linux/falloc.h
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10

# linux/fiemap.h
_FS_IOC_FIEMAP: Final = 0xC020660B
_FIEMAP_EXTENT_LAST: Final = 0x0001
UNWRITTEN: Final = 0x0800
"""Of an extent: reserved, and reads as zeros."""
SHARED: Final = 0x2000
"""Of an extent: another file shares it."""
_FIEMAP_REQUEST: Final = struct.Struct("=QQIIII")  # start, length, flags, mapped, count, reserved
_FIEMAP_EXTENT: Final = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_FIEMAP_BATCH: Final = 1024
_END_OF_RANGE: Final = (1 << 64) - 1

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def reserve(fd: int, offset: int, length: int) -> None:
    """Make sure that writes into a range cannot run out of space. The file keeps its size.

    Space that is there already is left as it is, so this can be repeated. OSError EOPNOTSUPP
    means that the file system has no such function. On ENOSPC some of the range may have been
    reserved; :func:`release_beyond_end` gives it back.
    """
    _fallocate(fd, _KEEP_SIZE, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the space of a range back; it reads as zeros afterwards. The file keeps its size."""
    _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make a range read as zeros without writing them, and have space reserved for it.

    As a write does, this makes the file larger if the range reaches beyond its end. OSError
    EOPNOTSUPP means that the file system has no such function.
    """
    _fallocate(fd, _ZERO_RANGE, offset, length)


def reserved_beyond_end(fd: int) -> int:
    """Bytes allocated behind the file's end.

    Where the file system does not tell, what the file has more than its size would need: less
    than the truth for a sparse file.
    """
    status = os.fstat(fd)
    size = status.st_size
    try:
        return sum(end - max(start, size) for start, end, _ in allocated_extents(fd, size))
    except OSError:
        return max(status.st_blocks * STAT_BLOCK - size, 0)


def allocated_extents(fd: int, position: int = 0) -> Iterator[tuple[int, int, int]]:
    """Start, end and flags of what a file has space for behind *position*, ascending.

    OSError means that the file system does not tell.
    """
    while True:
        extents = _allocated_extents(fd, position)
        ahead = [extent for extent in extents if extent[1] > position]
        if not ahead:
            return
        yield from ahead
        position = ahead[-1][1]
        if extents[-1][2] & _FIEMAP_EXTENT_LAST:
            return


def release_beyond_end(fd: int) -> None:
    """Give back what is allocated behind the file's end."""
    # A truncation to the present size does that on ext4, XFS, Btrfs and tmpfs (Linux 6.18).
    os.ftruncate(fd, os.fstat(fd).st_size)


def _allocated_extents(fd: int, start: int) -> list[tuple[int, int, int]]:
    """Start, end and flags of the first extents that reach beyond *start*."""
    request = bytearray(_FIEMAP_REQUEST.size + _FIEMAP_BATCH * _FIEMAP_EXTENT.size)
    length = _END_OF_RANGE - start
    _FIEMAP_REQUEST.pack_into(request, 0, start, length, 0, 0, _FIEMAP_BATCH, 0)
    fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
    mapped = _FIEMAP_REQUEST.unpack_from(request)[3]
    records = memoryview(request)[_FIEMAP_REQUEST.size :][: mapped * _FIEMAP_EXTENT.size]
    return [
        (logical, logical + size, flags)
        for logical, _, size, flags in _FIEMAP_EXTENT.iter_unpack(records)
    ]


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if length == 0:
        return
    while _LIBC.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
