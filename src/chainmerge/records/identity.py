# SPDX-License-Identifier: Apache-2.0
"""What tells an image from another one that comes to stand under the same name."""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
from pathlib import Path
from typing import ClassVar, Final

import msgspec


class ImageIdentity(msgspec.Struct, frozen=True):
    """What tells one image from another that comes to stand under the same name."""

    path: str
    kind: str
    number: int
    birth: str

    @property
    def key(self) -> tuple[str, int, str]:
        """What is the same for one image, wherever it is mounted."""
        return self.kind, self.number, self.birth


def identify(path: Path) -> ImageIdentity:
    """The identity of the image at *path*, the same as seen from every host.

    Raises OSError where there is nothing.
    """
    status = path.stat()
    if stat.S_ISBLK(status.st_mode):
        birth = _birth_of_device(status.st_rdev)
        number = 0 if birth else status.st_rdev
        return ImageIdentity(str(path.resolve()), "block", number, birth)
    return ImageIdentity(str(path.resolve()), "file", status.st_ino, _birth_time(path))


def _birth_of_device(device: int) -> str:
    """What a device of the same number was not before; empty where nothing tells."""
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    uuid, loop_file = node / "dm" / "uuid", node / "loop" / "backing_file"
    if uuid.exists():
        return uuid.read_text(encoding="ascii").strip()
    if loop_file.exists():
        return f"loop-{hashlib.sha256(loop_file.read_bytes()).hexdigest()}"
    return ""


def same_image(one: ImageIdentity, other: ImageIdentity) -> bool:
    """Whether two identities are of the same image, wherever it is mounted now."""
    return one.key == other.key


class _StatxTimestamp(ctypes.Structure):
    _fields_: ClassVar = [
        ("seconds", ctypes.c_int64),
        ("nanoseconds", ctypes.c_uint32),
        ("reserved", ctypes.c_int32),
    ]


class _Statx(ctypes.Structure):
    # struct statx of statx(2), up to the one field that os.stat does not give.
    _fields_: ClassVar = [
        ("mask", ctypes.c_uint32),
        ("other", ctypes.c_uint8 * 60),
        ("accessed", _StatxTimestamp),
        ("born", _StatxTimestamp),
        ("rest", ctypes.c_uint8 * 160),
    ]


_AT_FDCWD: Final = -100
_STATX_BTIME: Final = 0x800


def _birth_time(path: Path) -> str:
    """Time of birth of a file, as text; empty on file systems that do not keep it."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = _Statx()
    status = libc.statx(
        _AT_FDCWD, os.fsencode(path), 0, ctypes.c_uint(_STATX_BTIME), ctypes.byref(result)
    )
    if status != 0 or not result.mask & _STATX_BTIME:
        return ""
    return f"{result.born.seconds}.{result.born.nanoseconds:09d}"
