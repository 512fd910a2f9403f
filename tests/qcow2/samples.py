# SPDX-License-Identifier: Apache-2.0
"""Small images of each kind, and what QEMU's check says of one."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import asdict

from chainmerge.qcow2.bitmaps import read_directory
from chainmerge.qcow2.check import CheckReport, check, check_with_references
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.mapping import OFFSET_MASK
from chainmerge.qcow2.refcounts import read_refcount_table, read_refcounts
from chainmerge.qcow2.remembered import MappingMemory
from chainmerge.qcow2.snapshots import read_snapshots
from tests.support import qemu
from tests.support.images import (
    GIB,
    KIB,
    MIB,
    Operation,
    Write,
    WriteCompressed,
    WriteZeroes,
    apply_writes,
    open_qcow2,
)


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
        assert _numbers(ours) == _numbers(check_after_walk(path))
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
    assert ours.leaked.total == ours.leaks
    assert bool(ours.messages) == (not ours.clean) or not ours.complete


def check_after_walk(path: Path) -> CheckReport:
    """The check by what a walk through the image has read of its L2 tables."""
    image = open_qcow2(path)
    memory = MappingMemory()
    with contextlib.suppress(FormatError):
        list(memory.walk(image))
    return check(image, memory.take_tables(image))


def _numbers(report: CheckReport) -> dict[str, object]:
    """All but the words, which name examples."""
    leaked = (report.leaked.start.tolist(), report.leaked.length.tolist())
    return {**asdict(report), "messages": bool(report.messages), "leaked": leaked}


def assert_clean(path: Path) -> None:
    qemu.assert_clean(path)
    image = open_qcow2(path)
    report, references = check_with_references(image)
    assert report.clean, report.messages
    assert check_after_walk(path).clean
    assert not report.messages
    assert not len(report.leaked.start)
    verdict = verdict_of_qemu(path)
    assert verdict is not None
    assert report.image_end_offset == verdict.end
    clusters = len(references.counts)
    assert (references.of(0, clusters + 5) == read_refcounts(image, 0, clusters + 5)).all()


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
