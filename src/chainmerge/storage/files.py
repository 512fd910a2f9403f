# SPDX-License-Identifier: Apache-2.0
"""Positioned I/O on image files and block devices, and small files that survive a power cut.

All offsets, lengths and sizes are in bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from chainmerge.storage import allocation, block
from chainmerge.storage.errors import (
    AccessDenied,
    CannotOpen,
    FlushFailed,
    ImageMissing,
    ImageReadOnly,
    NoSpaceLeft,
    ReadFailed,
    WriteFailed,
    WrongFileType,
    reason_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.errors import Failed, Refused

StrPath: TypeAlias = "str | os.PathLike[str]"

# The kernel's limit for a file offset (loff_t).
_MAX_OFFSET: Final = (1 << 63) - 1
_LAST_STREAM: Final = 2

_FILE_TYPES: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
}

# Who else may use a file. What a file does not have of these counts too.
_ACCESS_CONTROL: Final = frozenset({"system.posix_acl_access", "system.nfs4_acl"})
# Checksums and signatures of what is in the file.
_OF_THE_CONTENT: Final = frozenset({"security.ima", "security.evm"})


class FileReadable:
    """An image file or block device, open for reading.

    Attributes:
        name: the path as it was given.
        fd: the descriptor, closed on exec.
        size: bytes, as of when the file was opened.
        identity: device and inode; equal for all names of one file.
        is_block_device: False for a regular file.
    """

    def __init__(self, path: StrPath) -> None:
        """Open a regular file or a block device; nothing else is.

        Raises:
            ImageMissing, WrongFileType, AccessDenied, CannotOpen: it cannot be opened.
        """
        self.name = os.fspath(path)
        self._adopt(_open_for_reading(self.name), "reading")

    def _adopt(self, fd: int, access: str) -> None:
        self.fd = fd
        try:
            status = os.fstat(fd)
            self.identity = (status.st_dev, status.st_ino)
            self.is_block_device = stat.S_ISBLK(status.st_mode)
            self.size = self.current_size()
        except OSError as error:
            self.close()
            raise _open_error(self.name, access, error) from error

    def current_size(self) -> int:
        """Bytes, as of now."""
        return block.device_size(self.fd) if self.is_block_device else os.fstat(self.fd).st_size

    def kernel_path(self) -> str:
        """Where the kernel found the file, without symbolic links; empty if it does not say.

        Another name if it has been renamed since.
        """
        try:
            return os.readlink(f"/proc/self/fd/{self.fd}")  # noqa: PTH115
        except OSError:
            return ""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly *length* bytes from *offset* on; what lies past the end reads as zeros.

        Raises:
            ReadFailed: the storage reported an error.
        """
        wanted = min(length, max(_MAX_OFFSET - offset, 0))
        data = self._pread(offset, wanted) if wanted else b""
        if len(data) == length:
            return data
        pieces = bytearray(data)
        while data and len(pieces) < wanted:
            data = self._pread(offset + len(pieces), wanted - len(pieces))
            pieces += data
        return bytes(pieces.ljust(length, b"\0"))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As :meth:`read`, as many bytes as *buffer* has.

        Raises:
            ReadFailed: the storage reported an error.
        """
        done = 0
        while done < len(buffer):
            at = offset + done
            try:
                count = os.preadv(self.fd, [buffer[done:]], at) if at < _MAX_OFFSET else 0
            except OSError as error:
                rest = len(buffer) - done
                raise ReadFailed(self.name, at, rest, reason_of(error)) from error
            if count == 0:
                buffer[done:] = bytes(len(buffer) - done)
                return
            done += count

    def read_ahead(self, offset: int, length: int) -> None:
        """Have the kernel begin to read what is going to be read."""
        # Without it, what is read is the same.
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def _pread(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self.fd, length, offset)
        except OSError as error:
            raise ReadFailed(self.name, offset, length, reason_of(error)) from error

    def close(self) -> None:
        """Close the file. May be called more than once."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WritablePort(FileReadable):
    """An image file or block device, open for reading and writing.

    Nothing is durable before :meth:`flush` has returned; closing does not flush. After a
    flush that failed every further call fails too, see :class:`FlushFailed`.

    Attributes:
        size: bytes; follows what is written, truncated or reserved through this object.
    """

    def __init__(self, path: StrPath) -> None:
        """Open a regular file or a block device for reading and writing.

        Raises:
            ImageMissing, WrongFileType, AccessDenied, ImageReadOnly, CannotOpen: it cannot be
                opened for writing.
        """
        self.name = os.fspath(path)
        self._failed_flush: FlushFailed | None = None
        self._adopt(_open_for_writing(self.name), "writing")

    def read(self, offset: int, length: int) -> bytes:
        """As :meth:`FileReadable.read`; sees what was written through this object."""
        self.refuse_after_failed_flush()
        return super().read(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As :meth:`FileReadable.read_into`; sees what was written through this object."""
        self.refuse_after_failed_flush()
        super().read_into(offset, buffer)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of *data* at *offset*.

        Raises:
            NoSpaceLeft: the file system is full, or a device ends before the data does.
            WriteFailed: the storage reported another error.
            FlushFailed: an earlier flush failed; nothing was written.
        """
        self.refuse_after_failed_flush()
        rest = memoryview(data).cast("B")
        while rest:
            try:
                written = os.pwrite(self.fd, rest, offset)
            except OSError as error:
                raise write_error(self.name, offset, len(rest), error) from error
            if written == 0:
                raise WriteFailed(self.name, offset, len(rest), "nothing was written")
            offset += written
            rest = rest[written:]
            self.size = max(self.size, offset)

    def flush(self) -> None:
        """Return when everything written so far is durable.

        Raises:
            FlushFailed: it may not be, and never will be through this object.
        """
        self.refuse_after_failed_flush()
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self._failed_flush = FlushFailed(self.name, reason_of(error))
            raise self._failed_flush from error

    def reserve(self, offset: int, length: int) -> None:
        """Reserve space of a regular file for later writes; its size stays what it is.

        Raises:
            NoSpaceLeft: there is not enough; a part may have been reserved.
            WriteFailed: the storage reported another error, or cannot reserve space at all.
        """
        self.refuse_after_failed_flush()
        try:
            allocation.reserve(self.fd, offset, length)
        except OSError as error:
            raise write_error(self.name, offset, length, error) from error

    def truncate_to(self, size: int) -> None:
        """Make a regular file exactly *size* bytes large; new bytes are zeros.

        Raises:
            NoSpaceLeft, WriteFailed: it keeps its size.
        """
        self.refuse_after_failed_flush()
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise write_error(self.name, size, 0, error) from error
        self.size = size

    def punch(self, offset: int, length: int) -> None:
        """Give the space of a range of a regular file back; it reads as zeros afterwards.

        Raises:
            WriteFailed: the storage reported an error, or knows no holes.
        """
        self.refuse_after_failed_flush()
        try:
            allocation.punch_hole(self.fd, offset, length)
        except OSError as error:
            raise write_error(self.name, offset, length, error) from error

    def forget_cached(self) -> None:
        """Make later reads of flushed data come from the storage, and not from the page cache."""
        # Where that is not possible, what is read is what it would be without this.
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def refresh_size(self) -> None:
        """Take into account that a regular file was written to past this object."""
        if not self.is_block_device:
            self.size = os.fstat(self.fd).st_size

    def refuse_after_failed_flush(self) -> None:
        """Must be called before anybody writes past this object.

        Raises:
            FlushFailed: an earlier flush failed.
        """
        if self._failed_flush is not None:
            raise FlushFailed(self.name, self._failed_flush.reason)


class AppendedFile:
    """A file of our own that only ever grows, such as a log.

    Attributes:
        name: the path as it was given.
    """

    def __init__(self, path: StrPath, fd: int) -> None:
        """Adopt a descriptor; see :meth:`created` and :meth:`reopened`."""
        self.name = os.fspath(path)
        self._fd = fd

    @classmethod
    def created(cls, path: StrPath) -> Self:
        """A new file that only its owner can read; its name is not durable yet.

        Raises:
            CannotOpen, AccessDenied, ImageReadOnly: it cannot be made, or is there already.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return cls(path, os.open(path, flags, 0o600))
        except (OSError, ValueError) as error:
            raise _open_error(os.fspath(path), "writing", error) from error

    @classmethod
    def reopened(cls, path: StrPath, size: int) -> Self:
        """A file that is there; what it has behind its first *size* bytes is cut off.

        Raises:
            CannotOpen, AccessDenied, ImageReadOnly, ImageMissing: it cannot be opened.
            WriteFailed
        """
        fd = _open(os.fspath(path), os.O_WRONLY, "writing")
        try:
            os.ftruncate(fd, size)
            os.lseek(fd, size, os.SEEK_SET)
        except OSError as error:
            os.close(fd)
            raise write_error(os.fspath(path), size, 0, error) from error
        return cls(path, fd)

    def append(self, data: bytes) -> None:
        """Write *data* behind all that is there.

        Raises:
            NoSpaceLeft, WriteFailed
        """
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            raise write_error(self.name, 0, len(rest), error) from error

    def flush(self) -> None:
        """Return when all of it is durable.

        Raises:
            FlushFailed
        """
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise FlushFailed(self.name, reason_of(error)) from error

    def close(self) -> None:
        """Close the file. May be called more than once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take_on_access(file: FileReadable, other: StrPath) -> tuple[str, ...]:
    """Give an open regular file the owner, permissions and attributes of the one that it replaces.

    With the attributes come access control lists and security labels. Where only root could give
    the owner, the file keeps its own and all that goes with it: permissions that were meant for
    other owners are not given to these.

    Returns:
        What it could not be given, in words.

    Raises:
        WriteFailed: the storage reported an error.
    """
    try:
        wanted, own = os.stat(other), os.fstat(file.fd)  # noqa: PTH116
        if (wanted.st_uid, wanted.st_gid) != (own.st_uid, own.st_gid):
            os.fchown(file.fd, wanted.st_uid, wanted.st_gid)
        os.fchmod(file.fd, stat.S_IMODE(wanted.st_mode))
    except PermissionError:
        return ("owner and permissions",)
    except OSError as error:
        raise write_error(file.name, 0, 0, error) from error
    return tuple(_take_on_attributes(file.fd, os.fspath(other)))


def _take_on_attributes(fd: int, other: str) -> Iterator[str]:
    """Copy extended attributes; yields the names of those that could not be."""
    try:
        wanted = {name: os.getxattr(other, name) for name in os.listxattr(other)}
        own = {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            yield f"extended attributes ({reason_of(error)})"
        return
    for name in (own.keys() - wanted.keys()) & _ACCESS_CONTROL:
        try:
            os.removexattr(fd, name)
        except OSError:
            yield name
    for name, value in sorted(wanted.items()):
        if name in _OF_THE_CONTENT or own.get(name) == value:
            continue
        try:
            os.setxattr(fd, name, value)
        except OSError:
            yield name


def drop_cached(path: StrPath) -> None:
    """Have a file or device read from the storage from now on, as after a restart of the machine.

    For what an earlier process wrote and may not have been able to flush. Linux reports a flush
    that failed once, drops nothing, and takes the pages for clean: they show what the storage
    does not have, until they make room for others. Nothing happens where the file cannot be
    written to: then it was not.

    Raises:
        ImageMissing, WrongFileType, CannotOpen: it cannot be opened.
        FlushFailed: what is to be written still cannot be.
    """
    try:
        port = WritablePort(path)
    except (AccessDenied, ImageReadOnly):
        return
    with port:
        port.flush()
        port.forget_cached()


def fsync_directory(path: StrPath) -> None:
    """Return when the names in a directory are durable.

    Raises:
        FlushFailed: they may not be.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        # Some network file systems have no fsync of directories: they are durable at once.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise FlushFailed(os.fspath(path), reason_of(error)) from error


def write_file_durably(path: StrPath, data: bytes, mode: int) -> None:
    """Create or replace a small file as a whole: after a power cut it is the old or the new one.

    The new content is written to a file ``.NAME.chainmerge-new`` in the same directory, which
    then takes the name. What a killed process left under that name is replaced. Two processes
    must not write the same file at once.

    Args:
        path: the file; a symbolic link is replaced, not followed.
        data: its content.
        mode: its permissions, whatever the umask.

    Raises:
        AccessDenied, ImageReadOnly, CannotOpen: the directory does not take new files.
        NoSpaceLeft, WriteFailed: the file is as it was.
        FlushFailed: the file is as it was, or the new one has its name but that may not last.
    """
    target = os.fspath(path)
    directory, name = os.path.split(target)
    draft = os.path.join(directory, f".{name}.chainmerge-new")  # noqa: PTH118
    try:
        _write_draft(draft, target, data, mode)
        try:
            os.replace(draft, target)  # noqa: PTH105
        except OSError as error:
            raise write_error(target, 0, len(data), error) from error
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)  # noqa: PTH108
        raise
    fsync_directory(directory or ".")


def _write_draft(draft: str, target: str, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)  # noqa: PTH108
        fd = os.open(draft, flags, 0o600)
    except (OSError, ValueError) as error:
        raise _open_error(target, "writing", error) from error
    try:
        rest = memoryview(data)
        try:
            os.fchmod(fd, mode)
            while rest:
                rest = rest[os.write(fd, rest) :]
        except OSError as error:
            raise write_error(target, len(data) - len(rest), len(rest), error) from error
        try:
            os.fsync(fd)
        except OSError as error:
            raise FlushFailed(target, reason_of(error)) from error
    finally:
        os.close(fd)


def _open_for_reading(path: str) -> int:
    return _open(path, os.O_RDONLY, "reading")


def _open_for_writing(path: str) -> int:
    fd = _open(path, os.O_RDWR, "writing")
    try:
        is_read_only = stat.S_ISBLK(os.fstat(fd).st_mode) and block.is_read_only(fd)
    except OSError as error:
        os.close(fd)
        raise _open_error(path, "writing", error) from error
    if is_read_only:
        os.close(fd)
        raise ImageReadOnly(path, "the block device is set read-only")
    return fd


def _open(path: str, flags: int, access: str) -> int:
    try:
        # Looking before opening spares devices that act on being opened; O_NONBLOCK and the
        # second look are for a name that becomes that of a pipe in between.
        _require_image_type(path, os.stat(path))  # noqa: PTH116
        fd = open_clear_of_streams(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _open_error(path, access, error) from error
    try:
        _require_image_type(path, os.fstat(fd))
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    except OSError as error:
        os.close(fd)
        raise _open_error(path, access, error) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_clear_of_streams(path: str, flags: int) -> int:
    """A descriptor that is not one of the three on which programs print.

    In a process that was started with one of these closed, or has closed it, the next file that
    is opened gets its number, and whatever prints then, writes into that file.

    Raises what :func:`os.open` raises.
    """
    fd = os.open(path, flags)
    if fd > _LAST_STREAM:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LAST_STREAM + 1)
    finally:
        os.close(fd)


def _require_image_type(path: str, status: os.stat_result) -> None:
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        kind = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "of an unknown type")
        raise WrongFileType(path, kind)


def _open_error(path: str, access: str, error: OSError | ValueError) -> Refused:
    if not isinstance(error, OSError):
        # NUL bytes and what no file system encoding knows, in names that come from images.
        return CannotOpen(path, access, f"the name is not valid ({error})")
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return ImageMissing(path)
        case errno.EROFS:
            return ImageReadOnly(path, reason_of(error))
        case errno.EPERM if access == "writing":
            # What the owner, and even root, gets for an immutable file.
            return ImageReadOnly(path, reason_of(error))
        case errno.EACCES | errno.EPERM:
            return AccessDenied(path, access)
        case _:
            return CannotOpen(path, access, reason_of(error))


def write_error(path: str, offset: int, length: int, error: OSError) -> Failed:
    """The error to raise for what the operating system said about a write."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (NoSpaceLeft if full else WriteFailed)(path, offset, length, reason_of(error))
