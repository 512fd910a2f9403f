# SPDX-License-Identifier: Apache-2.0
"""Whether a file or block device can be written to by anybody, found out without opening it so.

What depends on who writes (permissions, security labels) is not looked at.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from chainmerge.storage.block import is_read_only

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# linux/fs.h; file systems without such flags do not know the call.
_FS_IOC_GETFLAGS: Final = 0x80086601
_KEPT_FLAGS: Final[Mapping[int, str]] = MappingProxyType(
    {0x10: "it is immutable (chattr +i)", 0x20: "it can only be appended to (chattr +a)"}
)


def why_nobody_can_write(path: Path) -> str | None:
    """Why not even root can write to *path*; None if nothing is known that speaks against it.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if stat.S_ISBLK(os.fstat(descriptor).st_mode):
            return "the device is read-only" if is_read_only(descriptor) else None
        if os.fstatvfs(descriptor).f_flag & os.ST_RDONLY:
            return "its file system is mounted read-only"
        return _flag_of(descriptor)
    finally:
        os.close(descriptor)


def _flag_of(descriptor: int) -> str | None:
    # The kernel writes an int, whatever the macro's type says.
    try:
        answer = fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, bytes(8))
    except OSError:
        return None
    (flags,) = struct.unpack_from("=I", answer)
    return next((why for flag, why in _KEPT_FLAGS.items() if flags & flag), None)
