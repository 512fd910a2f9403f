# SPDX-License-Identifier: Apache-2.0
"""What distinguishes an image from another one that later has the same name.

A file system gives the number of a deleted file to the next one that is made. What distinguishes
the two is the birth time, if it is kept (not by ext4 with inodes of 128 bytes, ext3, NFSv3), and
the generation of the inode, which is in the file's handle (name_to_handle_at(2)). A block device
gets another number at every boot. It is known by the device-mapper's UUID, by the WWID that it
reports, or, a loop device, by the file below it.

Where two identities have no evidence in common, nobody knows (:attr:`Sameness.UNKNOWN`). Nothing
may be deleted, or taken for done, on that.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
import struct
from enum import Enum
from functools import cache
from pathlib import Path
from typing import ClassVar, Final

import msgspec

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_SECTOR: Final = 512


class ImageIdentity(msgspec.Struct, frozen=True):
    """What distinguishes one image from another that later has the same name.

    ``kind`` is ``file`` or ``block``. Of a file ``number`` is the inode, ``birth`` the time of
    its birth and ``handle`` its handle, each empty if it is not known or not kept. Of a block
    device ``birth`` is what tells it from all others, and ``number`` is 0; where nothing does,
    ``number`` is the device number, ``handle`` its place in the sequence of all devices that came
    up, and both only count in the same run of the machine, ``boot``.
    """

    path: str
    kind: str
    number: int
    birth: str
    handle: str = ""
    boot: str = ""

    @property
    def key(self) -> tuple[str, int, str]:
        """What no two images on this machine have in common at the same time."""
        return self.kind, self.number, self.birth


class Identities:
    """The identities of images that are locked, each looked at once."""

    def __init__(self) -> None:
        """Nothing is looked at yet."""
        self._known: dict[Path, ImageIdentity] = {}

    def of(self, path: Path) -> ImageIdentity:
        """As :func:`identify`."""
        if path not in self._known:
            self._known[path] = identify(path)
        return self._known[path]


class Sameness(Enum):
    """What two identities say of the images that they were taken of."""

    SAME = "it is the same image"
    OTHER = "it is another one"
    UNKNOWN = "nothing shows whether it is the same"


def identify(path: Path) -> ImageIdentity:
    """The identity of the image at *path*, the same as seen from every host.

    Raises OSError if there is nothing, ValueError where *path* is what no file can be called.
    """
    status = path.stat()
    if not stat.S_ISBLK(status.st_mode):
        birth, handle = birth_time(path), _handle(path)
        return ImageIdentity(str(path.resolve()), "file", status.st_ino, birth, handle)
    unique = device_identity(status.st_rdev)
    if unique:
        return ImageIdentity(str(path.resolve()), "block", 0, unique)
    sequence = _read(_node(status.st_rdev) / "diskseq")
    return ImageIdentity(str(path.resolve()), "block", status.st_rdev, "", sequence, this_boot())


def compare(one: ImageIdentity, other: ImageIdentity) -> Sameness:
    """Whether two identities are of the same image, wherever it is mounted now."""
    if one.kind != other.kind:
        return Sameness.OTHER
    return (_compare_files if one.kind == "file" else _compare_devices)(one, other)


def same_image(one: ImageIdentity, other: ImageIdentity) -> bool:
    """Whether two identities are certainly of the same image."""
    return compare(one, other) is Sameness.SAME


def may_be_same(one: ImageIdentity, other: ImageIdentity) -> bool:
    """Whether nothing shows that two identities are of different images."""
    return compare(one, other) is not Sameness.OTHER


def _compare_files(one: ImageIdentity, other: ImageIdentity) -> Sameness:
    if one.number != other.number:
        return Sameness.OTHER
    births = one.birth, other.birth
    # Handles of different kinds are those of different views of one file system: that of an
    # NFS client has the server's in it.
    kinds = one.handle.partition(":")[0], other.handle.partition(":")[0]
    handles = (one.handle, other.handle) if kinds[0] == kinds[1] else ("", "")
    evidence = [pair for pair in (births, handles) if all(pair)]
    if any(first != second for first, second in evidence):
        return Sameness.OTHER
    return Sameness.SAME if evidence else Sameness.UNKNOWN


def _compare_devices(one: ImageIdentity, other: ImageIdentity) -> Sameness:
    if one.birth and other.birth:
        if _is_of_old_loop(one.birth) or _is_of_old_loop(other.birth):
            return Sameness.UNKNOWN
        return Sameness.SAME if one.birth == other.birth else Sameness.OTHER
    if one.birth or other.birth or not one.boot or one.boot != other.boot:
        return Sameness.UNKNOWN
    if one.number != other.number:
        return Sameness.OTHER
    return Sameness.SAME if one.handle == other.handle else Sameness.UNKNOWN


def _is_of_old_loop(birth: str) -> bool:
    """Whether it is what earlier versions say of a loop device: a digest of a file's name alone."""
    return birth.startswith("loop-")


# Block devices


def device_identity(device: int) -> str:
    """What no other block device is or was; empty if nothing tells.

    *device* is a device number, as in ``st_rdev``.
    """
    node = _node(device)
    if (node / "partition").exists():
        whole = _device_number(node / "..")
        parent = device_identity(whole) if whole else ""
        return f"{parent}-part{_read(node / 'start')}" if parent else ""
    uuid = _read(node / "dm" / "uuid")
    if uuid:
        return uuid
    if (node / "loop" / "backing_file").exists():
        return _loop_identity(node)
    wwid = _read(node / "wwid") or _read(node / "device" / "wwid")
    return f"wwid-{wwid}" if wwid else ""


class BlockDevices:
    """The block devices that are up, all looked at when the first of them is asked for.

    Who reads many files of what earlier runs have left hands the same one to all of these
    readings: with as many files as devices, looking anew for each would take the square of that.
    """

    def __init__(self) -> None:
        """Nothing is looked at yet."""
        self._nodes: dict[str, str] | None = None

    def node_of(self, unique: str) -> str:
        """The node of the device of which :func:`device_identity` says *unique*; empty if none."""
        if self._nodes is None:
            self._nodes = _nodes_by_identity()
        return self._nodes.get(unique, "")


def _nodes_by_identity() -> dict[str, str]:
    try:
        devices = sorted(Path("/sys/class/block").iterdir())
    except OSError:
        return {}
    nodes: dict[str, str] = {}
    for device in devices:
        number = _device_number(device)
        unique = device_identity(number) if number else ""
        if unique and unique not in nodes and (node := _node_with(device, number)):
            nodes[unique] = node
    return nodes


def _node_with(device: Path, number: int) -> str:
    """The node with the *number* of a device in sysfs; empty if there is none."""
    # Where no udev makes links, as in a container, the name in the device-mapper is the node.
    for name in (device.name.replace("!", "/"), f"mapper/{_read(device / 'dm' / 'name')}"):
        with contextlib.suppress(OSError):
            node = Path("/dev", name).resolve()
            status = node.stat()
            if stat.S_ISBLK(status.st_mode) and status.st_rdev == number:
                return str(node)
    return ""


def _loop_identity(node: Path) -> str:
    """That of the file below a loop device, and where in it the device begins."""
    below = Path(os.fsdecode(_read_bytes(node / "loop" / "backing_file")))
    try:
        status = below.stat()
        if not _is_below(node, status):
            return ""
        offset = _read(node / "loop" / "offset")
        if stat.S_ISBLK(status.st_mode):
            unique = device_identity(status.st_rdev)
            return f"over-{unique}-at-{offset}" if unique else ""
        birth, handle = birth_time(below), _handle(below)
    except (OSError, ValueError):
        return ""
    if not (birth or handle):
        return ""
    return f"over-{status.st_ino}-{birth}-{handle}-at-{offset}"


# linux/loop.h: struct loop_info64 begins with lo_device, lo_inode and lo_rdevice.
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_INFO_BYTES: Final = 232
_LOOP_INFO_HEAD: Final = struct.Struct("=QQQ")


def _is_below(node: Path, status: os.stat_result) -> bool:
    """Whether the file that sysfs names is the one below a loop device.

    It may be mounted elsewhere, or not at all, where the device is seen from here.
    """
    major, minor = (int(part) for part in _read(node / "dev").split(":"))
    for path in (Path("/dev") / node.resolve().name, Path(f"/dev/block/{major}:{minor}")):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if os.fstat(fd).st_rdev != os.makedev(major, minor):
                continue
            info = bytearray(_LOOP_INFO_BYTES)
            fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
            device, inode, _ = _LOOP_INFO_HEAD.unpack_from(info)
        except OSError:
            continue
        finally:
            os.close(fd)
        return (device, inode) == (_as_encoded(status.st_dev), status.st_ino)
    return False


def _as_encoded(device: int) -> int:
    """A device number as the kernel's new_encode_dev has it, and ``struct loop_info64``."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def _node(device: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def _device_number(node: Path) -> int:
    major, _, minor = _read(node / "dev").partition(":")
    return os.makedev(int(major), int(minor)) if minor else 0


def _read(file: Path) -> str:
    return _read_bytes(file).decode("utf-8", "surrogateescape").strip()


def _read_bytes(file: Path) -> bytes:
    """What stands in a file of sysfs, without the line's end; empty if there is none."""
    try:
        return file.read_bytes().removesuffix(b"\n")
    except OSError:
        return b""


@cache
def this_boot() -> str:
    """What is another text after every boot; empty if nothing tells."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


# Files


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


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def birth_time(path: Path) -> str:
    """Time of birth of a file, as text; empty on file systems that do not keep it."""
    result = _Statx()
    status = _libc().statx(
        _AT_FDCWD, os.fsencode(path), 0, ctypes.c_uint(_STATX_BTIME), ctypes.byref(result)
    )
    if status != 0 or not result.mask & _STATX_BTIME:
        return ""
    return f"{result.born.seconds}.{result.born.nanoseconds:09d}"


# linux/magic.h: the file systems whose handles hold a number of the inode's use, and are the same
# for as long as the file is there. Those of others (FUSE) are made up anew at every mount.
_LASTING_HANDLES: Final = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # Btrfs
        0xF2F52010,  # F2FS
        0x7461636F,  # OCFS2
        0x01161970,  # GFS2
        0x6969,  # NFS
        0x01021994,  # tmpfs
    }
)
_MOST_HANDLE_BYTES: Final = 128  # MAX_HANDLE_SZ of name_to_handle_at(2)
_AT_SYMLINK_FOLLOW: Final = 0x400


class _FileHandle(ctypes.Structure):
    # struct file_handle of name_to_handle_at(2).
    _fields_: ClassVar = [
        ("bytes", ctypes.c_uint),
        ("type", ctypes.c_int),
        ("handle", ctypes.c_uint8 * _MOST_HANDLE_BYTES),
    ]


def _handle(path: Path) -> str:
    """A file's handle as text, ``KIND:BYTES``; empty if it has none that lasts."""
    magic = _file_system(path)
    libc = _libc()
    # musl has no such function.
    if magic not in _LASTING_HANDLES or not hasattr(libc, "name_to_handle_at"):
        return ""
    result = _FileHandle(bytes=_MOST_HANDLE_BYTES)
    mount = ctypes.c_int()
    status = libc.name_to_handle_at(
        _AT_FDCWD,
        os.fsencode(path),
        ctypes.byref(result),
        ctypes.byref(mount),
        _AT_SYMLINK_FOLLOW,
    )
    if status != 0:
        return ""
    return f"{magic:x}.{result.type}:{bytes(result.handle[: result.bytes]).hex()}"


def _file_system(path: Path) -> int:
    """The magic number of the file system that a file is on; 0 where it cannot be had."""
    # struct statfs begins with it, a long on all 64-bit machines but s390x, where it is not found.
    buffer = ctypes.create_string_buffer(512)
    if _libc().statfs(os.fsencode(path), buffer) != 0:
        return 0
    return int(ctypes.c_long.from_buffer(buffer).value) & 0xFFFFFFFF
