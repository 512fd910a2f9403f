# SPDX-License-Identifier: Apache-2.0
"""Replacing the bitmaps of an image, with QEMU as the judge of the result."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.engines.metadata.errors import (
    NotEnoughSpace,
)
from chainmerge.engines.metadata.replacement import plan_bitmap_set, replace_bitmaps
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import WritablePort
from tests.engines.metadata.bitmap_sets import AUTO, DISABLED, MIB, random_set, stored_set
from tests.support import qemu
from tests.support.crash import (
    RecordingPort,
)
from tests.support.images import Geometry, apply_writes, geometries, open_qcow2, operations

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.images import Operation


KIB = 1 << 10


def replace_in_file(path: Path, bitmaps: Sequence[StoredBitmap]) -> None:
    with WritablePort(path) as port:
        replace_bitmaps(port, bitmaps)


def dirty_of(bits: BitSet) -> list[qemu.DirtyRange]:
    starts, lengths = bits.ranges()
    pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
    return [qemu.DirtyRange(start, length) for start, length in pairs]


def assert_qemu_reads(path: Path, bitmaps: Sequence[StoredBitmap]) -> None:
    """QEMU finds nothing wrong with the image, and in it exactly *bitmaps*."""
    qemu.assert_clean(path)
    listed = qemu.bitmap_names(path)
    assert {name: set(found["flags"]) for name, found in listed.items()} == {
        bitmap.name: {"auto"} if bitmap.flags & AUTO else set() for bitmap in bitmaps
    }
    # qemu-nbd may hold its lock a little longer than its client is there.
    exported = path.with_name(f"exported {path.name}")
    qemu.run("cp", "--sparse=always", path, exported)
    for bitmap in bitmaps:
        assert listed[bitmap.name]["granularity"] == bitmap.bits.granularity
        assert qemu.dirty_ranges(exported, bitmap.name) == dirty_of(bitmap.bits), bitmap.name


LAYOUTS: dict[str, dict[str, Any]] = {
    "512 B clusters": {"cluster_size": 512},
    "1 KiB clusters": {"cluster_size": 1024},
    "4 KiB clusters": {"cluster_size": 4096},
    "64 KiB clusters": {"cluster_size": 65536},
    "2 MiB clusters": {"cluster_size": 2 * MIB},
    "refcounts of 1 bit": {"cluster_size": 512, "refcount_bits": 1},
    "refcounts of 2 bits": {"cluster_size": 4096, "refcount_bits": 2},
    "refcounts of 4 bits": {"cluster_size": 512, "refcount_bits": 4},
    "refcounts of 8 bits": {"cluster_size": 4096, "refcount_bits": 8},
    "refcounts of 32 bits": {"cluster_size": 512, "refcount_bits": 32},
    "refcounts of 64 bits": {"cluster_size": 512, "refcount_bits": 64},
    "extended L2": {"cluster_size": 131072, "extended_l2": "on"},
    "zstd": {"compression_type": "zstd"},
    "lazy refcounts": {"lazy_refcounts": "on"},
    "preallocated": {"preallocation": "metadata"},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_qemu_reads_the_new_set_and_carries_it_on(tmp_path: Path, options: dict[str, Any]) -> None:
    image = qemu.create(tmp_path / "image.qcow2", 6 * MIB, **options)
    qemu.qemu_img("bitmap", "--add", image, "old")
    qemu.qemu_img("bitmap", "--add", "-g", "4096", image, "older")
    qemu.qemu_io(image, "write -q -P 7 1M 700k", "write -q -z 3M 64k", "write -q -P 9 5M 1M")
    before = qemu.content(image)

    bitmaps = random_set(1, 6 * MIB, 4)
    replace_in_file(image, bitmaps)
    assert_qemu_reads(image, bitmaps)
    assert qemu.content(image) == before

    # A guest goes on writing: QEMU keeps the bits there are, and adds its own.
    qemu.qemu_io(image, "write -q -P 5 2M 1k")
    written = BitSet.from_ranges([(2 * MIB, KIB)], 6 * MIB, 512)
    assert_qemu_reads(
        image,
        [
            StoredBitmap(
                bitmap.name,
                bitmap.bits.union(written.with_granularity(bitmap.bits.granularity))
                if bitmap.flags & AUTO
                else bitmap.bits,
                bitmap.flags,
            )
            for bitmap in bitmaps
        ],
    )

    # What QEMU stored, in its own layout, is replaced as well; and so is everything by nothing.
    again = random_set(2, 6 * MIB, 2)
    replace_in_file(image, again)
    assert_qemu_reads(image, again)
    replace_in_file(image, [])
    assert_qemu_reads(image, [])
    assert open_qcow2(image).header.bitmaps is None


@st.composite
def images_with_sets(
    draw: st.DrawFn,
) -> tuple[Geometry, int, list[Operation], list[int]]:
    geometry = draw(geometries(compats=("1.1",)))
    size = draw(st.integers(1, geometry.max_disk // 512)) * 512
    counts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    return geometry, size, draw(operations(geometry, size)), counts


def most_that_is_required(image: Qcow2Image, bitmaps: Sequence[StoredBitmap]) -> int:
    """The upper bound of docs/metadata-rewrite.md, "What it costs"."""
    header = image.header
    cs, per_block = header.cluster_size, header.cluster_size * 8 // header.refcount_bits
    entries = [-(-bitmap.bits.packed_size // cs) for bitmap in bitmaps]
    tables = [-(-8 * count // cs) for count in entries]
    names = [len(bitmap.name.encode()) for bitmap in bitmaps]
    directory = -(-sum(8 * -(-(24 + name) // 8) for name in names) // cs)
    new = directory + sum(tables) + sum(entries)
    pieces = sum(length for length in [*tables, directory] if length > 1)
    end = check(image).image_end_offset // cs
    today = header.refcount_table_clusters
    blocks = table = 0
    while True:
        total = new + blocks + table
        last = -(-8 * -(-(end + total) // per_block) // cs)
        grown = max(today, last) if last > today or pieces >= per_block else 0
        enough = -(-total // per_block) + 2
        if (blocks, table) == (enough, grown):
            return (end + total) * cs
        blocks, table = enough, grown


@given(drawn=images_with_sets(), seed=st.integers(0, 1000))
def test_random_sets_in_random_images(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[Geometry, int, list[Operation], list[int]],
    seed: int,
) -> None:
    geometry, size, writes, counts = drawn
    options: dict[str, Any] = geometry.options
    image = qemu.create(tmp_path_factory.mktemp("random") / "i.qcow2", size, **options)
    apply_writes(image, writes)
    for step, count in enumerate(counts):
        bitmaps = random_set(seed + step, size, count)
        port = RecordingPort(image.read_bytes())
        plan = plan_bitmap_set(Qcow2Image(port), bitmaps)
        assert plan.required_size <= most_that_is_required(Qcow2Image(port), bitmaps)
        old_size = port.size
        replace_bitmaps(port, bitmaps)
        assert port.size == max(old_size, plan.required_size)
        assert check(Qcow2Image(port)).clean
        assert stored_set(Qcow2Image(port)) == bitmaps
        image.write_bytes(port.content)
    qemu.assert_clean(image)
    assert set(qemu.bitmap_names(image)) == {bitmap.name for bitmap in bitmaps}


def test_an_image_with_internal_snapshots(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "image.qcow2", 4 * MIB, cluster_size=4096)
    qemu.qemu_io(image, "write -q -P 1 0 2M")
    qemu.qemu_img("snapshot", "-c", "first", image)
    qemu.qemu_io(image, "write -q -P 2 1M 2M")
    bitmaps = random_set(3, 4 * MIB, 3)
    replace_in_file(image, bitmaps)
    assert_qemu_reads(image, bitmaps)
    qemu.qemu_img("snapshot", "-d", "first", image)
    assert_qemu_reads(image, bitmaps)


@pytest.mark.parametrize("raw", ["on", "off"])
def test_an_image_with_an_external_data_file(tmp_path: Path, raw: str) -> None:
    image = tmp_path / "image.qcow2"
    options = {"data_file": tmp_path / ("a long name " * 12), "data_file_raw": raw}
    qemu.create(image, 4 * MIB, **{key: str(value) for key, value in options.items()})
    qemu.qemu_io(image, "write -q -P 1 0 2M")
    before = qemu.content(image)
    bitmaps = random_set(4, 4 * MIB, 3)
    replace_in_file(image, bitmaps)
    assert_qemu_reads(image, bitmaps)
    assert qemu.content(image) == before
    assert open_qcow2(image).header.raw_data_file == (raw == "on")


def test_an_encrypted_image(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    secret = ("--object", "secret,id=key,data=open sesame")
    options = ",".join(
        f"encrypt.{option}"
        # QEMU measures how fast it hashes, and gives up where a fast one takes no time.
        for option in ("format=luks", "key-secret=key", "iter-time=10", "hash-alg=sha512")
    )
    qemu.qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, image, "4M")
    opened = ("--image-opts", f"driver=qcow2,file.filename={image},encrypt.key-secret=key")
    qemu.run("qemu-io", *secret, "-c", "write -q -P 3 0 1M", *opened)
    bitmaps = random_set(5, 4 * MIB, 3)
    replace_in_file(image, bitmaps)
    # Any finding, leaks included, would be another exit status than 0.
    qemu.qemu_img("check", *secret, *opened)
    assert set(qemu.bitmap_names(image)) == {bitmap.name for bitmap in bitmaps}
    # QEMU decrypts the content as before, and stores the bitmaps again.
    qemu.run("qemu-io", *secret, "-c", "read -P 3 0 1M", "-c", "write -q -P 4 1M 1M", *opened)
    qemu.qemu_img("check", *secret, *opened)
    written = BitSet.from_ranges([(MIB, MIB)], 4 * MIB, 512)
    first = stored_set(open_qcow2(image))[0]
    assert first.bits == bitmaps[0].bits.union(written)


def test_an_image_with_a_backing_file_keeps_it(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", 4 * MIB)
    qemu.qemu_io(base, "write -q -P 1 0 4M")
    for length in (4, 200, 500, 1000):
        name = "./" * ((length - 4) // 2) + "base"
        name = f"{name}.qcow2" if length > 4 else "base.qcow2"
        image = qemu.create(tmp_path / "top.qcow2", backing=name)
        bitmaps = random_set(length, 4 * MIB, 2)
        replace_in_file(image, bitmaps)
        assert_qemu_reads(image, bitmaps)
        assert qemu.info(image)["backing-filename"] == name
        assert qemu.info(image)["backing-filename-format"] == "qcow2"
        assert qemu.content(image) == qemu.content(base)


@pytest.mark.parametrize(
    ("size", "granularity"),
    [(512, 512), (MIB + 512, 65536), (MIB, 1 << 31), (1 << 40, 65536), ((1 << 40) - 512, 2 * MIB)],
)
def test_sizes_at_the_edges(tmp_path: Path, size: int, granularity: int) -> None:
    image = qemu.create(tmp_path / "image.qcow2", size)
    everything = BitSet.from_ranges([(0, size)], size, granularity)
    nothing = BitSet.empty(size, granularity)
    end = BitSet.from_ranges([(size - 1, 1)], size, granularity)
    bitmaps = [
        StoredBitmap("everything", everything, AUTO),
        StoredBitmap("-nothing", nothing, DISABLED),
        StoredBitmap("the 'end' \"of\" it \u00e4 " + "x" * 990, end, AUTO),
    ]
    replace_in_file(image, bitmaps)
    assert check(open_qcow2(image)).clean
    assert stored_set(open_qcow2(image)) == bitmaps
    assert qemu.dirty_ranges(image, "everything") == dirty_of(everything)
    qemu.assert_clean(image)
    assert set(qemu.bitmap_names(image)) == {bitmap.name for bitmap in bitmaps}


def test_clusters_of_ones_and_of_zeros_take_no_space(tmp_path: Path) -> None:
    size = 64 << 30
    image = qemu.create(tmp_path / "image.qcow2", size, cluster_size=4096)
    # One cluster of bits stands for 2 GiB of the disk.
    bits = BitSet.from_ranges([(4 << 30, 6 << 30), (20 << 30, 1)], size, 65536)
    before = image.stat().st_size
    replace_in_file(image, [StoredBitmap("b", bits, AUTO)])
    # The directory, the table, and one cluster with one bit.
    assert image.stat().st_size - before <= 3 * 4096
    assert_qemu_reads(image, [StoredBitmap("b", bits, AUTO)])


def test_stale_bytes_of_a_volume_do_not_matter(tmp_path: Path) -> None:
    for cluster_size in (512, 4096, 65536):
        image = qemu.create(tmp_path / f"{cluster_size}.qcow2", 3 * MIB, cluster_size=cluster_size)
        qemu.qemu_io(image, "write -q -P 1 0 1M")
        stale = random.Random(1).randbytes(4 * MIB)
        used = image.read_bytes()
        port = RecordingPort(used + stale[len(used) :], is_block_device=True)
        bitmaps = random_set(6, 3 * MIB, 20)
        replace_bitmaps(port, bitmaps)
        assert len(port.content) == 4 * MIB
        image.write_bytes(port.content)
        assert_qemu_reads(image, bitmaps)


def test_a_loop_device_of_exactly_the_required_size(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "image.qcow2", 64 * MIB, cluster_size=4096)
    qemu.qemu_io(image, "write -q -P 1 0 1M")
    bitmaps = random_set(7, 64 * MIB, 6)
    required = plan_bitmap_set(open_qcow2(image), bitmaps).required_size
    assert required > image.stat().st_size

    def on_device(size: int) -> None:
        with image.open("r+b") as file:
            file.truncate(size)
        device = qemu.run("losetup", "--find", "--show", image).stdout.strip()
        try:
            with WritablePort(device) as port:
                replace_bitmaps(port, bitmaps)
        finally:
            qemu.run("losetup", "--detach", device)

    unchanged = image.read_bytes().ljust(required - 4096, b"\0")
    with pytest.raises(NotEnoughSpace) as refusal:
        on_device(required - 4096)
    assert refusal.value.missing == 4096
    assert image.read_bytes() == unchanged
    on_device(required)
    assert_qemu_reads(image, bitmaps)


# Scale


class CountingPort(WritablePort):
    """A real file, and how large the writes to it were."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.writes: list[int] = []
        self.flushes = 0

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(len(data))
        super().write(offset, data)

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


def test_five_thousand_bitmaps_on_a_large_disk(tmp_path: Path) -> None:
    size = 1 << 40
    image = qemu.create(tmp_path / "image.qcow2", size)
    bits = BitSet.from_ranges([(0, MIB), (700 << 30, 1 << 30)], size, 65536)
    few = [StoredBitmap(f"dirty {number}", bits, AUTO) for number in range(500)]
    empty = BitSet.empty(size, 65536)
    many = [StoredBitmap(f"tombstone {number}", empty, DISABLED) for number in range(4500)]
    with CountingPort(image) as port:
        replace_bitmaps(port, few + many)
        assert sum(port.writes) / len(port.writes) > 4 * MIB
        assert port.flushes <= 5
        found = read_directory(Qcow2Image(port))
        assert len(found) == 5000
        assert read_bits(Qcow2Image(port), found[17]) == bits
        assert check(Qcow2Image(port)).clean
