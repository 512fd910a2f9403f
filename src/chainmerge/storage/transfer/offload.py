# SPDX-License-Identifier: Apache-2.0
"""Copies that the file system makes by itself: sharing blocks, and copying on the server.

Offsets and lengths are in bytes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from chainmerge.storage.locks import AnyFile

# linux/fs.h: struct file_clone_range has source descriptor and offset, length, target offset
_FICLONERANGE: Final = 0x4020940D
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_NOCOW_FL: Final = 0x00800000

# xfs_fs.h: struct xfs_fsop_geom has 256 bytes, and flags at 92
_XFS_IOC_FSGEOMETRY: Final = 0x8100587E
_XFS_GEOMETRY_BYTES: Final = 256
_XFS_GEOMETRY_FLAGS_AT: Final = 92
_XFS_FSOP_GEOM_FLAGS_REFLINK: Final = 1 << 20

# linux/magic.h and the file systems' own headers
_XFS: Final = 0x58465342
_BTRFS: Final = 0x9123683E
_BCACHEFS: Final = 0xCA451A4E
_ZFS: Final = 0x2FC12FC1
_NFS: Final = 0x6969

# struct statfs is smaller than this everywhere; its first member, a long, is the type.
_STATFS_BYTES: Final = 256

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def file_system_type(fd: int) -> int:
    """The magic number of the file system that a file is on. Raises OSError."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _LIBC.fstatfs(fd, buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    # The type is 32 bits wide, in a long that may have been filled from a negative number.
    return int(ctypes.c_long.from_buffer(buffer).value) & 0xFFFFFFFF


def copies_on_write(fd: int) -> bool:
    """Whether the file system gives a new place to what is written over old content.

    Raises OSError.
    """
    magic = file_system_type(fd)
    if magic == _BTRFS:
        return not _is_nocow(fd)
    return magic in (_BCACHEFS, _ZFS)


def can_reflink(source: AnyFile, target: AnyFile) -> bool:
    """Whether the target can be expected to share the source's blocks instead of copying them.

    True only for two regular files on one XFS that was made with reflinks, on one Btrfs
    subvolume with the same "no copy on write" attribute, or on one bcachefs. A transfer tries
    it on any file system, so it can share blocks although this says False: what has to be
    certain, such as space to reserve, can rely on True only. Even then it is what the file
    system *can* do; it makes a copy of what is not whole blocks at both ends.
    """
    if not may_reflink(source, target):
        return False
    try:
        match file_system_type(target.fd):
            case magic if magic == _XFS:
                return bool(_xfs_geometry_flags(target.fd) & _XFS_FSOP_GEOM_FLAGS_REFLINK)
            case magic if magic == _BTRFS:
                return _is_nocow(source.fd) == _is_nocow(target.fd)
            case magic:
                return magic == _BCACHEFS
    except OSError:
        return False


def may_reflink(source: AnyFile, target: AnyFile) -> bool:
    """Whether trying :func:`clone_range` makes sense."""
    return (
        not source.is_block_device
        and not target.is_block_device
        and source.identity[0] == target.identity[0]
    )


def clone_range(
    source: AnyFile, source_offset: int, target: AnyFile, offset: int, length: int
) -> None:
    """Make a range of the target share the blocks of the source. Raises OSError.

    Args:
        source: A regular file.
        source_offset: In the source; as *offset* and *length* a multiple of its block size.
        target: A regular file that is open for writing, on the same file system.
        offset: In the target.
        length: Not beyond the end of the source; not 0.
    """
    request = struct.pack("=qQQQ", source.fd, source_offset, length, offset)
    fcntl.ioctl(target.fd, _FICLONERANGE, request)


def block_size(file: AnyFile) -> int:
    """What ranges that are cloned have to be multiples of. Raises OSError."""
    return os.fstatvfs(file.fd).f_bsize


def server_copies(source: AnyFile, target: AnyFile) -> bool:
    """Whether the two are on a server that can copy between them without our reading.

    On all other file systems the kernel would copy through the page cache, which is slower
    than doing it by ourselves.
    """
    try:
        return may_reflink(source, target) and file_system_type(target.fd) == _NFS
    except OSError:
        return False


def _xfs_geometry_flags(fd: int) -> int:
    answer = fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY, bytes(_XFS_GEOMETRY_BYTES))
    return int(struct.unpack_from("=I", answer, _XFS_GEOMETRY_FLAGS_AT)[0])


def _is_nocow(fd: int) -> bool:
    try:
        # Declared with a long, but the kernel stores an int.
        answer = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(ctypes.sizeof(ctypes.c_long)))
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
            return False
        raise
    return bool(struct.unpack_from("=i", answer)[0] & _FS_NOCOW_FL)
