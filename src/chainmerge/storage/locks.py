# SPDX-License-Identifier: Apache-2.0
"""QEMU's image locks, taken as QEMU takes them.

QEMU locks single bytes of an image file with shared open file description (OFD) locks. Byte
100+i says "permission i is used here", byte 200+i "permission i is not shared with others",
with i being 0 consistent read, 1 write, 2 write unchanged, 3 resize. A process takes all its
bytes first and then looks whether somebody else's contradict them: for every permission it
uses whether that is unshared elsewhere, for every one it does not share whether that is used
elsewhere. Locks on these bytes being shared, taking them never fails; who finds a conflict
gives up. (``block/file-posix.c`` of QEMU: ``raw_apply_lock_bytes``, ``raw_check_lock_bytes``.)

OFD locks belong to the open file: they conflict between two opens in one process as between
two processes, they are inherited with the descriptor, and the kernel drops them with its last
copy. On a block device they are on the device's *node*; another node of the same device is
another file. Nothing crosses hosts, unless the file system makes it so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from msgspec import Struct

from chainmerge.errors import Refused
from chainmerge.storage.errors import ImageLocked, LocksUnsupported, reason_of
from chainmerge.storage.files import FileReadable
from chainmerge.storage.processes import process_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from chainmerge.storage.files import StrPath

_USED: Final = 100
_UNSHARED: Final = 200

_CONSISTENT_READ: Final = 0
_WRITE: Final = 1
_RESIZE: Final = 3

# struct flock with 64-bit offsets: l_type, l_whence, l_start, l_len, l_pid, in native alignment;
# the "0q" pads it to the size that the compiler gives it. l_pid must be 0 for OFD locks.
_FLOCK: Final = struct.Struct("@hhqqi0q")

_POLL_SECONDS: Final = 0.05


class LockMode(Enum):
    """How an image is locked: the permissions used, and those not shared with others."""

    READER = ((_CONSISTENT_READ,), (_WRITE, _RESIZE))
    """How QEMU locks a qcow2 image that it only reads: other readers are allowed."""

    WRITER = ((_CONSISTENT_READ, _WRITE, _RESIZE), (_WRITE, _RESIZE))
    """How QEMU locks a qcow2 image that it writes: only readers that ask for nothing
    consistent (``qemu-img -U``) get in."""

    def __init__(self, used: tuple[int, ...], unshared: tuple[int, ...]) -> None:
        self.used = used
        self.unshared = unshared

    @property
    def own_bytes(self) -> tuple[int, ...]:
        """The bytes that say so."""
        return (*(_USED + i for i in self.used), *(_UNSHARED + i for i in self.unshared))

    @property
    def contradicting_bytes(self) -> tuple[int, ...]:
        """The bytes that nobody else may have."""
        return (*(_UNSHARED + i for i in self.used), *(_USED + i for i in self.unshared))


class LockedReadable(Struct, frozen=True):
    """A locked image, read through the descriptor of its lock; made by :meth:`ImageLock.reader`.

    It takes no descriptor of its own, and what is read is for certain what is locked. Once the
    lock is released, reads fail.

    Attributes:
        size: bytes, as of when this was made.
    """

    _file: FileReadable
    size: int

    @property
    def name(self) -> str:
        """The path as it was given for the lock."""
        return self._file.name

    @property
    def fd(self) -> int:
        """The lock's descriptor."""
        return self._file.fd

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode; equal for all names of one file."""
        return self._file.identity

    @property
    def is_block_device(self) -> bool:
        """False for a regular file."""
        return self._file.is_block_device

    def read(self, offset: int, length: int) -> bytes:
        """As :meth:`chainmerge.storage.files.FileReadable.read`."""
        return self._file.read(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As :meth:`chainmerge.storage.files.FileReadable.read_into`."""
        self._file.read_into(offset, buffer)

    def read_ahead(self, offset: int, length: int) -> None:
        """As :meth:`chainmerge.storage.files.FileReadable.read_ahead`."""
        self._file.read_ahead(offset, length)


AnyFile: TypeAlias = FileReadable | LockedReadable
"""An open file of the operating system: has ``fd``, ``identity`` and ``is_block_device``."""


class ImageLock(Struct, frozen=True):
    """A lock that is held on an image; made by :func:`lock_image`.

    Attributes:
        image: the path as it was given.
        mode: as what the image is locked.
    """

    image: str
    mode: LockMode
    _file: FileReadable

    def fileno(self) -> int:
        """The descriptor that the lock belongs to; -1 after :meth:`release`."""
        return self._file.fd

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the locked file."""
        return self._file.identity

    def reader(self) -> LockedReadable:
        """The image, open for reading as long as the lock is held."""
        # The size may have changed since it was opened, while the lock was waited for.
        return LockedReadable(self._file, self._file.current_size())

    def share_with_child(self) -> int:
        """Let processes started from now on inherit the lock; returns the descriptor.

        A child that was started with it (``pass_fds`` of :mod:`subprocess` does this too) keeps
        the lock until it ends, whatever becomes of this process.
        """
        os.set_inheritable(self._file.fd, True)  # noqa: FBT003
        return self._file.fd

    def release(self) -> None:
        """Release the lock; may be called more than once.

        A child that inherited it still holds it: unlocking the bytes would take it from the
        child as well, so the descriptor is only closed.
        """
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _unheard() -> None:
    """In place of ``on_wait`` where nobody listens."""


def lock_image(
    path: StrPath,
    mode: LockMode,
    wait_seconds: float,
    on_wait: Callable[[], None] = _unheard,
) -> ImageLock:
    """Lock an image as QEMU would, waiting up to *wait_seconds* for others to release it.

    *on_wait* is called once, when the waiting begins.

    Raises:
        ImageLocked: somebody else has it; tried at least once.
        LocksUnsupported: the file system has no such locks.
        ImageMissing, WrongFileType, AccessDenied, CannotOpen: it cannot be opened for reading,
            which is all that a lock needs.
    """
    deadline = time.monotonic() + wait_seconds
    file = FileReadable(path)
    try:
        _acquire_until(deadline, file, mode, on_wait)
    except BaseException:
        file.close()
        raise
    return ImageLock(file.name, mode, file)


def contentions(wanted: Iterable[tuple[StrPath, LockMode]]) -> Iterator[Refused]:
    """Why locks cannot be had now, one error for each of *wanted* that cannot.

    No byte is taken, not even for a moment: a QEMU that opens an image just then would find it
    locked, and gives up at once. The holders are looked for once for all of them: a virtual
    machine holds all images of its chain, and who looks for the holder of one looks at all open
    files of all processes.

    Yields:
        What :func:`lock_image` raises without waiting, in the order of *wanted*.
    """
    refusals = [refusal for path, mode in wanted for refusal in _refusal(path, mode)]
    is_contended = any(isinstance(refusal, _Contended) for refusal in refusals)
    held = _locks_by_file() if is_contended else {}
    for refusal in refusals:
        yield refusal.as_error(held) if isinstance(refusal, _Contended) else refusal


def _refusal(path: StrPath, mode: LockMode) -> Iterator[Refused | _Contended]:
    try:
        with FileReadable(path) as file:
            if _contradicted_now(file, mode):
                yield _Contended(file.name, _kernel_name(file.fd), mode.contradicting_bytes)
    except Refused as error:
        yield error


def _contradicted_now(file: FileReadable, mode: LockMode) -> bool:
    try:
        return _contradicted(file.fd, mode)
    except OSError as error:
        raise LocksUnsupported(file.name, _reason(error)) from error


def _acquire_until(
    deadline: float, file: FileReadable, mode: LockMode, on_wait: Callable[[], None]
) -> None:
    is_waiting = False
    while not _acquire(file, mode):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            contended = _Contended(file.name, _kernel_name(file.fd), mode.contradicting_bytes)
            raise contended.as_error(_locks_by_file())
        if not is_waiting:
            is_waiting = True
            on_wait()
        time.sleep(min(_POLL_SECONDS, remaining))


def _acquire(file: FileReadable, mode: LockMode) -> bool:
    try:
        # Looking first: bytes taken only to be let go of again could make an innocent QEMU
        # that starts in this moment fail.
        if _contradicted(file.fd, mode):
            return False
        for byte in mode.own_bytes:
            _set_lock(file.fd, fcntl.F_RDLCK, byte)
        if not _contradicted(file.fd, mode):
            return True
        for byte in mode.own_bytes:
            _set_lock(file.fd, fcntl.F_UNLCK, byte)
    except OSError as error:
        raise LocksUnsupported(file.name, _reason(error)) from error
    return False


def _contradicted(fd: int, mode: LockMode) -> bool:
    return any(_is_locked_elsewhere(fd, byte) for byte in mode.contradicting_bytes)


def _is_locked_elsewhere(fd: int, byte: int) -> bool:
    """Whether another open file has any lock on the byte."""
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _set_lock(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _reason(error: OSError) -> str:
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
        return "the file system does not support open file description locks"
    return reason_of(error)


class _KernelLock(Struct, frozen=True):
    """One lock as the kernel lists it under ``/proc``."""

    file: str
    """Device and inode in the kernel's own words."""
    first: int
    last: int | None
    """None for a lock to the end of the file."""

    def touches(self, byte: int) -> bool:
        return self.first <= byte and (self.last is None or byte <= self.last)


_LocksByFile: TypeAlias = "Mapping[str, Sequence[tuple[int, _KernelLock]]]"


class _Contended(Struct, frozen=True):
    """An image that somebody else has locked."""

    image: str
    file: str | None
    """As in :class:`_KernelLock`; None if it could not be found out."""
    wanted: tuple[int, ...]
    """The bytes that nobody else may have."""

    def as_error(self, held: _LocksByFile) -> ImageLocked:
        holders = {
            process
            for process, lock in held.get(self.file or "", ())
            if any(lock.touches(byte) for byte in self.wanted)
        }
        names = ", ".join(process_name(process) for process in sorted(holders))
        return ImageLocked(self.image, names or "another process")


def _locks_by_file() -> _LocksByFile:
    """Process ids and locks, by the file."""
    held: dict[str, list[tuple[int, _KernelLock]]] = defaultdict(list)
    for process, lock in _locks_of_all_processes():
        held[lock.file].append((process, lock))
    return held


def _kernel_name(fd: int) -> str | None:
    """Device and inode as the kernel's lock lists have them.

    The device need not be what stat says (Btrfs, overlays): it is that of the mount.
    """
    try:
        about = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
        mounts = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return None
    told = dict(line.split(":", 1) for line in about.splitlines() if line.count(":") == 1)
    mount = told.get("mnt_id", "").strip().encode()
    # Linux tells the inode since 5.14.
    inode = told.get("ino", "").strip() or str(os.fstat(fd).st_ino)
    for line in mounts.splitlines():
        words = line.split(maxsplit=3)
        if words[0] == mount:
            major, _, minor = words[2].partition(b":")
            return f"{int(major):02x}:{int(minor):02x}:{inode}"
    return None


def _locks_of_all_processes() -> Iterator[tuple[int, _KernelLock]]:
    """Process id and lock, for every process that we may look at.

    ``/proc/locks`` has no process for OFD locks (-1): they belong to files, not processes.
    """
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            for entry in (process / "fdinfo").iterdir():
                for lock in _locks_in(entry):
                    yield int(process.name), lock
        except OSError:  # gone in the meantime, or not ours to look at
            continue


def _locks_in(fdinfo: Path) -> Iterator[_KernelLock]:
    # lock:   1: OFDLCK ADVISORY  READ -1 fe:00:2252864 100 101
    try:
        text = fdinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    yield from _locks_told_of(text)


def _locks_told_of(fdinfo: str) -> Iterator[_KernelLock]:
    for line in fdinfo.splitlines():
        words = line.split()
        # A "->" marks one who waits for the lock. Those of flock(2) meet no others.
        if len(words) == 9 and words[0] == "lock:" and words[2] != "FLOCK":
            file, first, last = words[-3:]
            yield _KernelLock(file, int(first), None if last == "EOF" else int(last))


def lock_bytes_of(fdinfo: str) -> frozenset[int]:
    """The bytes that QEMU's locks are on, of an open file whose text under ``/proc`` this is."""
    locks = list(_locks_told_of(fdinfo))
    permissions = range(_RESIZE + 1)
    candidates = [start + one for start in (_USED, _UNSHARED) for one in permissions]
    return frozenset(byte for byte in candidates if any(lock.touches(byte) for lock in locks))
