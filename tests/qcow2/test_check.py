# SPDX-License-Identifier: Apache-2.0
"""Our consistency check against `qemu-img check`, on sound and on damaged images."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import tempfile
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainmerge.qcow2.bitmaps import read_directory
from chainmerge.qcow2.check import CheckReport, check, check_with_references, computed_refcounts
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import COMPRESSED, COPIED, OFFSET_MASK
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import read_refcount_table, read_refcounts, refcounts_per_block
from chainmerge.qcow2.references import MAX_CLUSTERS
from chainmerge.qcow2.snapshots import read_snapshots
from chainmerge.qcow2.table_errors import TooManyClusters
from tests.support import qemu
from tests.support.images import (
    GIB,
    KIB,
    MIB,
    Discard,
    ImagePlan,
    OpenImage,
    Operation,
    Write,
    WriteCompressed,
    WriteZeroes,
    apply_writes,
    build_chain,
    image_plans,
    open_qcow2,
    operations,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

BITMAPS_EXTENSION = 0x23852875
AUTOCLEAR_OFFSET = 88


@dataclass(frozen=True)
class Verdict:
    """What `qemu-img check` says of an image that it opens and can check to the end."""

    corruptions: int
    leaks: int
    end: int


def verdict_of_qemu(path: Path) -> Verdict | None:
    """The verdict, None if QEMU refuses to open the image or gives the check up."""
    argv = ["qemu-img", "check", "-f", "qcow2", "--output=json", "-U", str(path)]
    result = subprocess.run(argv, capture_output=True, check=False)
    if result.returncode == 1:
        return None
    assert result.returncode in (0, 2, 3), result
    report = json.loads(result.stdout)
    end = report["image-end-offset"]
    return Verdict(report.get("corruptions", 0), report.get("leaks", 0), end)


def assert_agrees(path: Path) -> None:
    """Our verdict is QEMU's; where QEMU has none, ours is bad."""
    theirs = verdict_of_qemu(path)
    try:
        ours = check(open_qcow2(path))
    except FormatError:
        assert theirs is None or theirs.corruptions
        return
    if theirs is None:
        assert ours.corruptions
        return
    assert bool(ours.corruptions) == bool(theirs.corruptions), ours.messages
    if ours.complete:
        assert (ours.leaks, ours.image_end_offset) == (theirs.leaks, theirs.end), ours.messages
    else:
        assert ours.corruptions
    assert ours.leaked.count.sum() == ours.leaks
    assert bool(ours.messages) == (not ours.clean) or not ours.complete


def assert_clean(path: Path) -> None:
    qemu.assert_clean(path)
    image = open_qcow2(path)
    report, references = check_with_references(image)
    assert report.clean, report.messages
    assert not report.messages
    assert not len(report.leaked)
    verdict = verdict_of_qemu(path)
    assert verdict is not None
    assert report.image_end_offset == verdict.end
    clusters = len(references.counts)
    assert (references.of(0, clusters + 5) == read_refcounts(image, 0, clusters + 5)).all()


def clusters_of(report: CheckReport) -> list[int]:
    """The leaked clusters, one by one."""
    ranges = zip(report.leaked.first.tolist(), report.leaked.count.tolist(), strict=True)
    return [cluster for first, count in ranges for cluster in range(first, first + count)]


# Sound images


@given(plan=image_plans(), data=st.data())
def test_sound_images(plan: ImagePlan, data: st.DataObject) -> None:
    assert plan.geometry is not None
    is_v3 = plan.geometry.compat == "1.1"
    with tempfile.TemporaryDirectory() as scratch:
        (path,) = build_chain(Path(scratch), [plan])
        if is_v3 and data.draw(st.booleans()):
            qemu.qemu_img("bitmap", "-f", "qcow2", "--add", path, "bits", "-g", "512")
        # Many compressed clusters share one of the file, and refcounts must have room for twice
        # as many references; QEMU refuses the snapshot otherwise.
        dense = any(isinstance(each, WriteCompressed) for each in plan.operations)
        if plan.geometry.refcount_bits >= (16 if dense else 4):
            for number in range(data.draw(st.integers(0, 2))):
                qemu.qemu_img("snapshot", "-c", f"s{number}", path)
                later = data.draw(operations(plan.geometry, plan.disk_size, max_size=3))
                plain = [each for each in later if not isinstance(each, WriteCompressed)]
                apply_writes(path, plain)
        assert_clean(path)


@pytest.mark.parametrize(
    "options",
    [
        {"preallocation": "metadata"},
        {"preallocation": "metadata", "extended_l2": "on"},
        {"data_file": "data"},
        {"data_file": "data", "extended_l2": "on"},
        {"data_file": "data", "data_file_raw": "on", "preallocation": "metadata"},
    ],
    ids=str,
)
def test_sound_images_of_other_kinds(tmp_path: Path, options: dict[str, str]) -> None:
    path = tmp_path / "image"
    given_options = ",".join(
        f"{key}={tmp_path / value if key == 'data_file' else value}"
        for key, value in options.items()
    )
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", given_options, path, str(GIB))
    apply_writes(
        path, [Write(0, MIB), WriteZeroes(512 * MIB, 10 * MIB), Discard(128 * KIB, 64 * KIB)]
    )
    assert_clean(path)


def create_encrypted(path: Path, *secret: str) -> None:
    """QEMU measures how fast it can derive keys, and on a busy machine it may fail to."""
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    argv = ["qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, str(path), "8M"]
    for _ in range(100):
        result = subprocess.run(argv, capture_output=True, text=True, check=False)
        if "Unable to get accurate CPU usage" not in result.stderr:
            break
    assert result.returncode == 0, result


def test_encrypted_images(tmp_path: Path) -> None:
    path = tmp_path / "image"
    secret = ["--object", "secret,id=key,data=letmein"]
    create_encrypted(path, *secret)
    image = open_qcow2(path)
    assert image.header.luks_header is not None
    report = check(image)
    assert report.clean, report.messages
    options = f"driver=qcow2,file.filename={path},encrypt.key-secret=key"
    out = qemu.qemu_img("check", *secret, "--image-opts", "--output=json", options)
    assert json.loads(out)["image-end-offset"] == report.image_end_offset


def test_a_large_image_takes_little_memory(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", 256 * GIB, preallocation="metadata")
    image = open_qcow2(path)
    tracemalloc.start()
    try:
        report = check(image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.clean
    # For each of 4 Mi clusters a count of two bytes and a byte of marks, and 20 MiB of windows.
    assert peak < 4 * MIB * 3 + 20 * MIB


# Damaged images


def build_small(path: Path) -> None:
    qemu.create(path, 3 * MIB, cluster_size=4 * KIB)
    compressed: list[Operation] = [
        WriteCompressed(4 * KIB * at, 4 * KIB, at % 5) for at in range(9)
    ]
    apply_writes(path, compressed)
    apply_writes(path, [Write(MIB, 100 * KIB), WriteZeroes(2 * MIB, 64 * KIB)])
    add_bitmaps(path)
    qemu.qemu_img("snapshot", "-c", "one", path)
    apply_writes(
        path, [Write(MIB + 8 * KIB, 50 * KIB), Write(5 * KIB, KIB), Write(3 * MIB - 512, 512)]
    )
    qemu.qemu_img("snapshot", "-c", "two", path)
    apply_writes(path, [Write(2 * MIB, 50 * KIB), WriteZeroes(MIB, 50 * KIB, unmap=True)])


def build_extended(path: Path) -> None:
    qemu.create(path, 40 * MIB, cluster_size=16 * KIB, extended_l2="on", compression_type="zstd")
    apply_writes(path, [WriteCompressed(4 * MIB, 64 * KIB), Write(20 * MIB, 100 * KIB)])
    apply_writes(path, [Write(MIB, 512), WriteZeroes(MIB + KIB, 2 * KIB), WriteZeroes(0, MIB)])
    add_bitmaps(path)
    qemu.qemu_img("snapshot", "-c", "one", path)
    apply_writes(path, [Write(20 * MIB, 3 * KIB), Write(5 * KIB, KIB)])


def build_one_bit(path: Path) -> None:
    qemu.create(path, 256 * KIB, cluster_size=512, refcount_bits=1)
    apply_writes(path, [Write(0, 40 * KIB), WriteZeroes(50 * KIB, 9 * KIB), Write(200 * KIB, 5120)])
    add_bitmaps(path)


def build_wide(path: Path) -> None:
    qemu.create(path, GIB, refcount_bits=64)
    apply_writes(path, [WriteCompressed(0, 128 * KIB), Write(600 * MIB, 3 * MIB)])
    add_bitmaps(path)
    qemu.qemu_img("snapshot", "-c", "one", path)
    apply_writes(path, [Write(601 * MIB, MIB)])


def build_old(path: Path) -> None:
    qemu.create(path, 3 * MIB, compat="0.10", cluster_size=1024)
    apply_writes(path, [WriteCompressed(0, 16 * KIB), Write(MIB, 100 * KIB)])
    qemu.qemu_img("snapshot", "-c", "one", path)
    apply_writes(path, [Write(MIB, 50 * KIB)])


def build_split(path: Path) -> None:
    qemu.create(path, 64 * MIB, data_file=str(path.with_suffix(".data")), data_file_raw="on")
    apply_writes(path, [Write(0, 100 * KIB), WriteZeroes(5 * MIB, 2 * MIB), Write(50 * MIB, MIB)])
    add_bitmaps(path)


def add_bitmaps(path: Path) -> None:
    for granularity in ("512", "65536"):
        qemu.qemu_img("bitmap", "-f", "qcow2", "--add", path, granularity, "-g", granularity)
        apply_writes(path, [Write(64 * KIB, 512)])
    qemu.qemu_img("bitmap", "-f", "qcow2", "--disable", path, "512")


BUILDERS = {
    "small": build_small,
    "extended": build_extended,
    "one-bit": build_one_bit,
    "wide": build_wide,
    "old": build_old,
    "split": build_split,
}


@dataclass(frozen=True)
class Sample:
    """A sound image, and where its tables are."""

    path: Path
    tables: dict[str, list[tuple[int, int]]]
    """By kind: (file offset, bytes)."""
    cluster_size: int
    size: int

    def damaged(self, offset: int, data: bytes) -> Path:
        """The image with *data* written over it; there is one at a time."""
        path = self.path.with_name("damaged.qcow2")
        shutil.copyfile(self.path, path)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        return path


def tables_of(path: Path) -> dict[str, list[tuple[int, int]]]:
    image = open_qcow2(path)
    header = image.header
    l1_tables = [(header.l1_table_offset, header.l1_size * 8)]
    l1_tables += [(each.l1_offset, each.l1_size * 8) for each in read_snapshots(image)]
    l2_offsets = {
        int(entry) & OFFSET_MASK
        for offset, size in l1_tables
        for entry in np.frombuffer(image.readable.read(offset, size), ">u8")
    }
    cluster = header.cluster_size
    tables = {
        "L1": l1_tables,
        "L2": [(offset, cluster) for offset in sorted(l2_offsets) if offset],
        "refcount table": [(header.refcount_table_offset, 64)],
        "refcount block": [(int(at), cluster) for at in read_refcount_table(image) if at],
    }
    if header.bitmaps is not None:
        tables["bitmap directory"] = [
            (header.bitmaps.directory_offset, header.bitmaps.directory_size)
        ]
        tables["bitmap table"] = [
            (entry.table_offset, entry.table_size * 8) for entry in read_directory(image)
        ]
    return tables


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Sample]]:
    made = {}
    for name, build in BUILDERS.items():
        path = tmp_path_factory.mktemp(name) / "image.qcow2"
        build(path)
        assert_clean(path)
        cluster_size = open_qcow2(path).header.cluster_size
        made[name] = Sample(path, tables_of(path), cluster_size, path.stat().st_size)
    yield made
    for sample in made.values():
        shutil.rmtree(sample.path.parent)


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


# Hostile images


@dataclass(frozen=True)
class Padded:
    """An image that goes on with zeros for very long, as a sparse file does."""

    name: str
    data: bytes
    size: int

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length].ljust(length, b"\0")


def test_files_that_claim_too_many_clusters_are_refused(samples: dict[str, Sample]) -> None:
    sample = samples["one-bit"]
    data = sample.path.read_bytes()
    with pytest.raises(TooManyClusters) as caught:
        check(Qcow2Image(Padded("huge", data, 1 << 60)))
    assert caught.value.clusters == 1 << 51
    # A file that is merely large for what is in it is none of that kind.
    largest = Padded("large", data, 512 * (MAX_CLUSTERS // 64))
    assert check(Qcow2Image(largest)).clean


def test_an_l2_table_that_is_used_a_thousand_times_is_read_once(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", 512 * GIB, refcount_bits=32)
    apply_writes(path, [Write(0, MIB)])
    image = open_qcow2(path)
    header = image.header
    with path.open("r+b") as file:
        file.seek(header.l1_table_offset)
        file.write(int(image.l1[0]).to_bytes(8, "big") * header.l1_size)
    readable = OpenImage(path)
    report = check(Qcow2Image(readable))
    assert_agrees(path)
    # 1024 references to a table with 16 entries, of which one is the right number each.
    assert report.corruptions == 1 + 16
    assert "used 1024 times" in report.messages[-1]
    # Header, L1 table, L2 table; refcount table and block, which the search for refcounts behind
    # the end of the file reads once more.
    assert readable.bytes_read < 10 * header.cluster_size


@given(noise=st.binary(min_size=64, max_size=64), repeat=st.integers(1, 64))
@settings(max_examples=4 * settings().max_examples)
def test_noise_in_tables_never_crashes(
    samples: dict[str, Sample], noise: bytes, repeat: int
) -> None:
    for sample in samples.values():
        content = bytearray(sample.path.read_bytes()) if sample.size < 2 * MIB else None
        if content is None:
            continue
        for places in sample.tables.values():
            offset, size = places[0]
            length = min(size, len(noise) * repeat)
            content[offset : offset + length] = (noise * repeat)[:length]
        try:
            report = check(Qcow2Image(BytesReadable("noise", bytes(content))))
        except FormatError:
            continue
        assert len(report.messages) <= 100
