# SPDX-License-Identifier: Apache-2.0
"""Whenever the power goes: the old set of bitmaps or the new one, and never a corruption."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from chainmerge.engines.metadata.backing import change_backing
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.qcow2.bitmaps import BitmapFlag, read_bits, read_directory
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import read_refcounts
from tests.support import qemu
from tests.support.crash import (
    CrashState,
    Event,
    Flushed,
    RecordingPort,
    Written,
    crash_states,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
DISK = 3 * MIB
AUTO = BitmapFlag.AUTO
DISABLED = BitmapFlag(0)
# qemu-img is asked about one state in so many; our own check about every one.
QEMU_SAMPLE = 12

Bitmaps = dict[str, tuple[BitSet, BitmapFlag]]


def bitmap_set(seed: int, count: int, granularity: int = 512) -> list[StoredBitmap]:
    choice = random.Random(seed)
    bitmaps = []
    for number in range(count):
        starts = [choice.randrange(DISK // 4096) * 4096 for _ in range(number % 4)]
        ranges = [(start, min(choice.choice((512, 600 * KIB)), DISK - start)) for start in starts]
        bits = BitSet.from_ranges(ranges, DISK, granularity)
        bitmaps.append(StoredBitmap(f"{seed}.{number}", bits, DISABLED if number % 3 else AUTO))
    return bitmaps


def by_name(bitmaps: Sequence[StoredBitmap]) -> Bitmaps:
    return {bitmap.name: (bitmap.bits, bitmap.flags) for bitmap in bitmaps}


def trusted_bitmaps(content: bytes) -> Bitmaps:
    """What a reader finds that ignores bitmaps without the autoclear bit, as QEMU does."""
    image = Qcow2Image(BytesReadable("crashed", content))
    if not image.header.bitmaps_trusted:
        return {}
    return {entry.name: (read_bits(image, entry), entry.flags) for entry in read_directory(image)}


@dataclass(frozen=True)
class Scenario:
    """An image with an old set of bitmaps, and the set that shall replace it."""

    options: dict[str, Any]
    old: list[StoredBitmap]
    new: list[StoredBitmap]
    data: str = "write -q -P 1 512k 300k"
    spoil: Callable[[bytes], bytes] = bytes


def without_autoclear_bit(content: bytes) -> bytes:
    return content[:95] + b"\0" + content[96:]


def with_leaks(content: bytes, keep_free: int) -> bytes:
    """Free clusters marked used, but for every *keep_free*-th (0: for none).

    Only within what the refcount blocks, of 16-bit counts, describe; the file is as long.
    """
    image = Qcow2Image(BytesReadable("leaking", content))
    cluster_size = image.header.cluster_size
    leaking = bytearray(content)
    seen = described = 0
    for index, block in enumerate(refcount_blocks(image)):
        for at in range(block, block + cluster_size, 2) if block else ():
            described = (index + 1) * cluster_size // 2 * cluster_size
            if leaking[at : at + 2] == b"\0\0":
                seen += 1
                leaking[at + 1] = not keep_free or seen % keep_free != 0
    return bytes(leaking.ljust(described, b"\0"))


def with_exhausted_refcounts(content: bytes) -> bytes:
    return with_leaks(content, keep_free=0)


def with_scattered_free_clusters(content: bytes) -> bytes:
    return with_leaks(content, keep_free=2)


def refcount_blocks(image: Qcow2Image) -> list[int]:
    offset = image.header.refcount_table_offset
    table = image.readable.read(offset, image.header.cluster_size)
    return [int.from_bytes(table[at : at + 8], "big") for at in range(0, len(table), 8)]


# A directory entry of 1 KiB each.
LONG_NAMES = [
    StoredBitmap(f"{number} ".ljust(1000, "x"), BitSet.empty(DISK, MIB), AUTO)
    for number in range(70)
]

SCENARIOS = {
    "few for few": Scenario({"cluster_size": 65536}, bitmap_set(1, 2), bitmap_set(2, 3)),
    "first ones": Scenario({"cluster_size": 4096}, [], bitmap_set(3, 3)),
    "last ones": Scenario({"cluster_size": 4096}, bitmap_set(4, 3), []),
    "tombstones": Scenario(
        {"cluster_size": 4096},
        bitmap_set(5, 3),
        [StoredBitmap(f"5.{n}", BitSet.empty(DISK, 512), DISABLED) for n in range(3)],
    ),
    "smallest clusters": Scenario({"cluster_size": 512}, bitmap_set(6, 3), bitmap_set(7, 4)),
    "refcounts of 64 bits": Scenario(
        {"cluster_size": 512, "refcount_bits": 64}, bitmap_set(8, 3), bitmap_set(9, 4)
    ),
    "refcounts of 1 bit": Scenario(
        {"cluster_size": 512, "refcount_bits": 1}, bitmap_set(10, 3), bitmap_set(11, 8)
    ),
    "blocks that describe themselves": Scenario(
        {"cluster_size": 512}, [], bitmap_set(12, 4), spoil=with_exhausted_refcounts
    ),
    "blocks described by blocks that there are": Scenario(
        {"cluster_size": 512}, [], LONG_NAMES[:4], spoil=with_scattered_free_clusters
    ),
    "void bitmaps": Scenario(
        {"cluster_size": 4096}, bitmap_set(13, 3), bitmap_set(14, 3), spoil=without_autoclear_bit
    ),
    "a longer refcount table": Scenario(
        {"cluster_size": 512, "refcount_bits": 64},
        bitmap_set(15, 3),
        bitmap_set(16, 110),
        data="write -q -P 3 0 1880k",
    ),
    "pieces longer than a refcount block": Scenario(
        {"cluster_size": 512, "refcount_bits": 64}, [], LONG_NAMES
    ),
}


def built(path: Path, scenario: Scenario) -> bytes:
    """The image with its guest data and its old bitmaps."""
    qemu.create(path, DISK, **scenario.options)
    qemu.qemu_io(path, scenario.data, "write -q -P 2 2M 4k")
    port = RecordingPort(path.read_bytes())
    replace_bitmaps(port, scenario.old)
    return scenario.spoil(bytes(port.content))


def assert_sound(state: CrashState) -> None:
    report = check(Qcow2Image(BytesReadable("crashed", state.content)))
    assert report.sound, (state.label, report)


def names_in_qemu(path: Path, content: bytes) -> set[str]:
    path.write_bytes(content)
    assert qemu.check(path)["corruptions"] == 0
    return set(qemu.bitmap_names(path))


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_every_crash_leaves_one_set_or_the_other(tmp_path: Path, scenario: Scenario) -> None:
    before = built(tmp_path / "image.qcow2", scenario)
    # What a volume holds where nothing was written yet is anything at all.
    stale = random.Random(1).randbytes(MIB)
    old, new = trusted_bitmaps(before), by_name(scenario.new)
    leaks = check(Qcow2Image(BytesReadable("before", before))).leaks
    assert old != new
    for start, device in ((before, False), (before + stale, True)):
        port = RecordingPort(start, is_block_device=device)
        replace_bitmaps(port, scenario.new)
        assert trusted_bitmaps(bytes(port.content)) == new
        # Nothing is leaked that was not leaked before.
        assert check(Qcow2Image(port)).leaks == leaks
        switch = flushes_before_the_switch(port.log)
        for number, state in enumerate(crash_states(start, port.log, seed=7, samples=20)):
            assert_sound(state)
            found = trusted_bitmaps(state.content)
            assert found in (old, new), state.label
            if state.flushes < switch:
                assert found == old, state.label
            if state.flushes > switch:
                assert found == new, state.label
            if number % QEMU_SAMPLE == 0:
                seen = names_in_qemu(tmp_path / f"state {device} {number}", state.content)
                assert seen == set(found), state.label
                assert_finished_by_a_rerun(state, scenario.new, device=device)


def assert_finished_by_a_rerun(
    state: CrashState, bitmaps: Sequence[StoredBitmap], *, device: bool
) -> None:
    port = RecordingPort(state.content, is_block_device=device)
    replace_bitmaps(port, bitmaps)
    assert trusted_bitmaps(bytes(port.content)) == by_name(bitmaps)
    again = RecordingPort(bytes(port.content), is_block_device=device)
    leaks = check(Qcow2Image(again)).leaks
    assert reclaim_leaks(again) == leaks
    assert check(Qcow2Image(again)).clean
    assert trusted_bitmaps(bytes(again.content)) == by_name(bitmaps)


def flushes_before_the_switch(log: Sequence[Event]) -> int:
    at = next(
        number
        for number, event in enumerate(log)
        if isinstance(event, Written) and event.offset == 0
    )
    return sum(isinstance(event, Flushed) for event in log[:at])


def test_the_scenarios_reach_what_they_are_for(tmp_path: Path) -> None:
    """Self-described blocks, a linked block, a new table: each is there in its scenario."""

    def change(name: str) -> tuple[Qcow2Image, Qcow2Image]:
        before = built(tmp_path / f"{name}.qcow2", SCENARIOS[name])
        port = RecordingPort(before)
        replace_bitmaps(port, SCENARIOS[name].new)
        return Qcow2Image(BytesReadable("before", before)), Qcow2Image(port)

    for name, described_by_itself in (
        ("blocks that describe themselves", True),
        ("blocks described by blocks that there are", False),
    ):
        before, after = change(name)
        assert before.header.refcount_table_offset == after.header.refcount_table_offset
        old_blocks, new_blocks = refcount_blocks(before), refcount_blocks(after)
        (block,) = set(new_blocks) - set(old_blocks)
        entries = 512 * 8 // after.header.refcount_bits
        assert (block // 512 // entries == new_blocks.index(block)) is described_by_itself

    before, after = change("a longer refcount table")
    assert before.header.refcount_table_clusters < after.header.refcount_table_clusters
    before, after = change("pieces longer than a refcount block")
    assert before.header.refcount_table_clusters == after.header.refcount_table_clusters
    assert before.header.refcount_table_offset != after.header.refcount_table_offset


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_the_order_of_writes_is_the_documented_one(tmp_path: Path, scenario: Scenario) -> None:
    before = built(tmp_path / "image.qcow2", scenario)
    port = RecordingPort(before)
    replace_bitmaps(port, scenario.new)
    steps = writes_by_step(port.log)
    assert isinstance(port.log[-1], Flushed)
    image = Qcow2Image(BytesReadable("before", before))
    switches = [number for number, step in enumerate(steps) if any(w.offset == 0 for w in step)]
    (switch,) = switches
    assert [len(write.data) for write in steps[switch]] == [512]
    assert len(steps[switch:]) <= 2
    cluster_size = image.header.cluster_size
    # New clusters are free ones of the image as it was.
    filled = [at for write in steps[0] for at in clusters_of(write, cluster_size)]
    assert not read_refcounts(image, 0, max(filled, default=0) + 1)[filled].any()
    # All else, before the switch and after it, goes to refcounts and the table of their blocks.
    table = image.header.refcount_table_offset // cluster_size
    refcounts = {at // cluster_size for at in refcount_blocks(image)}
    refcounts |= set(range(table, table + image.header.refcount_table_clusters))
    for step in steps[1:switch] + steps[switch + 1 :]:
        assert {at for write in step for at in clusters_of(write, cluster_size)} <= refcounts


def writes_by_step(log: Sequence[Event]) -> list[list[Written]]:
    steps: list[list[Written]] = [[]]
    for event in log:
        if isinstance(event, Written):
            steps[-1].append(event)
        elif isinstance(event, Flushed):
            steps.append([])
    assert not steps[-1]
    return steps[:-1]


def clusters_of(write: Written, cluster_size: int) -> Iterator[int]:
    yield from range(
        write.offset // cluster_size, -(-(write.offset + len(write.data)) // cluster_size)
    )


# The backing file


BACKING_CHANGES = {
    "short to short": ("base.qcow2", "qcow2", "other.raw", "raw"),
    "short to long": ("base.qcow2", "qcow2", "d/" * 400 + "base.qcow2", "qcow2"),
    "long to short": ("d/" * 400 + "base.qcow2", "qcow2", "base.qcow2", "qcow2"),
    "long to long": ("d/" * 400 + "base.qcow2", "qcow2", "e/" * 505 + "base.qcow2", "qcow2"),
    "to none": ("base.qcow2", "qcow2", None, None),
    "to one": (None, None, "base.qcow2", "qcow2"),
    "format forgotten": ("base.qcow2", "qcow2", "base.qcow2", None),
}


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("change", BACKING_CHANGES.values(), ids=BACKING_CHANGES)
def test_every_crash_leaves_one_backing_file_or_the_other(
    tmp_path: Path, change: tuple[str | None, str | None, str | None, str | None], cluster_size: int
) -> None:
    old_name, old_format, new_name, new_format = change
    if cluster_size == 512 and any(name and len(name) > 300 for name in (old_name, new_name)):
        old_name = old_name and old_name[-300:].lstrip("/")
        new_name = new_name and new_name[-300:].lstrip("/")
    path = tmp_path / "image.qcow2"
    arguments = ["-u", "-b", old_name, "-F", old_format or ""] if old_name else []
    size = f"cluster_size={cluster_size}"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", size, *arguments, path, str(DISK))
    port = RecordingPort(path.read_bytes())
    bitmaps = bitmap_set(20, 2)
    for with_bitmaps in (False, True):
        if with_bitmaps:
            replace_bitmaps(port, bitmaps)
        before = bytes(port.content)
        port = RecordingPort(before)
        change_backing(port, new_name, new_format)
        for number, state in enumerate(crash_states(before, port.log, seed=3, samples=20)):
            assert_sound(state)
            header = Qcow2Image(BytesReadable("crashed", state.content)).header
            found = (header.backing_name, header.backing_format)
            assert found in ((old_name, old_format), (new_name, new_format)), state.label
            assert trusted_bitmaps(state.content) == (by_name(bitmaps) if with_bitmaps else {})
            if number % QEMU_SAMPLE == 0:
                path.write_bytes(state.content)
                assert qemu.info(path).get("backing-filename") == found[0]
        path.write_bytes(port.content)
        info = qemu.info(path)
        assert info.get("backing-filename") == new_name
        assert info.get("backing-filename-format") == new_format
        change_backing(port, old_name, old_format)
