# SPDX-License-Identifier: Apache-2.0
"""Block devices: what the kernel tells about them, discarding, and writing zeros.

Every function takes the file descriptor of an open block device and raises OSError.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

from chainmerge.arithmetic.rounding import round_up

# linux/fs.h
_BLKROGET: Final = 0x125E
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F

# A discard cannot be interrupted; in pieces of this size Ctrl-C gets through between two.
_DISCARD_BYTES: Final = 1 << 30


def device_size(fd: int) -> int:
    """The device's size in bytes. Moves the descriptor's file offset."""
    return os.lseek(fd, 0, os.SEEK_END)


def logical_sector_size(fd: int) -> int:
    """The smallest unit that the device can address, in bytes."""
    return int(struct.unpack("=i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def is_read_only(fd: int) -> bool:
    """Whether the device is set read-only.

    Linux lets such a device be opened for writing anyway, and fails the writes.
    """
    return bool(struct.unpack("=i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0])


def discard(fd: int, offset: int, length: int) -> None:
    """Discard the whole sectors inside a range of bytes. What they read as afterwards is open."""
    sector = logical_sector_size(fd)
    start = round_up(offset, sector)
    end = min(offset + length, device_size(fd)) // sector * sector
    while start < end:
        step = min(end - start, _DISCARD_BYTES)
        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", start, step))
        start += step


def zero_out(fd: int, offset: int, length: int) -> None:
    """Make whole sectors read as zeros; their space stays the device's own.

    The kernel lets the device do it if the device can, and otherwise writes the zeros itself, which
    takes as long as writing data. Offset and length are multiples of the logical sector size.
    """
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))
