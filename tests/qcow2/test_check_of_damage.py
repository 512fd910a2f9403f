# SPDX-License-Identifier: Apache-2.0
"""The check of damaged images agrees with QEMU's."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainmerge.qcow2.check import CheckReport, check, check_with_references, computed_refcounts
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.mapping import COMPRESSED, COPIED, OFFSET_MASK
from chainmerge.qcow2.refcounts import read_refcount_table, refcounts_per_block
from tests.qcow2.samples import BUILDERS, Sample, assert_agrees, verdict_of_qemu
from tests.support import qemu
from tests.support.images import (
    KIB,
    MIB,
    Write,
    apply_writes,
    open_qcow2,
)

if TYPE_CHECKING:
    from pathlib import Path


BITMAPS_EXTENSION = 0x23852875
AUTOCLEAR_OFFSET = 88


def clusters_of(report: CheckReport) -> list[int]:
    """The leaked clusters, one by one."""
    ranges = zip(report.leaked.start.tolist(), report.leaked.length.tolist(), strict=True)
    return [cluster for first, count in ranges for cluster in range(first, first + count)]


def damaged_entry(data: st.DataObject, sample: Sample, entry: int) -> int:
    """Another value for an 8-byte entry, near the truth: random bytes rarely get far."""
    clusters = sample.size // sample.cluster_size
    place = sample.cluster_size * data.draw(st.integers(0, clusters + 2))
    flags = entry & ~OFFSET_MASK
    return data.draw(
        st.sampled_from(
            [
                0,
                entry ^ COPIED,
                entry ^ 1 << data.draw(st.integers(0, 63)),
                flags | place,
                flags | place + 512,
                place,
                place | COPIED,
                place | COPIED >> 1,
                flags | 1 << 50,
                (entry + sample.cluster_size) % (1 << 64),
            ]
        )
    )


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=3 * settings().max_examples)
@given(data=st.data())
def test_a_damaged_entry(samples: dict[str, Sample], name: str, data: st.DataObject) -> None:
    sample = samples[name]
    kind = data.draw(st.sampled_from(sorted(sample.tables)))
    offset, size = data.draw(st.sampled_from(sample.tables[kind]))
    content = sample.path.read_bytes()[offset : offset + size]
    in_use = [at for at in range(0, size - 7, 8) if any(content[at : at + 8])]
    # Mostly entries that say something; one that is 0 now may be made to.
    anywhere = not in_use or data.draw(st.integers(0, 3)) == 0
    places = list(range(0, size - 7, 8)) if anywhere else in_use
    at = data.draw(st.sampled_from(places))
    (entry,) = struct.unpack_from(">Q", content, at)
    changed = damaged_entry(data, sample, entry)
    assert_agrees(sample.damaged(offset + at, changed.to_bytes(8, "big")))


@pytest.mark.parametrize("name", BUILDERS)
@given(data=st.data(), noise=st.binary(min_size=1, max_size=40))
def test_damaged_bytes(
    samples: dict[str, Sample], name: str, data: st.DataObject, noise: bytes
) -> None:
    sample = samples[name]
    kind = data.draw(st.sampled_from(sorted(sample.tables)))
    offset, size = data.draw(st.sampled_from(sample.tables[kind]))
    at = data.draw(st.integers(0, max(0, size - len(noise))))
    assert_agrees(sample.damaged(offset + at, noise[:size]))


@pytest.mark.parametrize("name", BUILDERS)
@given(data=st.data())
def test_truncated_files(samples: dict[str, Sample], name: str, data: st.DataObject) -> None:
    sample = samples[name]
    length = data.draw(st.integers(sample.cluster_size, sample.size))
    path = sample.damaged(0, b"")
    with path.open("r+b") as file:
        file.truncate(length)
    theirs = verdict_of_qemu(path)
    try:
        ours = check(open_qcow2(path))
    except FormatError:
        return
    # QEMU takes what is missing of a file's last cluster for zeros; we do not in bitmaps.
    if theirs is None or theirs.corruptions or not ours.complete:
        assert ours.corruptions
    else:
        assert (ours.corruptions, ours.leaks) == (0, theirs.leaks), ours.messages


@pytest.mark.parametrize("name", ["small", "extended", "one-bit", "wide", "split"])
def test_bitmaps_without_their_autoclear_bit_are_leaks(
    samples: dict[str, Sample], name: str
) -> None:
    path = samples[name].damaged(AUTOCLEAR_OFFSET, bytes(8))
    assert_agrees(path)
    report = check(open_qcow2(path))
    assert report.only_leaks
    assert any("bitmaps are void" in message for message in report.messages)
    image = open_qcow2(path)
    directory = image.header.bitmaps
    assert directory is not None
    assert directory.directory_offset // image.header.cluster_size in clusters_of(report)


def test_a_dropped_bitmaps_extension_leaks(samples: dict[str, Sample]) -> None:
    sample = samples["small"]
    header = sample.path.read_bytes()[: sample.cluster_size]
    at = header.index(BITMAPS_EXTENSION.to_bytes(4, "big"))
    path = sample.damaged(at, bytes(4))
    assert_agrees(path)
    report = check(open_qcow2(path))
    assert report.only_leaks
    # Directory, two tables, and the clusters with bits: of a 4 KiB cluster's 32768 bits few.
    assert report.leaks == 5


def put_refcount(path: Path, cluster: int, refcount: int) -> None:
    """Set a 16-bit refcount."""
    image = open_qcow2(path)
    assert image.header.refcount_bits == 16
    index, within = divmod(cluster, refcounts_per_block(image.header))
    block = int(read_refcount_table(image)[index])
    assert block
    with path.open("r+b") as file:
        file.seek(block + 2 * within)
        file.write(refcount.to_bytes(2, "big"))


@pytest.mark.parametrize(
    ("kind", "flags", "subclusters"),
    [
        ("data", 0, 0x0000_0003_FFFF_FFFF),
        ("none", 0, 0x0000_0000_0000_0001),
        ("none", 0, 0xFFFF_0000_0000_0000),
        ("compressed", 0, 0x0000_0001_0000_0000),
        ("compressed", COPIED, 0),
        ("data", 1, 0x0000_0000_FFFF_FFFF),
        ("data", 2, 0x0000_0000_FFFF_FFFF),
    ],
)
def test_contradictions_in_extended_entries(
    samples: dict[str, Sample], kind: str, flags: int, subclusters: int
) -> None:
    sample = samples["extended"]
    image = open_qcow2(sample.path)
    for table, size in sample.tables["L2"]:
        for at, (entry, _) in enumerate(
            struct.iter_unpack(">QQ", image.readable.read(table, size))
        ):
            is_kind = {
                "data": entry & OFFSET_MASK and not entry & COMPRESSED,
                "none": not entry,
                "compressed": entry & COMPRESSED,
            }[kind]
            if is_kind:
                changed = struct.pack(">QQ", entry | flags, subclusters)
                assert_agrees(sample.damaged(table + 16 * at, changed))
                break


def test_leaked_clusters_are_named(samples: dict[str, Sample]) -> None:
    sample = samples["small"]
    path = sample.damaged(0, b"")
    used = int(np.flatnonzero(computed_refcounts(open_qcow2(path)).counts == 1)[-1])
    end = -(-sample.size // sample.cluster_size)
    leaked = [used, end, end + 1, end + 2, end + 5]
    with path.open("r+b") as file:
        file.truncate((end + 10) * sample.cluster_size)
    for cluster in leaked:
        put_refcount(path, cluster, 3)
    assert_agrees(path)
    report, references = check_with_references(open_qcow2(path))
    assert report.only_leaks
    assert report.leaks == 5
    assert clusters_of(report) == leaked
    assert references.of(end, 6).tolist() == [0] * 6
    assert references.of(used, 1).tolist() == [1]
    # A cluster too low is a corruption, and the leaks are named all the same.
    put_refcount(path, used, 0)
    assert_agrees(path)
    report = check(open_qcow2(path))
    assert not report.sound
    assert clusters_of(report) == leaked[1:]


def point_at(path: Path, offset: int) -> None:
    """Let guest cluster 1 be at a file offset, where something else is; its refcount knows."""
    image = open_qcow2(path)
    with path.open("r+b") as file:
        file.seek((int(image.l1[0]) & OFFSET_MASK) + 8)
        file.write(offset.to_bytes(8, "big"))
    assert_agrees(path)
    assert not check(open_qcow2(path)).sound
    put_refcount(path, offset // image.header.cluster_size, 2)


@pytest.mark.parametrize("place", ["header", "L1 table", "L2 table", "refcount table"])
def test_metadata_that_is_shared_by_agreement_is_an_overlap(tmp_path: Path, place: str) -> None:
    path = qemu.create(tmp_path / "image", 64 * MIB)
    apply_writes(path, [Write(0, 64 * KIB)])
    image = open_qcow2(path)
    l2_table = int(image.l1[0]) & OFFSET_MASK
    places = {
        # An entry with offset 0 is not allocated, so the header is hit from the side.
        "header": 0x200,
        "L1 table": image.header.l1_table_offset,
        "L2 table": l2_table,
        "refcount table": image.header.refcount_table_offset,
    }
    point_at(path, places[place])
    if place == "L2 table":
        # The L1 entry's COPIED flag goes with the refcount.
        with path.open("r+b") as file:
            file.seek(image.header.l1_table_offset)
            file.write(l2_table.to_bytes(8, "big"))
    # With the refcount right, QEMU finds nothing wrong with guest data in a table.
    report = check(open_qcow2(path))
    assert_agrees(path)
    if place == "header":
        assert report.corruptions
    else:
        qemu.assert_clean(path)
        assert (report.corruptions, report.leaks) == (0, 0)
    assert report.overlaps
    assert not report.sound
    assert not report.clean
    assert any("in clusters of metadata" in message for message in report.messages)


def test_a_refcount_block_is_never_shared(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", 64 * MIB)
    apply_writes(path, [Write(0, 64 * KIB)])
    point_at(path, int(read_refcount_table(open_qcow2(path))[0]))
    assert_agrees(path)
    report = check(open_qcow2(path))
    assert (report.corruptions, report.leaks, report.overlaps) == (1, 0, 1)
    # Nor does it describe two ranges of clusters.
    other = qemu.create(tmp_path / "other", 64 * MIB)
    table = open_qcow2(other).header.refcount_table_offset
    with other.open("r+b") as file:
        file.seek(table)
        block = file.read(8)
        file.write(block)
    assert_agrees(other)
    put_refcount(other, int.from_bytes(block, "big") // (64 * KIB), 2)
    assert_agrees(other)
    report = check(open_qcow2(other))
    assert report.corruptions
    assert report.overlaps


def test_clusters_shared_by_agreement_are_sound(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", 64 * MIB)
    apply_writes(path, [Write(0, 64 * KIB)])
    image = open_qcow2(path)
    table = int(image.l1[0]) & OFFSET_MASK
    (entry,) = struct.unpack(">Q", image.readable.read(table, 8))
    with path.open("r+b") as file:
        file.seek(table)
        file.write(2 * (entry & OFFSET_MASK).to_bytes(8, "big"))
    put_refcount(path, (entry & OFFSET_MASK) // image.header.cluster_size, 2)
    qemu.assert_clean(path)
    assert check(open_qcow2(path)).clean


def test_copied_flags_are_counted(samples: dict[str, Sample]) -> None:
    sample = samples["wide"]
    image = open_qcow2(sample.path)
    offset, _ = sample.tables["L1"][0]
    entries = image.readable.read(offset, image.header.l1_size * 8)
    flipped = b"".join(
        (entry ^ COPIED if entry else 0).to_bytes(8, "big")
        for (entry,) in struct.iter_unpack(">Q", entries)
    )
    path = sample.damaged(offset, flipped)
    report = check(open_qcow2(path))
    verdict = verdict_of_qemu(path)
    assert verdict is not None
    present = sum(entry != 0 for (entry,) in struct.iter_unpack(">Q", entries))
    assert report.copied_mismatches == report.corruptions == verdict.corruptions == present
