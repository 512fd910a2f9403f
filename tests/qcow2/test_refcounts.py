# SPDX-License-Identifier: Apache-2.0
"""Stored refcounts of every width, against a scalar reading and against what QEMU maintains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import (
    read_refcount_table,
    read_refcounts,
    refcounts_per_block,
    unpack_refcounts,
)
from chainmerge.qcow2.snapshots import read_snapshots
from chainmerge.qcow2.table_errors import BadRefcountTable, BadSnapshotTable
from tests.support import qemu
from tests.support.images import GIB, KIB, MIB, TIB, Write, apply_writes, open_qcow2

if TYPE_CHECKING:
    from pathlib import Path

ORDERS = range(7)


def scalar_refcount(image: Qcow2Image, cluster: int) -> int:
    """One refcount, read bit by bit as the specification words it."""
    header = image.header
    entries = header.cluster_size * 8 // header.refcount_bits
    index, within = divmod(cluster, entries)
    if index >= header.refcount_table_clusters * header.cluster_size // 8:
        return 0
    entry = image.readable.read(header.refcount_table_offset + 8 * index, 8)
    block = int.from_bytes(entry, "big")
    if not block:
        return 0
    bit = within * header.refcount_bits
    if header.refcount_bits < 8:
        byte = image.readable.read(block + bit // 8, 1)[0]
        return byte >> bit % 8 & ((1 << header.refcount_bits) - 1)
    data = image.readable.read(block + bit // 8, header.refcount_bits // 8)
    return int.from_bytes(data, "big")


@given(st.data(), st.sampled_from(ORDERS))
def test_unpack(data: st.DataObject, order: int) -> None:
    bits = 1 << order
    per_byte = max(1, 8 // bits)
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=40))
    values += [0] * (-len(values) % per_byte)
    if bits >= 8:
        packed = b"".join(value.to_bytes(bits // 8, "big") for value in values)
    else:
        whole = sum(value << bits * at for at, value in enumerate(values))
        packed = whole.to_bytes(len(values) * bits // 8, "little")
    assert unpack_refcounts(packed, order).tolist() == values


@pytest.mark.parametrize("bits", [1 << order for order in ORDERS])
@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB])
def test_every_width(tmp_path: Path, bits: int, cluster_size: int) -> None:
    path = qemu.create(tmp_path / "i", 64 * MIB, cluster_size=cluster_size, refcount_bits=bits)
    apply_writes(path, [Write(0, 3 * MIB), Write(40 * MIB + 512, 700 * KIB)])
    if bits > 1:
        # Refcounts of 2 and 3, as far as they go.
        for name in ("one", "two")[: bits - 1]:
            qemu.qemu_img("snapshot", "-c", name, path)
            apply_writes(path, [Write(1 * MIB, 64 * KIB)])
    image = open_qcow2(path)
    clusters = image.readable.size // cluster_size + 5
    expected = [scalar_refcount(image, cluster) for cluster in range(clusters)]
    assert max(expected) == min(3, 1 << bits - 1)
    stored = read_refcounts(image, 0, clusters)
    assert stored.dtype == np.uint64
    assert stored.tolist() == expected
    per_block = refcounts_per_block(image.header)
    for first, count in ((1, 1), (per_block - 1, 3), (clusters - 3, 2), (7, 0)):
        window = read_refcounts(image, first, count).tolist()
        assert window == (expected + [0] * per_block)[first : first + count]


def test_no_block_is_read_that_does_not_exist(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "i", TIB)
    image = open_qcow2(path)
    before = image.readable.bytes_read  # type: ignore[attr-defined]
    assert read_refcounts(image, 100_000, 1 << 20).sum() == 0
    # Behind what the refcount table itself can describe.
    assert read_refcounts(image, 1 << 50, 1000).sum() == 0
    read = image.readable.bytes_read - before  # type: ignore[attr-defined]
    assert read <= 40 * 8


def patched(path: Path, offset: int, data: bytes) -> Qcow2Image:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    return Qcow2Image(BytesReadable("patched", bytes(content)))


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (0x20001, "reserved bits"),
        (0x20200, "not aligned"),
        (1 << 40, "not within the file"),
        (0xFF << 56, "not within the file"),
    ],
)
def test_blocks_where_none_can_be_are_refused(tmp_path: Path, entry: int, problem: str) -> None:
    path = qemu.create(tmp_path / "i", GIB)
    healthy = open_qcow2(path)
    offset = healthy.header.refcount_table_offset
    image = patched(path, offset + 8, entry.to_bytes(8, "big"))
    per_block = refcounts_per_block(image.header)
    with pytest.raises(BadRefcountTable, match=problem) as caught:
        read_refcounts(image, per_block, 1)
    assert (caught.value.index, caught.value.entry) == (1, entry)
    assert caught.value.advice
    # Blocks that are not asked for are not judged.
    assert read_refcounts(image, 0, 4).tolist() == read_refcounts(healthy, 0, 4).tolist()
    assert int(read_refcount_table(image)[1]) == entry


def test_snapshots(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "i", 32 * MIB)
    apply_writes(path, [Write(0, MIB)])
    qemu.qemu_img("snapshot", "-c", "first", path)
    qemu.qemu_img("resize", path, str(48 * MIB))
    qemu.qemu_img("snapshot", "-c", "zwei ß", path)
    first, second = read_snapshots(open_qcow2(path))
    assert (first.id, first.name, first.disk_size) == ("1", "first", 32 * MIB)
    assert (second.id, second.name, second.disk_size) == ("2", "zwei ß", 48 * MIB)
    assert first.l1_offset % (64 * KIB) == 0 < first.l1_size
    assert (first.vm_state_size, first.extra_size) == (0, 24)


def test_damaged_snapshot_table(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "i", 32 * MIB)
    qemu.qemu_img("snapshot", "-c", "only", path)
    offset = open_qcow2(path).header.snapshots_offset
    with pytest.raises(BadSnapshotTable, match="extra data"):
        read_snapshots(patched(path, offset + 36, (1025).to_bytes(4, "big")))
    with pytest.raises(BadSnapshotTable, match="end of the file"):
        read_snapshots(patched(path, offset + 12, b"\xff\xff\xff\xff"))
