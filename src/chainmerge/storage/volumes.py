# SPDX-License-Identifier: Apache-2.0
"""What an image lies on: a file, a block device of fixed size, or a logical volume.

A volume knows how large it is and may become; it is made to hold more before a merge and can
give space back after it. All sizes are in bytes. Objects keep nothing open: every question is
answered from the storage as it is then. Planning goes by a snapshot of the answers
(:mod:`chainmerge.storage.volume_facts`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.storage import allocation, block, lvm
from chainmerge.storage.errors import WriteFailed, reason_of
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.thin import extend_pool, pool_of
from chainmerge.storage.volume_errors import (
    CannotShrink,
    DiscardFailed,
    ExtensionRefused,
    FileSystemFull,
    LvmFailed,
    NotALogicalVolume,
)
from chainmerge.storage.volume_facts import VolumeFacts, VolumeKind

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.options import MergeOptions
    from chainmerge.storage.files import StrPath


class Volume(Protocol):
    """Storage that holds one image from its first byte on."""

    @property
    def path(self) -> str:
        """The name by which it is opened."""

    @property
    def kind(self) -> VolumeKind:
        """What it is."""

    @property
    def size(self) -> int:
        """Bytes that it has now."""

    def facts(self) -> VolumeFacts:
        """What planning needs to know of it.

        Raises:
            Refused, Failed: it cannot be looked at.
        """

    def grow_to(self, required: int) -> None:
        """Make it hold *required* bytes; nothing is done where it does already.

        A file keeps its size and gets the space reserved behind its end. After an error the
        volume has its old size, and nothing is reserved.

        Raises:
            CannotGrow: there is not enough space.
            ExtensionRefused: LVM did not extend it.
            Failed, OutcomeUnknown: the storage reported an error.
        """

    def make_growth_durable(self) -> None:
        """Return when what :meth:`grow_to` did will survive a power cut.

        Before that nothing may be written beyond the old end.

        Raises:
            Failed: it may not.
        """

    def release_reservation(self) -> None:
        """Give back what :meth:`grow_to` reserved and nobody has written to.

        Raises:
            Failed: the storage reported an error.
        """

    def shrink_to(self, size: int) -> None:
        """Make it as small as it can be while holding *size* bytes. What lies behind is lost.

        Raises:
            CannotShrink: such a volume cannot be made smaller.
            Failed, OutcomeUnknown: the storage reported an error.
        """

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, durably.

        Raises:
            Failed: the storage reported an error.
        """

    def discard(self, offset: int, length: int) -> None:
        """Give back the space of a range; what it reads as afterwards is open.

        Raises:
            DiscardFailed: it cannot.
        """


class FileVolume(Struct, frozen=True):
    """A regular file, which grows as it is written to.

    With *size_limit* it is treated as a volume that cannot become larger than that.
    """

    path: str
    size_limit: int | None = None

    @property
    def kind(self) -> VolumeKind:
        """What it is."""
        return VolumeKind.FILE

    @property
    def size(self) -> int:
        """Bytes that it has now."""
        return _size_of(self.path)

    def facts(self) -> VolumeFacts:
        """See :class:`Volume`."""
        with FileReadable(self.path) as file:
            pool = f"file system {file.identity[0]}"
            reserved = allocation.reserved_beyond_end(file.fd)
            room = _free_space(file.fd) + reserved
            return VolumeFacts(
                self.path, self.kind, file.size, self.size_limit, room, 1, pool, reserved
            )

    def grow_to(self, required: int) -> None:
        """See :class:`Volume`; where space cannot be reserved, it is only looked for.

        Such file systems (NFS before 4.2, for one) give no guarantee. On those that copy on
        write (Btrfs) what lies behind the end can be written for certain, but writing again
        to what lies before it takes new space.
        """
        with WritablePort(self.path) as port:
            if required <= port.size:
                return
            before = VolumeFacts(self.path, self.kind, port.size, self.size_limit, None, 1)
            _raise_if_refused(before, required)
            try:
                allocation.reserve(port.fd, port.size, required - port.size)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    _raise_if_refused(self.facts(), required)
                    return
                with contextlib.suppress(OSError):
                    allocation.release_beyond_end(port.fd)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise self._file_system_full(port, required) from error
                raise WriteFailed(
                    self.path, port.size, required - port.size, reason_of(error)
                ) from error

    def make_growth_durable(self) -> None:
        """See :class:`Volume`."""
        with WritablePort(self.path) as port:
            port.flush()

    def release_reservation(self) -> None:
        """See :class:`Volume`."""
        with WritablePort(self.path) as port:
            try:
                allocation.release_beyond_end(port.fd)
            except OSError as error:
                raise WriteFailed(self.path, port.size, 0, reason_of(error)) from error

    def shrink_to(self, size: int) -> None:
        """See :class:`Volume`; gives back a reservation too."""
        with WritablePort(self.path) as port:
            if size < port.size:
                port.truncate_to(size)
        self.release_reservation()

    def zero(self, offset: int, length: int) -> None:
        """See :class:`Volume`."""
        _zero(self.path, offset, length)

    def discard(self, offset: int, length: int) -> None:
        """See :class:`Volume`; it reads as zeros afterwards."""
        _discard(self.path, offset, length)

    def _file_system_full(self, port: WritablePort, required: int) -> FileSystemFull:
        wanted = required - port.size
        # The file system's own metadata can be what did not fit.
        missing = max(wanted - _room_to_grow(port.fd), 1)
        limit = self.size_limit
        return FileSystemFull(self.path, self.kind.value, port.size, required, limit, missing)


class BlockVolume(Struct, frozen=True):
    """A block device, whose size nobody changes."""

    path: str

    @property
    def kind(self) -> VolumeKind:
        """What it is."""
        return VolumeKind.BLOCK

    @property
    def size(self) -> int:
        """Bytes that it has now."""
        return _size_of(self.path)

    def facts(self) -> VolumeFacts:
        """See :class:`Volume`."""
        with FileReadable(self.path) as device:
            sector = block.logical_sector_size(device.fd)
            return VolumeFacts(self.path, self.kind, device.size, device.size, None, sector)

    def grow_to(self, required: int) -> None:
        """See :class:`Volume`; it holds *required* bytes or cannot."""
        _raise_if_refused(self.facts(), required)

    def make_growth_durable(self) -> None:
        """See :class:`Volume`; it never grows."""

    def release_reservation(self) -> None:
        """See :class:`Volume`; nothing is reserved."""

    def shrink_to(self, size: int) -> None:
        """See :class:`Volume`; it cannot."""
        device_size = self.size
        if size < device_size:
            raise CannotShrink(self.path, "the block device", device_size, "its size is fixed")

    def zero(self, offset: int, length: int) -> None:
        """See :class:`Volume`."""
        _zero(self.path, offset, length)

    def discard(self, offset: int, length: int) -> None:
        """See :class:`Volume`; whole sectors only."""
        _discard(self.path, offset, length)


class LvmVolume(Struct, frozen=True):
    """A logical volume.

    Attributes:
        path: the name by which it is opened.
        device: as the device mapper knows it; None for one that LVM is to know by *path*.
        extends_pool: whether the pool of a thin volume may be extended.
    """

    path: str
    device: lvm.DeviceMapperName | None = None
    extends_pool: bool = False

    @property
    def kind(self) -> VolumeKind:
        """What it is."""
        return VolumeKind.LVM

    @property
    def size(self) -> int:
        """Bytes that it has now."""
        return _size_of(self.path)

    def facts(self) -> VolumeFacts:
        """See :class:`Volume`."""
        return self._facts_from(self._reported())

    def size_after_shrinking(self, wanted: int) -> int:
        """The size that :meth:`shrink_to` makes it."""
        return self._reported().size_after_shrinking(wanted)

    def grow_to(self, required: int) -> None:
        """See :class:`Volume`."""
        known = self._reported()
        _raise_if_refused(self._facts_from(known), required)
        target = known.size_after_growth(required)
        if target == known.size:
            return
        try:
            lvm.extend(self.path, known, target)
        except LvmFailed as error:
            if self.size != known.size:
                raise
            raise ExtensionRefused(self.path, target, error.status, error.reason) from error
        if self._reported().size < required:
            raise LvmFailed(self.path, "lvm lvextend", 0, "the volume is not as large as requested")

    def make_growth_durable(self) -> None:
        """See :class:`Volume`."""
        lvm.make_metadata_durable(self.path, self._reported().vg_name)

    def release_reservation(self) -> None:
        """See :class:`Volume`; nothing is reserved beyond the volume's size."""

    def shrink_to(self, size: int) -> None:
        """See :class:`Volume`."""
        known = self._reported()
        target = known.size_after_shrinking(size)
        if target < known.size:
            lvm.reduce(self.path, known, target)

    def zero(self, offset: int, length: int) -> None:
        """See :class:`Volume`."""
        _zero(self.path, offset, length)

    def discard(self, offset: int, length: int) -> None:
        """See :class:`Volume`; whole sectors only."""
        _discard(self.path, offset, length)

    def extend_pool(self, allocates: int) -> None:
        """Extend the pool of a thin volume, durably, so that it can give *allocates* bytes.

        Raises:
            ExtensionRefused: LVM did not extend it.
            Failed, OutcomeUnknown: the storage reported an error.
        """
        known = self._reported()
        extend_pool(self.path, known, allocates)
        lvm.make_metadata_durable(self.path, known.vg_name)

    def _facts_from(self, known: lvm.LogicalVolume) -> VolumeFacts:
        thin = pool_of(self.path, known)
        pool = lvm.group_as_pool(known.vg_uuid) if thin is None else f"thin pool {thin.uuid}"
        return VolumeFacts(
            self.path,
            self.kind,
            known.size,
            # The size of a thin volume is but a number.
            known.largest_size if thin is None else None,
            None,
            known.growth_unit,
            pool,
            thin=thin,
            extends_pool=self.extends_pool,
            unit_cost=known.extent_size * known.stripes,
            fixed_type="" if known.is_extensible else known.segment_type,
        )

    def _reported(self) -> lvm.LogicalVolume:
        size = self.size
        if self.device is None:
            known = lvm.find_by_path(self.path, self.path)
        else:
            known = lvm.find_by_device(self.path, self.device)
        if known.size != size:
            reason = f"lvm reports {known.size} bytes, but it has {size}"
            raise NotALogicalVolume(self.path, reason)
        return known


def open_volume(path: StrPath, size_limit: int | None = None) -> Volume:
    """The volume with a name, whichever kind it is.

    Args:
        path: a regular file or a block device.
        size_limit: treat a regular file as a volume that cannot become larger than this.

    Raises:
        ImageMissing, WrongFileType, AccessDenied, CannotOpen: there is no such volume.
    """
    name = os.fspath(path)
    with FileReadable(name) as file:
        if not file.is_block_device:
            return FileVolume(name, size_limit)
        device = lvm.device_mapper_name(os.fstat(file.fd).st_rdev)
    return BlockVolume(name) if device is None else LvmVolume(name, device)


def open_lvm_volume(path: StrPath) -> LvmVolume:
    """The volume with a name, as LVM knows it by this name.

    Raises:
        ImageMissing, WrongFileType, AccessDenied, CannotOpen: there is no such volume.
        NotALogicalVolume, LvmMissing, LvmFailed: LVM does not know it.
    """
    volume = LvmVolume(os.fspath(path))
    volume.facts()
    return volume


def _size_of(path: str) -> int:
    with FileReadable(path) as file:
        return file.size


def _room_to_grow(fd: int) -> int:
    return _free_space(fd) + allocation.reserved_beyond_end(fd)


def _free_space(fd: int) -> int:
    status = os.fstatvfs(fd)
    return status.f_bavail * status.f_frsize


def _raise_if_refused(facts: VolumeFacts, required: int) -> None:
    refusal = facts.refusal(required)
    if refusal is not None:
        raise refusal


def _zero(path: str, offset: int, length: int) -> None:
    with WritablePort(path) as port:
        try:
            if port.is_block_device:
                block.zero_out(port.fd, offset, length)
            else:
                allocation.punch_hole(port.fd, offset, length)
        except OSError as error:
            raise WriteFailed(path, offset, length, reason_of(error)) from error
        port.flush()
        port.forget_cached()


def _discard(path: str, offset: int, length: int) -> None:
    with WritablePort(path) as port:
        try:
            if port.is_block_device:
                block.discard(port.fd, offset, length)
            else:
                allocation.punch_hole(port.fd, offset, length)
        except OSError as error:
            raise DiscardFailed(path, offset, length, reason_of(error)) from error


def volume_at(path: Path, options: MergeOptions) -> Volume:
    """What an image lies on, as the options say or as it looks."""
    match options.volume:
        case "lvm":
            return replace(open_lvm_volume(path), extends_pool=options.extend_pool)
        case "file":
            return FileVolume(str(path), options.size_limit)
        case _:
            volume = open_volume(path, options.size_limit)
            if isinstance(volume, LvmVolume):
                return replace(volume, extends_pool=options.extend_pool)
            return volume
