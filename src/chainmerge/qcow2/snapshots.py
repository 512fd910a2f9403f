# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots: the table that lists them (specification, "Snapshots")."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chainmerge.qcow2.table_errors import BadSnapshotTable

if TYPE_CHECKING:
    from chainmerge.qcow2.image import Qcow2Image

#: QEMU's limits (block/qcow2.h, 7.2): QCOW_MAX_SNAPSHOTS_SIZE, QCOW_MAX_SNAPSHOT_EXTRA_DATA.
MAX_TABLE_BYTES = 1024 * 65536
MAX_EXTRA_BYTES = 1024

_ENTRY = struct.Struct(">QIHHIIQII")
_VM_STATE_SIZE = struct.Struct(">Q")
_DISK_SIZE = struct.Struct(">8xQ")


@dataclass(frozen=True, slots=True)
class Snapshot:
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


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """All internal snapshots, and how much of the file lists them."""

    snapshots: tuple[Snapshot, ...]
    size: int
    """Bytes from the header's ``snapshots_offset``."""


def read_snapshots(image: Qcow2Image) -> tuple[Snapshot, ...]:
    """The image's internal snapshots.

    Raises:
        BadSnapshotTable: the table is larger than QEMU allows, or passes the end of the file.
    """
    return read_snapshot_table(image).snapshots


def read_snapshot_table(image: Qcow2Image) -> SnapshotTable:
    """The snapshot table; at most 65,536 entries (checked with the header) in 64 MiB.

    Raises:
        BadSnapshotTable: the table is larger than QEMU allows, or passes the end of the file.
    """
    header = image.header
    snapshots = []
    size = 0
    for index in range(header.snapshot_count):
        # Entries start at multiples of 8 bytes; the last one is not padded.
        start = -(-size // 8) * 8
        snapshot, length = _read_entry(image, index, header.snapshots_offset + start)
        size = start + length
        if size > MAX_TABLE_BYTES:
            problem = f"it passes the {MAX_TABLE_BYTES} bytes that a snapshot table may have"
            raise BadSnapshotTable(image.name, index, problem)
        snapshots.append(snapshot)
    return SnapshotTable(tuple(snapshots), size)


def _read_entry(image: Qcow2Image, index: int, offset: int) -> tuple[Snapshot, int]:
    """A snapshot and the length of its entry in bytes, without padding."""
    readable = image.readable
    fixed = readable.read(offset, _ENTRY.size)
    l1_offset, l1_size, id_size, name_size, _, _, _, vm_state_size, extra_size = _ENTRY.unpack(
        fixed
    )
    if extra_size > MAX_EXTRA_BYTES:
        problem = f"{extra_size} bytes of extra data, more than {MAX_EXTRA_BYTES}"
        raise BadSnapshotTable(image.name, index, problem)
    length = _ENTRY.size + extra_size + id_size + name_size
    if offset + length > readable.size:
        raise BadSnapshotTable(image.name, index, "it passes the end of the file")
    rest = readable.read(offset + _ENTRY.size, length - _ENTRY.size)
    extra, names = rest[:extra_size], rest[extra_size:]
    disk_size = image.header.virtual_size
    if extra_size >= _VM_STATE_SIZE.size:
        (vm_state_size,) = _VM_STATE_SIZE.unpack_from(extra)
    if extra_size >= _DISK_SIZE.size:
        (disk_size,) = _DISK_SIZE.unpack_from(extra)
    snapshot = Snapshot(
        l1_offset=l1_offset,
        l1_size=l1_size,
        id=names[:id_size].decode("utf-8", "surrogateescape"),
        name=names[id_size:].decode("utf-8", "surrogateescape"),
        disk_size=disk_size,
        vm_state_size=vm_state_size,
        extra_size=extra_size,
    )
    return snapshot, length
