# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots: the table that lists them (specification, "Snapshots"), and their disks."""

from __future__ import annotations

import struct

from msgspec import Struct

from chainmerge.arithmetic.rounding import round_up
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import Overlaid
from chainmerge.qcow2.table_errors import BadSnapshotTable

#: QEMU's limits (block/qcow2.h, 7.2): QCOW_MAX_SNAPSHOTS_SIZE, QCOW_MAX_SNAPSHOT_EXTRA_DATA.
MAX_TABLE_BYTES = 1024 * 65536
MAX_EXTRA_BYTES = 1024

_ENTRY = struct.Struct(">QIHHIIQII")
_VM_STATE_SIZE = struct.Struct(">Q")
_DISK_SIZE = struct.Struct(">8xQ")
# Header fields: the disk's size, the encryption method, length and place of the active L1 table.
_DISK_FIELDS_AT = 24
_DISK_FIELDS = struct.Struct(">QIIQ")


class Snapshot(Struct, frozen=True):
    """One internal snapshot."""

    l1_offset: int
    """File offset."""
    l1_size: int
    """Entries."""
    id: str
    name: str
    disk_size: int
    """Bytes of the guest's disk when the snapshot was taken."""
    vm_state_size: int
    """Bytes."""
    extra_size: int
    """Bytes of extra data that the entry has; version 3 wants 16 at least."""
    entry_offset: int
    """Bytes from the start of the table to the snapshot's entry."""
    entry_size: int
    """Bytes of the entry, without padding."""

    @property
    def label(self) -> str:
        """What people call it: its name, or its number if it has none."""
        return self.name or self.id


class SnapshotTable(Struct, frozen=True):
    """All internal snapshots, and how much of the file lists them."""

    snapshots: tuple[Snapshot, ...]
    size: int
    """Bytes from the header's ``snapshots_offset``."""


def read_snapshots(image: Qcow2Image) -> tuple[Snapshot, ...]:
    """The image's internal snapshots.

    Raises:
        BadSnapshotTable: the table is larger than QEMU allows, or reaches past the end of the file.
    """
    return read_snapshot_table(image).snapshots


def read_snapshot_table(image: Qcow2Image) -> SnapshotTable:
    """The snapshot table; at most 65,536 entries (checked with the header) in 64 MiB.

    Raises:
        BadSnapshotTable: the table is larger than QEMU allows, or reaches past the end of the file.
    """
    header = image.header
    snapshots = []
    size = 0
    for index in range(header.snapshot_count):
        # Entries start at multiples of 8 bytes; the last one is not padded.
        start = round_up(size, 8)
        snapshot = _read_entry(image, index, start)
        size = start + snapshot.entry_size
        if size > MAX_TABLE_BYTES:
            problem = (
                f"it is longer than the {MAX_TABLE_BYTES} bytes that a snapshot table may have"
            )
            raise BadSnapshotTable(image.name, index, problem)
        snapshots.append(snapshot)
    return SnapshotTable(tuple(snapshots), size)


def image_of_snapshot(image: Qcow2Image, snapshot: Snapshot) -> Qcow2Image:
    """The image as it would be with a snapshot's disk for its own. Data is in the same file.

    As large as the larger of both disks, as far as the snapshot's L1 table reaches: QEMU (7.2,
    ``qcow2_snapshot_load_tmp``) shows snapshots with the size of the active disk, and reverts
    to them with their own.

    Raises:
        FormatError: the snapshot's L1 table is not one that QEMU would read.
    """
    header = image.header
    wanted = max(snapshot.disk_size, header.virtual_size)
    size = min(wanted, snapshot.l1_size * header.l2_entries * header.cluster_size)
    fields = _DISK_FIELDS.pack(size, header.crypt_method, snapshot.l1_size, snapshot.l1_offset)
    return Qcow2Image(Overlaid(image.readable, _DISK_FIELDS_AT, fields))


def _read_entry(image: Qcow2Image, index: int, start: int) -> Snapshot:
    readable, offset = image.readable, image.header.snapshots_offset + start
    fixed = readable.read(offset, _ENTRY.size)
    l1_offset, l1_size, id_size, name_size, _, _, _, vm_state_size, extra_size = _ENTRY.unpack(
        fixed
    )
    if extra_size > MAX_EXTRA_BYTES:
        problem = f"{extra_size} bytes of extra data, more than {MAX_EXTRA_BYTES}"
        raise BadSnapshotTable(image.name, index, problem)
    length = _ENTRY.size + extra_size + id_size + name_size
    if offset + length > readable.size:
        raise BadSnapshotTable(image.name, index, "it reaches past the end of the file")
    rest = readable.read(offset + _ENTRY.size, length - _ENTRY.size)
    extra, names = rest[:extra_size], rest[extra_size:]
    disk_size = image.header.virtual_size
    if extra_size >= _VM_STATE_SIZE.size:
        (vm_state_size,) = _VM_STATE_SIZE.unpack_from(extra)
    if extra_size >= _DISK_SIZE.size:
        (disk_size,) = _DISK_SIZE.unpack_from(extra)
    return Snapshot(
        l1_offset=l1_offset,
        l1_size=l1_size,
        id=names[:id_size].decode("utf-8", "surrogateescape"),
        name=names[id_size:].decode("utf-8", "surrogateescape"),
        disk_size=disk_size,
        vm_state_size=vm_state_size,
        extra_size=extra_size,
        entry_offset=start,
        entry_size=length,
    )
