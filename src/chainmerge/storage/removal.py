# SPDX-License-Identifier: Apache-2.0
"""Whether names can be removed from a directory, or added to it, found without trying.

The rules are those of the kernel's ``may_delete`` and ``may_create`` (fs/namei.c of Linux 6.1).
A file system can still refuse for reasons of its own.
"""

from __future__ import annotations

import array
import fcntl
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from chainmerge.storage.files import StrPath

# linux/fs.h. The kernel reads and writes an int there, whatever the number says.
_FS_IOC_GETFLAGS: Final = 0x80086601
_IMMUTABLE: Final = 0x10
_APPEND_ONLY: Final = 0x20
_CAP_FOWNER: Final = 3
_UNCHANGEABLE: Final = {
    _IMMUTABLE: "immutable (chattr +i)",
    _APPEND_ONLY: "append-only (chattr +a)",
}


def creation_obstacle(directory: StrPath) -> str | None:
    """Why no file can be made in *directory*, in words; None if nothing is known of."""
    if os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        return None
    try:
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            return f"the file system of {os.fspath(directory)} is mounted read-only"
    except OSError as error:
        return f"{os.fspath(directory)}: {error.strerror}"
    flag = _unchangeable(directory)
    if flag is not None:
        return f"the directory {os.fspath(directory)} is {flag}"
    return f"there is no permission to change the directory {os.fspath(directory)}"


def removal_obstacle(path: StrPath) -> str | None:
    """Why a name cannot be removed or replaced, in words; None if nothing is known of.

    A symbolic link counts itself, not what it leads to. A name that is not there any more needs
    no removal.
    """
    name = os.fspath(path)
    directory = os.path.dirname(name) or "."  # noqa: PTH120
    try:
        status, parent = os.lstat(name), os.stat(directory)  # noqa: PTH116
    except OSError:
        return None
    obstacle = creation_obstacle(directory)
    if obstacle is not None:
        return obstacle
    flag = _unchangeable(directory)
    if flag is not None:
        return f"the directory {directory} is {flag}"
    if not stat.S_ISLNK(status.st_mode):
        flag = _unchangeable(name)
        if flag is not None:
            return f"it is {flag}"
        if mount_of(name) != mount_of(directory):
            return "something is mounted there"
    if parent.st_mode & stat.S_ISVTX and not _may_remove_from_sticky(status, parent):
        return f"the directory {directory} is sticky, and neither it nor the file belongs to us"
    return None


def mount_of(path: StrPath) -> int | None:
    """The number of the mount that a path leads to; None if nobody can tell.

    The kernel renames within one mount only, also where two are of the same file system.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key == "mnt_id":
                return int(value)
    except OSError:
        return None
    finally:
        os.close(fd)
    return None


def _may_remove_from_sticky(file: os.stat_result, directory: os.stat_result) -> bool:
    return os.geteuid() in (file.st_uid, directory.st_uid) or _has_capability(_CAP_FOWNER)


def _has_capability(number: int) -> bool:
    """Whether this process has a capability in effect."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return os.geteuid() == 0
    return bool(int(line.partition(":")[2], 16) >> number & 1)


def _unchangeable(path: StrPath) -> str | None:
    """Which flag keeps a file or directory as it is; None for none, or where there are no flags."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        flags = array.array("l", [0])
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
    except OSError:
        return None
    finally:
        os.close(fd)
    return next((words for flag, words in _UNCHANGEABLE.items() if flags[0] & flag), None)
