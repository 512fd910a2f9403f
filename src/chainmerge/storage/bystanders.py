# SPDX-License-Identifier: Apache-2.0
"""Who uses an image without QEMU's locks, or where they do not meet ours.

QEMU's locks are on an inode, and bind those who ask for them. They do not cover a program that does
not use them, one that reaches a file through a loop device over it (or a loop device by the file
below it), of a QEMU that has another node of the same block device (each container and each domain
of libvirt may have its own ``/dev``), nor of what the kernel does with a device: mounts,
device-mapper, MD, swap. All those users are looked for here. Nothing is taken but, for the moment
of an ``open``, the exclusive claim (``O_EXCL``) on a block device that is an image.

One look at ``/proc/*/fd`` serves all images. It sees what we may see: as an ordinary user that is
one's own processes; never those of other hosts, and not those that have only mapped a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct

from chainmerge.storage.locks import LockMode, lock_bytes_of
from chainmerge.storage.processes import process_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Inode: TypeAlias = tuple[int, int]
Key: TypeAlias = tuple[str, int, int]
"""A file by its device and inode, or a block device, whichever node it is reached by."""

MAX_DEVICES: Final = 4096
"""Devices by which one image can be reached that are looked at."""
MAX_NAMES: Final = 1 << 20
"""Entries of one directory of the kernel's: processes, or open files of one, that are."""

_BLOCK_DEVICES: Final = Path("/sys/dev/block")
_NAMED: Final = 5
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_INFO: Final = struct.Struct("=QQ")  # linux/loop.h: lo_device, lo_inode come first
_LOOP_INFO_BYTES: Final = 232


class Wanted(Struct, frozen=True):
    """An image that somebody wants to have: what for, and whether it will be gone afterwards.

    ``dies`` says that it will be deleted: then even those who only read it should know.
    """

    path: Path
    mode: LockMode
    dies: bool = False


class Bystander(Struct, frozen=True):
    """Another user of an image.

    Attributes:
        image: The image, as it was named.
        name: Who it is: a process, a mount, a device.
        excludes: Whether what is wanted of the image must not be done meanwhile; else somebody
            only reads, who may see what is neither the old nor the new content.
    """

    image: str
    name: str
    excludes: bool


def bystanders_of(
    wanted: Iterable[Wanted], known: frozenset[int] = frozenset()
) -> tuple[Bystander, ...]:
    """Everybody who uses one of the images without QEMU's locks showing it.

    Args:
        wanted: the images, of any number of disks. What cannot be looked at is left out.
        known: processes that may: by their ids. This process and its children always may.

    Returns:
        In the order of the images.
    """
    loops = _loop_devices()
    images = [(one, places) for one in wanted if (places := tuple(_places_of(one.path, loops)))]
    interesting = {place.key for _, places in images for place in places}
    found = _opened(interesting, known) if interesting else {}
    return tuple(
        who for one, places in images for place in places for who in _users(one, place, found)
    )


class Openers(Struct, frozen=True):
    """The processes that have images open.

    Attributes:
        processes: By image, as it was named; in order.
        all_seen: Whether every process could be looked at. If not, there may be more.
    """

    processes: Mapping[Path, tuple[int, ...]]
    all_seen: bool


def openers_of(images: Iterable[Path]) -> Openers:
    """Who has images open, for whatever purpose, found in one look; this process is left out."""
    loops = _loop_devices()
    places: dict[Key, list[Path]] = defaultdict(list)
    for image in dict.fromkeys(images):
        for place in _places_of(image, loops):
            places[place.key].append(image)
    found: dict[Path, set[int]] = defaultdict(set)
    look = _Look()
    all_seen = True
    for name in _names_in("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        all_seen = all_seen and _may_be_looked_at(name)
        for _, key, _ in look.files_of(name):
            for image in places.get(key, ()):
                found[image].add(int(name))
    return Openers({image: tuple(sorted(who)) for image, who in found.items()}, all_seen)


def _may_be_looked_at(process: str) -> bool:
    """Whether the kernel says what a process has open, if it is still there."""
    return os.access(f"/proc/{process}/fd", os.R_OK) or not os.path.exists(f"/proc/{process}")  # noqa: PTH110 (many)


class _Place(Struct, frozen=True):
    """Where an image's bytes can be reached.

    ``way`` is the device by which that is; None for the image itself. ``inode`` is what our own
    lock is on; None if it is elsewhere.
    """

    key: Key
    way: str | None
    inode: Inode | None


def files_open_in(process: int) -> frozenset[Key] | None:
    """The files and block devices that a process has open; None if we may not look."""
    try:
        os.listdir(f"/proc/{process}/fd")  # noqa: PTH208  # is all that is wanted
    except OSError:
        return None
    return frozenset(key for _, key, _ in _Look().files_of(str(process)))


def _places_of(image: Path, loops: Mapping[Key, Sequence[Key]]) -> Iterator[_Place]:
    """The image itself, and all devices over it or files below it that hold the same bytes."""
    try:
        status = image.stat()
    except (OSError, ValueError):
        return
    own = key_of(status)
    yield _Place(own, None, (status.st_dev, status.st_ino))
    seen = {own}
    pending = [own]
    while pending and len(seen) < MAX_DEVICES:
        key = pending.pop()
        for other in (*loops.get(key, ()), *_beside(key)):
            if other not in seen:
                seen.add(other)
                pending.append(other)
                yield _Place(other, _name_of(other), None)


def key_of(status: os.stat_result) -> Key:
    """What tells a file or block device from others, by whatever node it is reached."""
    if stat.S_ISBLK(status.st_mode):
        return ("device", 0, status.st_rdev)
    return ("file", status.st_dev, status.st_ino)


def _name_of(key: Key) -> str:
    """A device by its usual name; a file below a loop device by what that says of it."""
    kind, device, number = key
    if kind == "file":
        return f"the file below it (inode {number} of {os.major(device)}:{os.minor(device)})"
    node = _sysfs(number)
    with contextlib.suppress(OSError):
        return f"/dev/mapper/{(node / 'dm' / 'name').read_text().strip()}"
    with contextlib.suppress(OSError):
        return _node_of(node)
    return f"the block device {os.major(number)}:{os.minor(number)}"


def _node_of(sysfs: Path) -> str:
    # The kernel has "!" where a device's name has a slash.
    return f"/dev/{sysfs.readlink().name.replace('!', '/')}"


def _sysfs(device: int) -> Path:
    return _BLOCK_DEVICES / f"{os.major(device)}:{os.minor(device)}"


def _beside(key: Key) -> Iterator[Key]:
    """What has the bytes of a block device besides: the file below it, and what is on it."""
    kind, _, number = key
    if kind != "device":
        return
    node = _sysfs(number)
    name = _text(node / "loop" / "backing_file")
    if name is not None:
        below = _file_below(number)
        if below is not None:
            yield below
    for place in (node / "holders", node):
        for name in _names_in(place):
            if place is not node or (node / name / "partition").exists():
                yield from _device_at(place / name)


def _device_at(node: Path) -> Iterator[Key]:
    number = _text(node / "dev")
    if number is not None:
        major, _, minor = number.partition(":")
        yield ("device", 0, os.makedev(int(major), int(minor)))


def _names_in(directory: int | str | Path) -> list[str]:
    """The names in a directory of the kernel's, in order; none where it cannot be read."""
    try:
        return sorted(islice(os.listdir(directory), MAX_NAMES))  # noqa: PTH208  # many, and by fd
    except OSError:
        return []


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return None


def _loop_devices() -> dict[Key, list[Key]]:
    """The loop devices over each file or device that has any."""
    over: dict[Key, list[Key]] = defaultdict(list)
    for name in _names_in("/sys/block"):
        node = Path("/sys/block") / name
        if not (name.startswith("loop") and (node / "loop").exists()):
            continue
        for device in _device_at(node):
            below = _file_below(device[2])
            if below is not None:
                over[below].append(device)
    return over


def _file_below(device: int) -> Key | None:
    """What a loop device lies on; as the kernel has it, whatever its name is by now."""
    node = _sysfs(device)
    name = _text(node / "loop" / "backing_file")
    if name is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(name)  # noqa: PTH116
        if stat.S_ISBLK(status.st_mode):
            return key_of(status)
    with contextlib.suppress(OSError):
        fd = os.open(_node_of(node), os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_rdev == device:
                info = bytearray(_LOOP_INFO_BYTES)
                fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
                number, inode = _LOOP_INFO.unpack_from(info)
                return ("file", _device_number(number), inode)
        finally:
            os.close(fd)
    with contextlib.suppress(OSError, ValueError):
        return key_of(os.stat(name))  # noqa: PTH116
    return None


def _device_number(huge: int) -> int:
    """A device number as the C library has it, from the kernel's own form (huge_encode_dev)."""
    return os.makedev((huge & 0xFFF00) >> 8, (huge & 0xFF) | ((huge >> 12) & 0xFFFFF00))


class _Opened(Struct, frozen=True):
    """A file that a process has open."""

    process: int
    inode: Inode
    """Of the node, if it is a device."""
    writes: bool
    lock_bytes: frozenset[int]
    """The bytes that QEMU's locks are on."""


def _opened(interesting: set[Key], known: frozenset[int]) -> Mapping[Key, Sequence[_Opened]]:
    """Who has something of that open; one look at all processes that we may look at."""
    files: dict[Key, list[_Opened]] = defaultdict(list)
    ours = known | {os.getpid()}
    look = _Look()
    for name in _names_in("/proc"):
        if not name.isdecimal() or int(name) in ours:
            continue
        for number, key, inode in look.files_of(name):
            if key not in interesting:
                continue
            opened = _described(int(name), number, inode)
            if opened is not None and not _is_child(int(name), ours):
                files[key].append(opened)
    return files


class _Look:
    """Looks at open files without asking their file systems, which may not answer (NFS)."""

    # statx(2): AT_STATX_DONT_SYNC; type and inode.
    _FLAGS: Final = 0x4000
    _MASK: Final = 0x101
    _RESULT: Final = struct.Struct("=28xH2xQ88xIIII")

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(256)
        self._address = ctypes.addressof(self._buffer)
        self._statx = ctypes.CDLL(None).statx
        self._statx.argtypes = (
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_void_p,
        )

    def files_of(self, process: str) -> Iterator[tuple[str, Key, Inode]]:
        """The number, identity and inode of each file and block device that is open."""
        directory = f"/proc/{process}/fd"
        try:
            place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # gone in the meantime, or not ours to look at
            return
        try:
            for number in _names_in(place):
                found = self._identity(place, number)
                if found is not None:
                    yield number, *found
        finally:
            os.close(place)

    def _identity(self, directory: int, name: str) -> tuple[Key, Inode] | None:
        if self._statx(directory, name.encode(), self._FLAGS, self._MASK, self._address):
            return None
        mode, inode, *numbers = self._RESULT.unpack_from(self._buffer)
        device, own = os.makedev(*numbers[:2]), os.makedev(*numbers[2:])
        if stat.S_ISBLK(mode):
            return ("device", 0, device), (own, inode)
        if stat.S_ISREG(mode):
            return ("file", own, inode), (own, inode)
        return None


def _described(process: int, number: str, inode: Inode) -> _Opened | None:
    try:
        with open(f"/proc/{process}/fdinfo/{number}", "rb") as file:  # noqa: PTH123
            text = file.read()
    except OSError:
        return None
    flags = next((line for line in text.splitlines() if line.startswith(b"flags:")), b"flags: 0")
    opened_with = int(flags.split()[1], 8)
    if opened_with & os.O_PATH:
        return None
    writes = opened_with & os.O_ACCMODE != os.O_RDONLY
    return _Opened(process, inode, writes, lock_bytes_of(text.decode("ascii", "replace")))


def _is_child(process: int, ours: frozenset[int]) -> bool:
    """Whether one of *ours* started a process, or who started it, and so on."""
    seen = set()
    while process > 1 and process not in seen:
        if process in ours:
            return True
        seen.add(process)
        about = _text(Path(f"/proc/{process}/stat"))
        if about is None:
            return False
        # The name, in parentheses, may have blanks.
        process = int(about.rpartition(")")[2].split()[1])
    return False


def _users(
    one: Wanted, place: _Place, found: Mapping[Key, Sequence[_Opened]]
) -> Iterator[Bystander]:
    """Who uses an image at one of the places where it can be reached."""
    image = str(one.path)
    through = "" if place.way is None else f" through {place.way}"
    by_process: dict[int, list[_Opened]] = defaultdict(list)
    for opened in found.get(place.key, ()):
        by_process[opened.process].append(opened)
    for process, files in sorted(by_process.items()):
        if any(file.lock_bytes and file.inode == place.inode for file in files):
            # Its lock and ours are on the same inode: what is to be said of it they say.
            continue
        excludes = any(_excludes(file, one.mode) for file in files)
        if excludes or one.mode is LockMode.WRITER or one.dies:
            yield Bystander(image, f"{process_name(process)}{through}", excludes)
    if place.key[0] == "device":
        for claim in _claims(place.key[2]):
            yield Bystander(image, f"{claim}{through}", excludes=True)


def _excludes(opened: _Opened, mode: LockMode) -> bool:
    """Whether somebody writes, or says by QEMU's locks that nobody else may do so."""
    return opened.writes or not opened.lock_bytes.isdisjoint(mode.contradicting_bytes)


def _claims(device: int) -> Iterator[str]:
    """What holds a device exclusively, in words."""
    if _is_claimed(device):
        named = list(islice(_claimants(device), _NAMED))
        yield ", ".join(named) or "something in the kernel that holds it exclusively (O_EXCL)"


def _is_claimed(device: int) -> bool:
    node = _sysfs(device)
    if _names_in(node / "holders"):
        return True
    try:
        fd = os.open(_node_of(node), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return error.errno == errno.EBUSY
    os.close(fd)
    return False


def _claimants(device: int) -> Iterator[str]:
    node = _sysfs(device)
    for holder in _names_in(node / "holders"):
        for _, _, number in _device_at(node / "holders" / holder):
            yield f"the device {_name_of(('device', 0, number))}"
    for file in ("/proc/self/mountinfo", "/proc/1/mountinfo"):
        mounts = list(_mounts_of(device, file))
        if mounts:
            yield f"the file system mounted at {mounts[0]}"
            break
    swaps = (_text(Path("/proc/swaps")) or "").splitlines()[1:]
    for line in swaps:
        with contextlib.suppress(OSError, IndexError):
            if os.stat(line.split()[0]).st_rdev == device:  # noqa: PTH116
                yield "swap"


def _mounts_of(device: int, mountinfo: str) -> Iterator[str]:
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in (_text(Path(mountinfo)) or "").splitlines():
        words = line.split()
        # Btrfs has a device number of its own; the source is behind the dash.
        source = words[words.index("-") + 2] if "-" in words else ""
        if words[2] == number or (source.startswith("/dev/") and _is_device(source, device)):
            yield words[4]


def _is_device(path: str, device: int) -> bool:
    try:
        return os.stat(path).st_rdev == device  # noqa: PTH116
    except OSError:
        return False
