# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with the storage under an image, as errors that carry their facts.

::

    Refused                       nothing was changed
    ├── ImageMissing, WrongFileType, AccessDenied, ImageReadOnly, CannotOpen
    ├── ImageLocked, ImageInUse, LocksUnsupported, OpenFilesLimited
    ├── LvmMissing, NotALogicalVolume
    └── CannotGrow
        ├── FileSystemFull, FileLimitReached
        └── DeviceTooSmall, RawDeviceTooSmall, VolumeGroupFull
    Failed
    ├── ReadFailed, WriteFailed, NoSpaceLeft, FlushFailed, ReadBackDiffers
    ├── SystemCallFailed, OutOfMemory
    └── DiscardFailed, CannotShrink, LvmFailed
    OutcomeUnknown
    └── LvmUnfinished
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, ClassVar

from chainmerge.errors import (
    Failed,
    ImageUnavailable,
    NoSpace,
    NotVerified,
    Refused,
    StorageFailed,
    UsedByOthers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


def reason_of(error: OSError) -> str:
    """The operating system's words for an error."""
    return error.strerror or str(error)


class ImageMissing(ImageUnavailable, Refused):
    """No file has the image's name."""

    code: ClassVar[str] = "image-missing"
    template: ClassVar[str] = "{image}: no such file"
    hint: ClassVar[str] = (
        "check the name; if the image's storage is not mounted, mount it first; --activate "
        "activates a logical volume that is not active"
    )
    explanation: ClassVar[str] = (
        "The name was given on the command line, or another image names it as its backing file, "
        "and nothing is found there: the file does not exist, a symbolic link leads nowhere, or a "
        "directory on the way is missing. Relative names of backing files are resolved against the "
        "directory of the image that names them."
    )
    image: str


class WrongFileType(ImageUnavailable, Refused):
    """The name is that of something that cannot hold an image."""

    code: ClassVar[str] = "wrong-file-type"
    template: ClassVar[str] = "{image}: is {file_type}, not a regular file or a block device"
    hint: ClassVar[str] = "give the name of the image itself"
    explanation: ClassVar[str] = (
        "Images are regular files or block devices. Directories, pipes, sockets and character "
        "devices are not opened at all: that could block forever, or trigger whatever the device "
        "does when it is opened."
    )
    image: str
    file_type: str


class AccessDenied(ImageUnavailable, Refused):
    """The operating system does not allow us to open the image."""

    code: ClassVar[str] = "access-denied"
    template: ClassVar[str] = "{image}: no permission to open it for {access}"
    hint: ClassVar[str] = (
        "run the command as the owner of the image, or as root; on network storage, check what the "
        "server allows"
    )
    explanation: ClassVar[str] = (
        "The permissions of the file, or of a directory on the way to it, do not allow what is "
        "needed. Read permission is enough to look at an image; a merge into it needs write "
        "permission too."
    )
    image: str
    access: str


class ImageReadOnly(ImageUnavailable, Refused):
    """The image cannot be written because what it lies on is read-only."""

    code: ClassVar[str] = "image-read-only"
    template: ClassVar[str] = "{image}: cannot be written: {reason}"
    hint: ClassVar[str] = (
        "find out why: it may be shared, or protected on purpose; if the image is meant to be "
        "changed, make it writable again where it was made read-only (a logical volume: 'lvchange "
        "-prw VG/LV'; a file: 'chattr -i'; or remount the file system)"
    )
    explanation: ClassVar[str] = (
        "This operation must write to the image, but its file system is mounted read-only, its "
        "block device is set read-only, or the file is marked immutable."
    )
    image: str
    reason: str


class CannotOpen(ImageUnavailable, Refused):
    """The operating system refuses to open the image for a reason of its own."""

    code: ClassVar[str] = "cannot-open"
    template: ClassVar[str] = "{image}: cannot be opened for {access}: {reason}"
    hint: ClassVar[str] = "fix the cause that the message names, then run the command again"
    explanation: ClassVar[str] = (
        "Opening the file failed with the operating system's error that the message quotes: a "
        "loop of symbolic links, a name that is too long or not valid, a device that is busy or "
        "gone, a limit on open files, and the like."
    )
    image: str
    access: str
    reason: str


class ImageLocked(UsedByOthers, Refused):
    """Another process has the image open in a way that excludes ours."""

    code: ClassVar[str] = "image-locked"
    template: ClassVar[str] = "{image}: is in use by {holder}"
    hint: ClassVar[str] = (
        "wait until nothing uses the image any more (--lock-wait SECONDS), or shut the virtual "
        "machine down properly (`chainmerge live merge` merges while it runs); do not kill a "
        "program that may be writing to the image"
    )
    explanation: ClassVar[str] = (
        "QEMU locks the images it has open (open file description locks on single bytes of the "
        "file), and chainmerge takes the same locks. A process that reads the image excludes "
        "writers; one that writes excludes everybody. The holder is found by looking through /proc "
        "for a process that has such a lock; one in another container, on another host, or of "
        "another user may not be visible and is then called 'another process'. Never remove a lock "
        "by force: two writers destroy an image."
    )
    image: str
    holder: str


class ImageInUse(UsedByOthers, Refused):
    """Something uses the image that QEMU's locks do not keep out."""

    code: ClassVar[str] = "image-in-use"
    template: ClassVar[str] = "{image}: is in use, without a lock that would show it, by {users}"
    hint: ClassVar[str] = (
        "end what uses the image: shut the program or the virtual machine down, unmount what is "
        "mounted, detach the device with the tool that set it up; make sure that nothing it wrote "
        "is missing, then run the command again"
    )
    explanation: ClassVar[str] = (
        "QEMU's locks apply to one name of an image, and bind only programs that ask for them. A "
        "loop device over a file, the file below a loop device, another node of the same block "
        "device, a file system that is mounted, a device-mapper device and a program that is not "
        "QEMU's are not kept out by them. Two writers at the same time destroy an image, and a "
        "reader gets garbage while data moves. Such users are found through the open files of all "
        "processes (/proc/*/fd, as far as permissions allow), through /sys/block, and by opening "
        "the device exclusively. Nothing was changed."
    )
    image: str
    users: str


class LocksUnsupported(Refused):
    """The image cannot be locked where it lies."""

    code: ClassVar[str] = "locks-unsupported"
    template: ClassVar[str] = "{image}: cannot be locked: {reason}"
    hint: ClassVar[str] = (
        "enable locking where the image is stored (on NFS: the lock service of client and "
        "server, or version 4), or move the image to a file system that supports it"
    )
    explanation: ClassVar[str] = (
        "Without locks nothing would stop a virtual machine from starting on an image in the "
        "middle of a merge, or the merge from starting on the image of a running machine. The "
        "file system does not support open file description locks, or its lock service does not "
        "answer, so the image is not touched."
    )
    image: str
    reason: str


class OpenFilesLimited(Refused):
    """The process may not have as many files open as the chain has images."""

    code: ClassVar[str] = "open-files-limit"
    template: ClassVar[str] = (
        "{needed} files must be open at the same time, but the hard limit of this process is "
        "{limit}"
    )
    hint: ClassVar[str] = (
        "run `ulimit -n {needed}` in the shell first (as root, since it is above the hard limit); "
        "for a systemd service set LimitNOFILE={needed}"
    )
    explanation: ClassVar[str] = (
        "A lock on an image lives as long as the file is open, so a chain takes one open file for "
        "each image, and the QEMU process that copies data opens every image once more. The "
        "operating system limits the number of open files of a process. The soft limit (often "
        "1024) is raised if it is not enough, but no further than the hard limit, which only root "
        "can raise. It is inherited: what counts is the limit of the shell, service or container "
        "in which chainmerge is started."
    )
    needed: int
    limit: int


class ReadFailed(StorageFailed, Failed):
    """The storage could not be read."""

    code: ClassVar[str] = "read-failed"
    template: ClassVar[str] = "{image}: reading {length} bytes at offset {offset} failed: {reason}"
    hint: ClassVar[str] = (
        "look for storage errors in the kernel log ('dmesg'); run the same command again once the "
        "image can be read"
    )
    explanation: ClassVar[str] = (
        "The operating system reported an error while the image was read. This is nearly always a "
        "fault of the storage (a failing disk, a lost network connection), not of the image. "
        "Reading changes nothing; what was done before is safe, and a rerun continues from there."
    )
    image: str
    offset: int
    length: int
    reason: str


class WriteFailed(StorageFailed, Failed):
    """The storage could not be written."""

    code: ClassVar[str] = "write-failed"
    template: ClassVar[str] = "{image}: writing {length} bytes at offset {offset} failed: {reason}"
    hint: ClassVar[str] = (
        "look for storage errors in the kernel log ('dmesg'), fix the storage, then run the same "
        "command again"
    )
    explanation: ClassVar[str] = (
        "The operating system reported an error while the image was written. Some of the bytes may "
        "have reached the storage. Writes go to parts of the image that nothing refers to yet, so "
        "its content is still the old one; a rerun starts from there."
    )
    image: str
    offset: int
    length: int
    reason: str


class NoSpaceLeft(NoSpace, Failed):
    """The storage became full during a write."""

    code: ClassVar[str] = "no-space-left"
    template: ClassVar[str] = (
        "{image}: no space left for {length} bytes at offset {offset}: {reason}"
    )
    hint: ClassVar[str] = (
        "make room on the file system, or enlarge the device or the quota, then run the same "
        "command again"
    )
    explanation: ClassVar[str] = (
        "The file system, the quota or the device under the image was full. The space for a merge "
        "is reserved before it starts, so this happens only where space cannot be reserved (a file "
        "system without that function, thin provisioning) and something else took it. The image's "
        "content is still the old one; a rerun starts from there."
    )
    image: str
    offset: int
    length: int
    reason: str


class FlushFailed(StorageFailed, Failed):
    """What was written may not have reached the storage."""

    code: ClassVar[str] = "flush-failed"
    template: ClassVar[str] = "{image}: written data could not be made durable: {reason}"
    hint: ClassVar[str] = (
        "look for storage errors in the kernel log ('dmesg') and fix the storage; check the image "
        "('chainmerge check {image}') before running the same command again"
    )
    explanation: ClassVar[str] = (
        "The operating system could not write cached data to the storage. It reports such an error "
        "once and then forgets it: a second attempt would succeed although the data is gone (Linux "
        "marks the pages clean). So the first failure is final, and nothing that relies on the "
        "lost writes is written afterwards."
    )
    image: str
    reason: str


class ReadBackDiffers(NotVerified, Failed):
    """The storage took a write, reported it as durable, and holds something else."""

    code: ClassVar[str] = "read-back-differs"
    template: ClassVar[str] = (
        "{image}: within the {length} bytes at offset {offset}, the data read back is not the data "
        "that was written"
    )
    hint: ClassVar[str] = (
        "do not trust this storage: look into the kernel log ('dmesg'), test its disks, memory and "
        "controller, and run the same command again only on sound storage"
    )
    explanation: ClassVar[str] = (
        "While guest data is copied, chainmerge takes a checksum of every piece. Once the storage "
        "has reported the copy as durable, the pieces are read back from it, bypassing the page "
        "cache, and one of them had another checksum. Either the storage (or the memory of this "
        "machine) corrupts data, or another program writes to the image. Nothing refers to the "
        "copied data yet: base's content is still the old one, and the overlay is untouched."
    )
    image: str
    offset: int
    length: int


class SystemCallFailed(StorageFailed, Failed):
    """The operating system refused an ordinary request."""

    code: ClassVar[str] = "system-call-failed"
    template: ClassVar[str] = "{file}: the operating system reports: {reason}"
    hint: ClassVar[str] = (
        "fix the cause (the kernel log, 'dmesg', shows storage faults), then run the same command "
        "again: it finds out how far this run got"
    )
    explanation: ClassVar[str] = (
        "Reading a file's properties, renaming it, removing it or the like failed with the "
        "operating system's error that the message quotes. Every change to images takes effect in "
        "one atomic step, and nothing is removed before all that depends on it is done, so images "
        "and checkpoints are intact. 'chainmerge status' shows an unfinished merge."
    )
    file: str
    reason: str


class OutOfMemory(Failed):
    """There is not enough memory."""

    code: ClassVar[str] = "out-of-memory"
    template: ClassVar[str] = "not enough memory to go on"
    hint: ClassVar[str] = (
        "raise the limit under which the command runs ('ulimit -v', the container's, the "
        "service's MemoryMax), or free memory, then run the same command again"
    )
    explanation: ClassVar[str] = (
        "Image tables are read in pieces, so the memory needed depends little on their size; a few "
        "hundred MiB are enough. The operating system did not give that much. Every change to "
        "images takes effect in one atomic step, so images and checkpoints are intact."
    )


@contextlib.contextmanager
def system_errors_as_ours() -> Iterator[None]:
    """Raise SystemCallFailed and OutOfMemory for what the operating system reports."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise OutOfMemory from error
        name = error.filename
        file = os.fsdecode(name) if isinstance(name, str | bytes) else "a file"
        raise SystemCallFailed(file, reason_of(error)) from error
    except MemoryError as error:
        raise OutOfMemory from error
