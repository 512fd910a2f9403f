# SPDX-License-Identifier: Apache-2.0
"""Real block devices and real file systems of an exact size, for as long as a test needs them."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.qemu import ToolFailed, run

if TYPE_CHECKING:
    from collections.abc import Iterator

# Others set devices up at the same time and can be faster than losetup between its finding a
# free device and its taking it.
_ATTEMPTS: Final = 50

# linux/sched.h
_CLONE_NEWNS: Final = 0x00020000


@contextmanager
def loop_device(backing: Path, size: int, *options: str, sector_size: int = 512) -> Iterator[Path]:
    """A loop device of *size* bytes over the file *backing*, which is made sparse and so large.

    The kernel detaches the device when its last user is gone, the test process included, so it
    is cleaned up even if that is killed. *options* go to ``losetup``.
    """
    if size % sector_size:
        raise ValueError(f"{size} bytes are not whole sectors of {sector_size}")
    with backing.open("ab"):
        os.truncate(backing, size)
    device = _attach(backing, "--sector-size", str(sector_size), *options)
    keeper = -1
    try:
        keeper = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        # While it is open, this only says "when the last one closes it".
        run("losetup", "--detach", device)
    try:
        yield device
    finally:
        os.close(keeper)


@contextmanager
def mounted_file_system(
    directory: Path, kind: str, size: int, *options: str, losetup: tuple[str, ...] = ()
) -> Iterator[Path]:
    """A new file system (``xfs``, ``btrfs``, ``ext4``, ...) on a loop device of *size* bytes.

    *directory* is where its backing file and its mount point are made; *options* go to its mkfs,
    *losetup* to the command of that name.
    """
    mount_point = directory / f"{kind}-mounted"
    mount_point.mkdir()
    with loop_device(directory / f"{kind}-backing", size, *losetup) as device:
        run(f"mkfs.{kind}", "-q", *options, device)
        with mounted("-t", kind, device, mount_point):
            yield mount_point


@contextmanager
def mounted_tmpfs(directory: Path, size: int) -> Iterator[Path]:
    """An empty file system in memory that holds *size* bytes and not one more."""
    mount_point = directory / "tmpfs-mounted"
    mount_point.mkdir()
    with mounted("-t", "tmpfs", "-o", f"size={size}", "none", mount_point):
        yield mount_point


@contextmanager
def mounted_ramfs(directory: Path) -> Iterator[Path]:
    """A file system in memory that has no fallocate: neither reserving space nor holes."""
    mount_point = directory / "ramfs-mounted"
    mount_point.mkdir()
    with mounted("-t", "ramfs", "none", mount_point):
        yield mount_point


@contextmanager
def device_that_loses_writes(directory: Path, size: int, kept: int) -> Iterator[Path]:
    """A block device of *size* bytes that takes every write and can store only *kept* of them.

    Writes go to the page cache, as on any device; it is the flush that fails, with EIO.
    """
    with (
        mounted_tmpfs(directory, kept) as storage,
        loop_device(storage / "backing", size) as device,
    ):
        yield device


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[None]:
    """Mount as the arguments of ``mount`` say, the last one being where."""
    mount_point = arguments[-1]
    _make_mounts_private()
    run("mount", *arguments)
    try:
        yield
    finally:
        run("umount", mount_point)


def settled_free_bytes(mount_point: Path) -> int:
    """The free bytes of a mounted file system, once nothing of it is on its way.

    XFS gives the space of removed files back later, in the background; only a remount waits for
    that.
    """
    run("mount", "-o", "remount,ro", mount_point)
    run("mount", "-o", "remount,rw", mount_point)
    status = os.statvfs(mount_point)
    return status.f_bfree * status.f_frsize


@cache
def _make_mounts_private() -> None:
    """From now on only this process and its children see what is mounted.

    So the kernel unmounts it when they are gone, even if they are killed.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    run("mount", "--make-rprivate", "/")


def _attach(backing: Path, *options: str) -> Path:
    for _ in range(_ATTEMPTS):
        try:
            return Path(run("losetup", "--find", "--show", *options, backing).stdout.strip())
        except ToolFailed as error:
            last = error
    raise last
