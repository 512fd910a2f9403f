# SPDX-License-Identifier: Apache-2.0
"""The mapping tables against QEMU's reading of them, and our two readings against each other."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import tracemalloc
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainmerge.chain.layers import layer_of_qcow2
from chainmerge.chain.view import GuestView
from chainmerge.qcow2 import mapping, remembered
from chainmerge.qcow2.compression import decompress_cluster
from chainmerge.qcow2.errors import BadEntry, BadOffset, DecompressionFailed, FormatError
from chainmerge.qcow2.extents import concatenated_extents
from chainmerge.qcow2.features import Compression
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.lookup import lookup
from chainmerge.qcow2.mapping import Extents, Kind, iter_extents
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.remembered import MappingMemory
from tests.support import qemu
from tests.support.images import (
    KIB,
    MIB,
    TIB,
    Geometry,
    ImagePlan,
    OpenImage,
    Write,
    WriteCompressed,
    WriteZeroes,
    apply_writes,
    build_chain,
    image_plans,
    open_qcow2,
    ranges,
    view_of,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOSTED = (Kind.DATA, Kind.ZERO_ALLOCATED)


def assert_well_formed(windows: list[Extents], start: int, end: int) -> None:
    """What the class promises of each window, and that windows follow each other without gaps."""
    at = start
    for extents in windows:
        assert extents.start == at
        at = extents.end
        guest_end = extents.guest + extents.length
        assert (extents.length > 0).all()
        assert (guest_end[:-1] == extents.guest[1:]).all()
        assert not extents.continues().any()
        has_host = np.isin(extents.kind, [*HOSTED, Kind.COMPRESSED])
        assert (extents.host[~has_host] == 0).all()
        assert ((extents.csize > 0) == (extents.kind == Kind.COMPRESSED)).all()
    assert at == end


def build(directory: str, plan: ImagePlan) -> Path:
    return build_chain(Path(directory), [plan])[0]


@given(plan=image_plans())
def test_content_is_what_qemu_reads(plan: ImagePlan) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = build(scratch, plan)
        assert view_of([path]).read(0, plan.disk_size) == qemu.content(path)


@given(plan=image_plans())
def test_extents_are_where_qemu_says(plan: ImagePlan) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = build(scratch, plan)
        image = open_qcow2(path)
        for said in json.loads(qemu.qemu_img("map", "--output=json", path)):
            start, end = said["start"], said["start"] + said["length"]
            for extents in iter_extents(image, start, end):
                for guest, kind, host in zip(
                    extents.guest.tolist(), extents.kind, extents.host.tolist(), strict=True
                ):
                    assert (kind != Kind.UNALLOCATED) == said["present"]
                    # QEMU also tells where the unallocated subclusters of a cluster would be.
                    assert (kind in HOSTED) == (said["present"] and "offset" in said)
                    if kind in HOSTED:
                        assert host == said["offset"] + guest - start
                    if not said["zero"]:
                        assert kind in {Kind.DATA, Kind.COMPRESSED}


@given(plan=image_plans(), data=st.data())
def test_both_readings_agree(plan: ImagePlan, data: st.DataObject) -> None:
    start, length = data.draw(ranges(plan.disk_size))
    window = data.draw(st.sampled_from((16, 512, 4096, mapping.DEFAULT_WINDOW)))
    with tempfile.TemporaryDirectory() as scratch:
        image = Qcow2Image(BytesReadable("image", build(scratch, plan).read_bytes()))
    windows = list(iter_extents(image, start, start + length, window=window))
    assert_well_formed(windows, start, start + length)
    for extents in windows:
        for index in range(len(extents)):
            assert_entries_agree(image, extents, index)


def assert_entries_agree(image: Qcow2Image, extents: Extents, index: int) -> None:
    guest = int(extents.guest[index])
    end = guest + int(extents.length[index])
    host = int(extents.host[index])
    while guest < end:
        entry = lookup(image, guest)
        assert entry.kind == extents.kind[index]
        assert entry.csize == extents.csize[index]
        expected = host
        if entry.kind in HOSTED:
            expected = host + entry.guest - int(extents.guest[index])
        assert entry.host == expected
        guest = entry.guest + entry.length


def test_the_disk_may_end_within_a_cluster(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", 64 * KIB + 512)
    qemu.qemu_io(path, f"write -q 0 {64 * KIB + 512}")
    (extents,) = iter_extents(open_qcow2(path))
    assert extents.length.tolist() == [64 * KIB + 512]


def test_a_range_may_cut_a_compressed_cluster(tmp_path: Path) -> None:
    plan = ImagePlan(Geometry(), MIB, [WriteCompressed(0, 128 * KIB)])
    path = build(str(tmp_path), plan)
    (whole,) = iter_extents(open_qcow2(path), 0, 128 * KIB)
    (part,) = iter_extents(open_qcow2(path), 4096, 128 * KIB - 512)
    assert part.guest.tolist() == [4096, 64 * KIB]
    assert part.length.tolist() == [60 * KIB, 64 * KIB - 512]
    assert part.host.tolist() == whole.host.tolist()
    assert view_of([path]).read(4096, 512) == qemu.content(path)[4096 : 4096 + 512]


@pytest.mark.parametrize("start", [0, 4096, 65537])
def test_nothing_comes_of_an_empty_range(tmp_path: Path, start: int) -> None:
    image = open_qcow2(qemu.create(tmp_path / "image", MIB))
    assert list(iter_extents(image, start, start)) == []
    assert list(iter_extents(image, MIB + start, 2 * MIB)) == []


def test_a_disk_of_no_size_has_no_extents(tmp_path: Path) -> None:
    image = open_qcow2(qemu.create(tmp_path / "image", 0))
    assert list(iter_extents(image)) == []


def test_lookup_refuses_offsets_outside_the_disk(tmp_path: Path) -> None:
    image = open_qcow2(qemu.create(tmp_path / "image", MIB))
    for offset in (-1, MIB):
        with pytest.raises(ValueError, match="outside a disk"):
            lookup(image, offset)


def set_subclusters(path: Path, bitmap: int) -> None:
    """Give every entry of every L2 table of an extended image the same subcluster bitmap."""
    image = open_qcow2(path)
    size = image.header.cluster_size
    with path.open("r+b") as file:
        for table in (image.l1 & mapping.OFFSET_MASK).tolist():
            file.seek(table)
            words = np.frombuffer(file.read(size), ">u8").copy()
            words[1::2] = bitmap
            file.seek(table)
            file.write(words.tobytes())


def scan(path: Path) -> tuple[int, int, int]:
    """Bytes of DATA, number of extents, and bytes of memory that looking at all of them took."""
    image = open_qcow2(path)
    mapped = count = 0
    started = time.monotonic()
    for extents in iter_extents(image):
        mapped += int(extents.length[extents.kind == Kind.DATA].sum())
        count += len(extents)
    print(f"{image.header.clusters} clusters: {time.monotonic() - started:.3f} s")
    tracemalloc.start()
    for _ in iter_extents(image):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return mapped, count, peak


def test_a_tebibyte_of_preallocated_metadata_needs_little_memory(tmp_path: Path) -> None:
    """Tables of 128 MiB; with one Python object a cluster this would be gigabytes."""
    path = qemu.create(tmp_path / "image", TIB, preallocation="metadata")
    mapped, count, peak = scan(path)
    assert mapped == TIB
    assert count <= 2048, "runs are not joined"
    assert peak < 100 * MIB


def test_a_tebibyte_of_whole_subclusters_needs_little_memory(tmp_path: Path) -> None:
    path = qemu.create(
        tmp_path / "image", TIB, preallocation="metadata", cluster_size=128 * KIB, extended_l2="on"
    )
    # QEMU preallocates clusters without their subclusters: the guest sees nothing of them.
    assert scan(path)[0] == 0
    set_subclusters(path, mapping.ALL_ALLOCATED)
    mapped, count, peak = scan(path)
    assert mapped == TIB
    assert count <= 1024, "runs are not joined"
    assert peak < 100 * MIB


def test_subclusters_that_all_differ_need_little_memory(tmp_path: Path) -> None:
    """One table with two million extents."""
    disk_size = 128 * 1024 * 2 * MIB
    path = qemu.create(
        tmp_path / "image",
        disk_size,
        preallocation="metadata",
        cluster_size=2 * MIB,
        extended_l2="on",
    )
    set_subclusters(path, 0x0000_0000_5555_5555)
    mapped, count, peak = scan(path)
    assert mapped == disk_size // 2
    assert count == 128 * 1024 * 32
    assert peak < 100 * MIB


def test_an_empty_disk_of_many_tebibytes_is_one_extent(tmp_path: Path) -> None:
    image = open_qcow2(qemu.create(tmp_path / "image", 1024 * TIB, cluster_size=2 * MIB))
    (extents,) = iter_extents(image)
    assert extents.length.tolist() == [1024 * TIB]


SMALL_IMAGES = [
    ImagePlan(Geometry(512), 96 * KIB, [Write(0, 20 * KIB), WriteZeroes(4 * KIB, 40 * KIB)]),
    ImagePlan(Geometry(512, compat="0.10"), 96 * KIB, [Write(0, 20 * KIB), Write(80 * KIB, 512)]),
    ImagePlan(
        Geometry(4 * KIB, compression="zstd"),
        96 * KIB,
        [WriteCompressed(0, 40 * KIB), Write(8 * KIB, 8 * KIB)],
    ),
    ImagePlan(
        Geometry(16 * KIB, extended_l2=True),
        512 * KIB,
        [WriteCompressed(0, 32 * KIB), Write(40 * KIB, 9 * KIB), WriteZeroes(42 * KIB, 4 * KIB)],
    ),
]


@pytest.fixture(scope="module")
def small_images(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    directories = [tmp_path_factory.mktemp("small") for _ in SMALL_IMAGES]
    return [
        build(str(directory), plan).read_bytes()
        for directory, plan in zip(directories, SMALL_IMAGES, strict=True)
    ]


@st.composite
def hostile_words(draw: st.DrawFn) -> bytes:
    """Eight bytes: a word with a few bits set, a boundary, or anything."""
    bits = st.sets(st.integers(0, 63), max_size=4).map(lambda chosen: sum(1 << b for b in chosen))
    boundaries = st.sampled_from((0, 2**64 - 1, 2**63, 2**62, 2**56 - 512, 2**32, 1))
    return draw(st.one_of(bits, boundaries, st.integers(0, 2**64 - 1))).to_bytes(8, "big")


@given(
    which=st.integers(0, len(SMALL_IMAGES) - 1),
    changes=st.lists(st.tuples(st.integers(0, 2**16), hostile_words()), min_size=1, max_size=4),
    aimed=st.booleans(),
)
@settings(max_examples=10 * settings().max_examples)
def test_a_hostile_image_is_read_or_refused(
    small_images: list[bytes], which: int, changes: list[tuple[int, bytes]], aimed: bool
) -> None:
    """Whatever the words of header, L1 and L2 tables say: nothing but FormatError comes of it."""
    original = small_images[which]
    content = bytearray(original)
    for position, word in changes:
        place = table_word(original, position) if aimed else position % 14 * 8
        content[place : place + 8] = word
    tracemalloc.start()
    refusal = outcome(lambda: read_everything(BytesReadable("hostile.qcow2", bytes(content))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * MIB
    if refusal is not None:
        assert refusal[1].startswith("hostile.qcow2: ")


def outcome(action: Callable[[], object]) -> tuple[type[FormatError], str, str] | None:
    """The error that *action* raises, its sentence and its advice, or None."""
    try:
        action()
    except FormatError as error:
        return type(error), str(error), error.advice
    return None


def table_word(original: bytes, position: int) -> int:
    """File offset of a word of the L1 table, or of the L2 tables, of an image that is sound."""
    image = Qcow2Image(BytesReadable("sound", original))
    header = image.header
    tables = [int(entry) & mapping.OFFSET_MASK for entry in image.l1]
    places = [header.l1_table_offset + 8 * index for index in range(header.l1_size)]
    used = range(0, min(header.cluster_size, 64 * header.l2_entry_size), 8)
    places += [table + within for table in tables if table for within in used]
    return places[position % len(places)]


def read_everything(readable: BytesReadable) -> None:
    image = Qcow2Image(readable)
    for extents in iter_extents(image):
        assert extents.end <= image.header.virtual_size
    view = GuestView((layer_of_qcow2(image, readable),))
    for offset in (0, 8 * KIB, 40 * KIB, image.header.virtual_size - 4 * KIB):
        view.read(max(0, offset), 16 * KIB)
        if 0 <= offset < image.header.virtual_size:
            lookup(image, offset)


@given(
    which=st.integers(0, len(SMALL_IMAGES) - 1),
    position=st.integers(0, 2**16),
    word=hostile_words(),
)
@settings(max_examples=4 * settings().max_examples)
def test_both_readings_refuse_the_same_entries(
    small_images: list[bytes], which: int, position: int, word: bytes
) -> None:
    content = bytearray(small_images[which])
    place = table_word(small_images[which], position)
    content[place : place + 8] = word
    image = Qcow2Image(BytesReadable("image", bytes(content)))
    header = image.header
    for guest in range(0, header.virtual_size, header.cluster_size):
        end = min(guest + header.cluster_size, header.virtual_size)
        windows: list[Extents] = []
        refusal = outcome(partial(windows.extend, iter_extents(image, guest, end)))
        assert refusal == outcome(partial(lookup, image, guest))
        for extents in windows:
            for index in range(len(extents)):
                assert_entries_agree(image, extents, index)


def with_l2_entry(
    content: bytes, cluster: int, entry: int, bitmap: int | None = None
) -> Qcow2Image:
    """An image with one L2 entry replaced."""
    image = Qcow2Image(BytesReadable("image", content))
    header = image.header
    table = int(image.l1[cluster // header.l2_entries]) & mapping.OFFSET_MASK
    place = table + cluster % header.l2_entries * header.l2_entry_size
    words = [entry] if bitmap is None else [entry, bitmap]
    patched = bytearray(content)
    patched[place : place + 8 * len(words)] = b"".join(word.to_bytes(8, "big") for word in words)
    return Qcow2Image(BytesReadable("image", bytes(patched)))


@pytest.mark.parametrize(
    ("which", "entry", "bitmap", "problem"),
    [
        (0, 1 << 60, None, "reserved bits are set"),
        (0, 512 | 1 << 8, None, "reserved bits are set"),
        (1, 1, None, "zero flag in an image of version 2"),
        (2, 512, None, "not aligned to clusters of 4096 bytes"),
        (3, 16 * KIB | 1, 0, "zero flag in an extended entry"),
        (3, 16 * KIB, 0x0000_0001_0000_0001, "both allocated and zero"),
        (3, 0, 1, "allocated in a cluster that is not"),
        (3, 1 << 62, 1, "compressed cluster with subclusters"),
    ],
)
def test_entries_that_mean_nothing_are_refused(
    small_images: list[bytes], which: int, entry: int, bitmap: int | None, problem: str
) -> None:
    image = with_l2_entry(small_images[which], 2, entry, bitmap)
    with pytest.raises((BadEntry, BadOffset), match=problem):
        list(iter_extents(image))


def test_an_offset_that_counts_up_into_reserved_bits_is_refused(small_images: list[bytes]) -> None:
    last = 2**56 - 512
    content = with_l2_entry(small_images[0], 2, last).readable.read(0, len(small_images[0]))
    with pytest.raises(BadEntry, match="reserved bits are set"):
        list(iter_extents(with_l2_entry(content, 3, last + 512)))


def assert_readings_agree(image: Qcow2Image) -> None:
    for extents in iter_extents(image):
        for index in range(len(extents)):
            assert_entries_agree(image, extents, index)


@pytest.mark.parametrize(
    ("which", "entry", "step"),
    [
        (0, 0, 512),
        (0, mapping.ZERO_FLAG, 512),
        (0, mapping.COMPRESSED | 8 * KIB, 512),
        (0, mapping.COMPRESSED | 1 << 61 | 8 * KIB, 512),
        (3, 0, 16 * KIB),
        (3, mapping.COMPRESSED | 1 << 54 | 64 * KIB, 16 * KIB),
    ],
    ids=["hole", "zero", "compressed", "two-sectors", "extended-hole", "extended-compressed"],
)
def test_entries_that_seem_to_count_up(
    small_images: list[bytes], which: int, entry: int, step: int
) -> None:
    """Neighbours that differ by a cluster as numbers, and yet are no run of data."""
    bitmap = None if which == 0 else 0
    content = small_images[which]
    for cluster in (1, 2):
        image = with_l2_entry(content, cluster, entry + (cluster - 1) * step, bitmap)
        content = image.readable.read(0, len(content))
    assert_readings_agree(image)


def test_data_that_goes_on_behind_a_missing_table(tmp_path: Path) -> None:
    """The last cluster of one table and the first of the next but one, side by side in the file."""
    plan = ImagePlan(Geometry(512), 96 * KIB, [Write(31 * KIB, KIB), Write(64 * KIB, 512)])
    content = build(str(tmp_path), plan).read_bytes()
    host = lookup(Qcow2Image(BytesReadable("image", content)), 32 * KIB - 512).host
    image = with_l2_entry(content, 128, mapping.COPIED | host + 512)
    (extents,) = iter_extents(image)
    assert extents.guest.tolist() == [0, 31 * KIB, 32 * KIB, 64 * KIB, 64 * KIB + 512]
    assert_readings_agree(image)


def with_l1_entry(content: bytes, index: int, entry: int) -> Qcow2Image:
    place = Qcow2Image(BytesReadable("image", content)).header.l1_table_offset + 8 * index
    patched = content[:place] + entry.to_bytes(8, "big") + content[place + 8 :]
    return Qcow2Image(BytesReadable("image", patched))


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (512 | 1 << 57, "L1 entry for guest offset 0x8000 .* reserved bits are set"),
        (768, "L1 entry .* reserved bits are set"),
        (1 << 40, "L2 table at offset 0x10000000000 is not within the file"),
    ],
)
def test_l2_tables_where_none_can_be_are_refused(
    small_images: list[bytes], entry: int, sentence: str
) -> None:
    with pytest.raises((BadEntry, BadOffset), match=sentence):
        list(iter_extents(with_l1_entry(small_images[0], 1, entry)))


def test_an_unaligned_l2_table_is_refused(small_images: list[bytes]) -> None:
    with pytest.raises(BadOffset, match="L2 table at offset 0x200 is not aligned"):
        list(iter_extents(with_l1_entry(small_images[2], 0, 512)))


def test_an_l2_table_in_two_places_is_refused(small_images: list[bytes]) -> None:
    """A small file could otherwise keep a reader busy for ever."""
    first = int(Qcow2Image(BytesReadable("image", small_images[0])).l1[0])
    shared = with_l1_entry(small_images[0], 1, first)
    with pytest.raises(BadOffset, match="is used twice"):
        list(iter_extents(shared))


def test_data_past_the_end_of_the_file_reads_as_zeros(small_images: list[bytes]) -> None:
    image = with_l2_entry(small_images[0], 2, 1 << 50)
    view = GuestView((layer_of_qcow2(image, image.readable),))
    assert view.read(1024, 512) == bytes(512)


@pytest.mark.parametrize("which", [2, 3], ids=["zstd", "zlib"])
def test_damaged_compressed_data_is_refused(small_images: list[bytes], which: int) -> None:
    image = Qcow2Image(BytesReadable("image", small_images[which]))
    place = lookup(image, 0)
    assert place.kind is Kind.COMPRESSED
    content = bytearray(small_images[which])
    content[place.host : place.host + 64] = bytes([0xA5] * 64)
    image = Qcow2Image(BytesReadable("image", bytes(content)))
    view = GuestView((layer_of_qcow2(image, image.readable),))
    with pytest.raises(DecompressionFailed, match=f"compressed cluster at offset {place.host:#x}"):
        view.read(0, 512)


@pytest.mark.parametrize("which", [2, 3], ids=["zstd", "zlib"])
def test_compressed_data_of_less_than_a_cluster_is_refused(
    small_images: list[bytes], which: int
) -> None:
    image = Qcow2Image(BytesReadable("image", small_images[which]))
    zlib_stream = zlib.compressobj(wbits=-15)
    short = {
        Compression.ZLIB: zlib_stream.compress(b"short") + zlib_stream.flush(),
        Compression.ZSTD: zstd.compress(b"short"),
    }[image.header.compression_type]
    with pytest.raises(DecompressionFailed, match="holds 5 bytes of a cluster's"):
        decompress_cluster(image, 0, short.ljust(512, b"\0"))


def test_external_data_files(tmp_path: Path) -> None:
    """Clusters are at their guest offsets in the data file; that of cluster 0 is at 0."""
    path = qemu.create(tmp_path / "image", MIB, data_file=str(tmp_path / "data"))
    apply_writes(path, [Write(0, 128 * KIB), Write(512 * KIB, 64 * KIB), WriteZeroes(0, 64 * KIB)])
    image = open_qcow2(path)
    (extents,) = iter_extents(image)
    assert extents.guest.tolist() == [0, 64 * KIB, 128 * KIB, 512 * KIB, 576 * KIB]
    assert extents.kind[[1, 3]].tolist() == [Kind.DATA, Kind.DATA]
    assert extents.host[[1, 3]].tolist() == [64 * KIB, 512 * KIB]
    assert_entries_agree(image, extents, 0)
    assert GuestView((layer_of_qcow2(image, OpenImage(tmp_path / "data")),)).read(
        0, MIB
    ) == qemu.content(path)


def test_data_at_offset_0_of_an_external_data_file(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", MIB, data_file=str(tmp_path / "data"))
    apply_writes(path, [Write(0, 64 * KIB)])
    image = open_qcow2(path)
    (extents,) = iter_extents(image)
    assert extents.kind.tolist() == [Kind.DATA, Kind.UNALLOCATED]
    assert lookup(image, 0).kind is Kind.DATA


def test_external_data_elsewhere_is_refused(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "image", MIB, data_file=str(tmp_path / "data"))
    apply_writes(path, [Write(0, 64 * KIB)])
    content = path.read_bytes()
    image = with_l2_entry(content, 1, mapping.COPIED | 128 * KIB)
    with pytest.raises(BadEntry, match="not at its guest offset"):
        list(iter_extents(image))


@given(plan=image_plans(), data=st.data())
def test_what_is_remembered_is_what_would_be_read(plan: ImagePlan, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        image = Qcow2Image(BytesReadable("image", build(scratch, plan).read_bytes()))
    memory = MappingMemory()
    for _ in range(3):
        start, length = data.draw(ranges(plan.disk_size))
        end = start + length
        assert _as_one(memory.walk(image, start, end)) == _as_one(iter_extents(image, start, end))


def test_too_much_to_be_remembered_is_read_again(small_images: list[bytes]) -> None:
    image = Qcow2Image(BytesReadable("small", small_images[0]))
    with mock.patch.object(remembered, "_MOST_OF_ONE_IMAGE", 0):
        memory = MappingMemory()
        assert _as_one(memory.walk(image)) == _as_one(iter_extents(image))


def _as_one(windows: Iterator[Extents]) -> list[tuple[int, ...]]:
    parts = list(windows)
    if not parts:
        return []
    whole = concatenated_extents(parts).coalesced()
    columns = (whole.guest, whole.length, whole.kind, whole.host, whole.csize)
    return list(zip(*(column.tolist() for column in columns), strict=True))
