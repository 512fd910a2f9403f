# SPDX-License-Identifier: Apache-2.0
"""Bitmaps as QEMU wrote them, and what QEMU does not open."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from chainmerge.qcow2.bitmaps import (
    BitmapFlag,
    bitmap_table_entries,
    directory_entry_size,
    read_bits,
    read_directory,
    read_table,
)
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.table_errors import BadBitmapDirectory, BadBitmapTable, UnreadableBitmap
from tests.support import qemu
from tests.support.images import (
    GIB,
    KIB,
    MIB,
    TIB,
    Geometry,
    ImagePlan,
    Write,
    apply_writes,
    build_chain,
    geometries,
    open_qcow2,
    ranges,
)

if TYPE_CHECKING:
    from collections.abc import Callable

BITMAPS_EXTENSION = 0x23852875
ENTRY = struct.Struct(">QIIBBHI")
IN_USE, AUTO = BitmapFlag.IN_USE, BitmapFlag.AUTO


def add_bitmap(path: Path, name: str, granularity: int | None = None, *flags: str) -> None:
    options = [] if granularity is None else ["-g", str(granularity)]
    qemu.qemu_img("bitmap", "-f", "qcow2", "--add", *options, *flags, "--", path, name)


def ranges_by_qemu(path: Path, name: str) -> list[tuple[int, int]]:
    return [(dirty.start, dirty.length) for dirty in qemu.dirty_ranges(path, name)]


def ranges_by_us(path: Path, name: str) -> list[tuple[int, int]]:
    image = open_qcow2(path)
    (entry,) = (each for each in read_directory(image) if each.name == name)
    starts, lengths = read_bits(image, entry).ranges()
    return list(zip(starts.tolist(), lengths.tolist(), strict=True))


def is_refused_by_qemu(path: Path) -> bool:
    # Names in damaged images need not be text.
    result = subprocess.run(["qemu-img", "info", "-U", path], capture_output=True, check=False)
    assert result.returncode in (0, 1), result
    return result.returncode == 1


class Patch:
    """Changes an image's bytes in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = bytearray(path.read_bytes())
        image = open_qcow2(path)
        extension = image.header.bitmaps
        assert extension is not None
        self.directory = extension.directory_offset
        self.directory_size = extension.directory_size
        self.extension = next(
            each.offset + 8 for each in image.header.extensions if each.type == BITMAPS_EXTENSION
        )
        self.entries = read_directory(image)

    def put(self, offset: int, layout: str, *values: int) -> None:
        struct.pack_into(">" + layout, self.content, offset, *values)
        self.path.write_bytes(self.content)

    def put_directory(self, data: bytes, count: int) -> None:
        """Replace the directory, and say so in the header."""
        self.content[self.directory : self.directory + len(data)] = data
        self.put(self.extension, "I", count)
        self.put(self.extension + 8, "Q", len(data))

    def put_table(self, index: int, *entries: int) -> None:
        self.put(self.entries[index].table_offset, f"{len(entries)}Q", *entries)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 64 MiB with bitmap 'one', which has bits, and 'two', which has none."""
    path = qemu.create(tmp_path / "image", 64 * MIB, cluster_size=4 * KIB)
    add_bitmap(path, "one", 512)
    apply_writes(path, [Write(0, 4 * KIB), Write(40 * MIB - 512, 3 * MIB)])
    add_bitmap(path, "two", 64 * KIB)
    return path


@given(st.data(), geometries(compats=("1.1", "1.1")))
def test_bits_are_those_that_qemu_reads(data: st.DataObject, geometry: Geometry) -> None:
    disk_size = data.draw(st.integers(1, geometry.max_disk // 512)) * 512
    writes = [Write(*data.draw(ranges(disk_size))) for _ in range(data.draw(st.integers(0, 4)))]
    grains = [data.draw(st.sampled_from([512, 4 * KIB, 64 * KIB, MIB])) for _ in range(2)]
    with tempfile.TemporaryDirectory() as scratch:
        path = build_chain(Path(scratch), [ImagePlan(geometry, disk_size)])[0]
        for number, granularity in enumerate(grains):
            add_bitmap(path, f"b{number}", granularity)
            apply_writes(path, writes[number:])
        for number, granularity in enumerate(grains):
            assert ranges_by_us(path, f"b{number}") == ranges_by_qemu(path, f"b{number}")
            spans = [(each.offset, each.length) for each in writes[number:]]
            expected = BitSet.from_ranges(spans, disk_size, granularity)
            if number == len(grains) - 1:
                entry = read_directory(open_qcow2(path))[number]
                assert read_bits(open_qcow2(path), entry) == expected


def test_directory(tmp_path: Path) -> None:
    names = ["-starts with a dash", "quo\"te's", "ß🦔", "x" * 1023, "json:{}", " "]
    path = qemu.create(tmp_path / "image", 1 * GIB)
    for name in names[:-1]:
        add_bitmap(path, name)
    add_bitmap(path, names[-1], 4 * KIB, "--disable")
    image = open_qcow2(path)
    entries = read_directory(image)
    assert [entry.name for entry in entries] == names
    assert [entry.granularity for entry in entries] == [64 * KIB] * 5 + [4 * KIB]
    assert [entry.auto for entry in entries] == [True] * 5 + [False]
    assert all(entry.readable and not entry.in_use and entry.type == 1 for entry in entries)
    sizes = [directory_entry_size(len(name.encode()), 0) for name in names]
    assert image.header.bitmaps is not None
    assert sum(sizes) == image.header.bitmaps.directory_size
    for entry in entries:
        assert entry.table_size == bitmap_table_entries(image.header, entry.granularity)
        assert read_bits(image, entry).is_empty


def test_names_that_are_no_utf8(image: Path) -> None:
    patch = Patch(image)
    patch.put(patch.directory + ENTRY.size, "B", 0xFF)
    one = read_directory(open_qcow2(image))[0]
    assert one.name.encode("utf-8", "surrogateescape") == b"\xffne"


def test_no_bitmaps(tmp_path: Path) -> None:
    assert read_directory(open_qcow2(qemu.create(tmp_path / "v3", MIB))) == ()
    assert read_directory(open_qcow2(qemu.create(tmp_path / "v2", MIB, compat="0.10"))) == ()


def test_all_ones_entries(image: Path) -> None:
    # Table entries 0 and 3 cover 16 MiB of the disk each.
    patch = Patch(image)
    patch.put_table(0, 1, 0, 0, 1)
    assert ranges_by_us(image, "one") == ranges_by_qemu(image, "one")
    assert ranges_by_us(image, "one") == [(0, 16 * MIB), (48 * MIB, 16 * MIB)]


@pytest.mark.parametrize("order", [(2, 1, 0, 3), (0, 1, 3, 2), (0, None, 1, 2), (0, 1, None, 3)])
def test_clusters_in_any_order(tmp_path: Path, order: tuple[int | None, ...]) -> None:
    path = qemu.create(tmp_path / "image", 64 * MIB, cluster_size=4 * KIB)
    add_bitmap(path, "one", 512)
    # One write in each of the four clusters of bits, which QEMU stores one after another.
    apply_writes(path, [Write(number * 17 * MIB, (number + 1) * 512) for number in range(4)])
    patch = Patch(path)
    table = read_table(open_qcow2(path), patch.entries[0]).tolist()
    assert all(table)
    patch.put_table(0, *(0 if at is None else table[at] for at in order))
    assert ranges_by_us(path, "one") == ranges_by_qemu(path, "one") != []


def test_tail_bits_are_ignored(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", 3 * MIB + 512)
    add_bitmap(path, "bits", 64 * KIB)
    apply_writes(path, [Write(3 * MIB, 512)])
    patch = Patch(path)
    (data,) = (int(entry) for entry in read_table(open_qcow2(path), patch.entries[0]))
    patch.put(data + 6, "10s", b"\xff" * 10)  # type: ignore[arg-type]
    assert ranges_by_us(path, "bits") == [(3 * MIB, 512)]
    # An all-ones entry has tail bits too.
    patch.put_table(0, 1)
    assert ranges_by_us(path, "bits") == [(0, 3 * MIB + 512)]


def test_an_empty_bitmap_of_a_large_disk_costs_nothing(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", 10 * TIB)
    add_bitmap(path, "bits", 4 * KIB)
    apply_writes(path, [Write(7 * TIB, 512)])
    image = open_qcow2(path)
    (entry,) = read_directory(image)
    before = image.readable.bytes_read  # type: ignore[attr-defined]
    bits = read_bits(image, entry)
    assert [array.tolist() for array in bits.ranges()] == [[7 * TIB], [4 * KIB]]
    # The table of 5,120 entries, and the one cluster that it names.
    assert image.readable.bytes_read - before <= 5120 * 8 + 64 * KIB  # type: ignore[attr-defined]


def test_in_use_bitmaps_are_listed_but_have_no_bits(image: Path) -> None:
    patch = Patch(image)
    patch.put(patch.directory + 12, "I", IN_USE | AUTO)
    opened = open_qcow2(image)
    one, two = read_directory(opened)
    assert (one.in_use, one.auto, one.readable) == (True, True, True)
    assert qemu.bitmap_names(image)["one"]["flags"] == ["in-use", "auto"]
    with pytest.raises(UnreadableBitmap, match=r"'one' has no usable content: .*in use") as caught:
        read_bits(opened, one)
    assert caught.value.advice
    assert read_bits(opened, two).is_empty
    # After a resize by its writer, its table may have any size.
    patch.put(patch.directory + 8, "I", 3)
    assert not is_refused_by_qemu(image)
    assert read_directory(open_qcow2(image))[0].table_size == 3


@pytest.mark.parametrize(
    ("position", "layout", "value", "reason"),
    [
        (16, "B", 2, "type"),
        (12, "I", 4 | AUTO, "flags"),
        (12, "I", 1 << 31, "flags"),
        (17, "B", 8, "granularity"),
        (17, "B", 32, "granularity"),
    ],
)
def test_bitmaps_with_something_unknown_are_listed_but_have_no_bits(
    image: Path, position: int, layout: str, value: int, reason: str
) -> None:
    patch = Patch(image)
    patch.put(patch.directory + position, layout, value)
    assert is_refused_by_qemu(image)
    opened = open_qcow2(image)
    one, two = read_directory(opened)
    assert one.name == "one"
    assert not one.readable
    assert two.readable
    with pytest.raises(UnreadableBitmap, match=reason):
        read_bits(opened, one)


def test_extra_data_is_kept(image: Path) -> None:
    patch = Patch(image)
    one, two = patch.entries
    fields = (one.table_offset, one.table_size, AUTO | 4, 1, 9, 3, 5)
    first = ENTRY.pack(*fields) + b"extra" + b"one"
    second = ENTRY.pack(two.table_offset, two.table_size, AUTO, 1, 16, 3, 0) + b"two"
    padded = first.ljust(directory_entry_size(3, 5), b"\0") + second.ljust(32, b"\0")
    patch.put_directory(padded, 2)
    assert is_refused_by_qemu(image)
    again, other = read_directory(open_qcow2(image))
    assert (again.name, again.extra_data, again.readable) == ("one", b"extra", False)
    assert other == two
    with pytest.raises(UnreadableBitmap, match="extra data"):
        read_bits(open_qcow2(image), again)


def directory_of(patch: Patch, *names: bytes) -> bytes:
    one = patch.entries[0]
    fields = (one.table_offset, one.table_size, AUTO, 1, 9)
    entries = (ENTRY.pack(*fields, len(name), 0) + name for name in names)
    return b"".join(entry.ljust(-(-len(entry) // 8) * 8, b"\0") for entry in entries)


DIRECTORY_DAMAGE: dict[str, tuple[Callable[[Patch], None], str]] = {
    "no bitmaps": (lambda p: p.put(p.extension, "I", 0), "0 bitmaps"),
    "too many bitmaps": (lambda p: p.put(p.extension, "I", 65536), "65536 bitmaps"),
    "more than counted": (lambda p: p.put(p.extension, "I", 1), "more than the 1 "),
    "fewer than counted": (lambda p: p.put(p.extension, "I", 3), "holds 2 .* should hold 3"),
    "size 0": (lambda p: p.put(p.extension + 8, "Q", 0), "size is 0"),
    "size too large": (lambda p: p.put(p.extension + 8, "Q", 1024 * 65535 + 8), "must be 1 to"),
    "size in an entry": (lambda p: p.put(p.extension + 8, "Q", 40), "ends within"),
    "size behind entries": (lambda p: p.put(p.extension + 8, "Q", 72), "end of the file"),
    "offset 0": (lambda p: p.put(p.extension + 16, "Q", 0), "offset 0x0"),
    "offset unaligned": (lambda p: p.put(p.extension + 16, "Q", p.directory + 8), "cluster starts"),
    "offset outside": (lambda p: p.put(p.extension + 16, "Q", 1 << 40), "end of the file"),
    "offset huge": (lambda p: p.put(p.extension + 16, "Q", (1 << 64) - 4096), "end of the file"),
    "table offset 0": (lambda p: p.put(p.directory, "Q", 0), "offset 0x0"),
    "table unaligned": (lambda p: p.put(p.directory, "Q", 0x5200), "cluster starts"),
    "table size 0": (lambda p: p.put(p.directory + 8, "I", 0), "0 entries"),
    "table too short": (lambda p: p.put(p.directory + 8, "I", 3), "needs 4"),
    "table too long": (lambda p: p.put(p.directory + 8, "I", 5), "needs 4"),
    "table much too long": (lambda p: p.put(p.directory + 8, "I", 0x20001), "can have 1 to"),
    "granularity": (lambda p: p.put(p.directory + 17, "B", 64), r"2\^64"),
    "name too long": (
        lambda p: p.put_directory(directory_of(p, b"x" * 1024), 1),
        "name of 1024 bytes",
    ),
    "name twice for QEMU": (
        lambda p: p.put_directory(directory_of(p, b"a\0b", b"a"), 2),
        "two bitmaps",
    ),
    "name twice": (lambda p: p.put_directory(directory_of(p, b"a", b"a"), 2), "two bitmaps"),
}


@pytest.mark.parametrize("damage", DIRECTORY_DAMAGE)
def test_damaged_directories_are_refused_as_qemu_does(image: Path, damage: str) -> None:
    apply, problem = DIRECTORY_DAMAGE[damage]
    apply(Patch(image))
    assert is_refused_by_qemu(image)
    with pytest.raises(BadBitmapDirectory, match=problem) as caught:
        read_directory(open_qcow2(image))
    assert caught.value.image == str(image)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_bitmaps_that_qemu_knows_by_another_name_have_no_bits(image: Path, name: str) -> None:
    patch = Patch(image)
    patch.put_directory(directory_of(patch, name.encode()), 1)
    assert not is_refused_by_qemu(image)
    (entry,) = read_directory(open_qcow2(image))
    assert (entry.name, entry.readable, entry.unknown) == (name, False, "")
    with pytest.raises(UnreadableBitmap, match="NUL"):
        read_bits(open_qcow2(image), entry)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [(2, "reserved"), (1 << 63, "reserved"), (0x5001, "all bits set"), (0x5200, "cluster starts")],
)
def test_damaged_tables_are_refused_as_qemu_does(image: Path, entry: int, problem: str) -> None:
    patch = Patch(image)
    patch.put_table(0, 0, entry)
    assert is_refused_by_qemu(image)
    with pytest.raises(BadBitmapTable, match=problem):
        read_table(open_qcow2(image), patch.entries[0])
    with pytest.raises(BadBitmapTable, match="bitmap 'one': entry 1 of its table"):
        read_bits(open_qcow2(image), patch.entries[0])


def test_tables_that_qemu_reads_as_zeros_are_refused(image: Path) -> None:
    patch = Patch(image)
    stored = read_table(open_qcow2(image), patch.entries[0])
    cluster = int(stored[np.flatnonzero(stored)[0]])
    patch.put_table(0, 0, 1 << 40)
    with pytest.raises(BadBitmapTable, match="not within the file"):
        read_bits(open_qcow2(image), patch.entries[0])
    patch.put_table(0, cluster, cluster)
    with pytest.raises(BadBitmapTable, match="a cluster twice"):
        read_bits(open_qcow2(image), patch.entries[0])
    outside = replace(patch.entries[0], table_offset=1 << 40)
    with pytest.raises(BadBitmapTable, match="reaches past the end"):
        read_table(open_qcow2(image), outside)


@given(damage=st.binary(min_size=1, max_size=24), at=st.integers(0, 70))
def test_random_damage_of_the_directory_is_refused_or_harmless(damage: bytes, at: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = qemu.create(Path(scratch) / "image", MIB)
        add_bitmap(path, "one")
        add_bitmap(path, "two")
        patch = Patch(path)
        offset = patch.directory + min(at, patch.directory_size - len(damage))
        patch.put(offset, f"{len(damage)}s", damage)  # type: ignore[arg-type]
        opened = open_qcow2(path)
        try:
            entries = read_directory(opened)
            for entry in entries:
                read_bits(opened, entry)
        except (BadBitmapDirectory, BadBitmapTable, UnreadableBitmap):
            return
        assert not is_refused_by_qemu(path)
        names = [entry.name for entry in entries]
        if all(name.isascii() for name in names):
            assert names == list(qemu.bitmap_names(path))
