# SPDX-License-Identifier: Apache-2.0
"""The header parser, with QEMU as the judge of what an image may say."""

from __future__ import annotations

import json
import struct
import tempfile
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainmerge.qcow2.errors import (
    BadExtension,
    BadHeader,
    BadOffset,
    FormatError,
    NotQcow2,
    UnsupportedFeature,
)
from chainmerge.qcow2.features import (
    Autoclear,
    Compatible,
    Compression,
    CryptMethod,
    ExtensionType,
    Incompatible,
)
from chainmerge.qcow2.header import Header, parse_header
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from tests.support import qemu
from tests.support.images import KIB, MIB, Geometry, create_encrypted, geometries

NAME = "base.qcow2"


def parse(content: bytes) -> Header:
    return parse_header(BytesReadable(NAME, content))


@dataclass(frozen=True)
class Field:
    """Where a header field is."""

    offset: int
    code: str

    def put(self, content: bytes, value: int) -> bytes:
        packed = struct.pack(">" + self.code, value)
        return content[: self.offset] + packed + content[self.offset + len(packed) :]


VERSION = Field(4, "I")
BACKING_OFFSET = Field(8, "Q")
BACKING_LENGTH = Field(16, "I")
CLUSTER_BITS = Field(20, "I")
SIZE = Field(24, "Q")
CRYPT_METHOD = Field(32, "I")
L1_SIZE = Field(36, "I")
L1_OFFSET = Field(40, "Q")
REFCOUNT_OFFSET = Field(48, "Q")
REFCOUNT_CLUSTERS = Field(56, "I")
SNAPSHOT_COUNT = Field(60, "I")
SNAPSHOTS_OFFSET = Field(64, "Q")
INCOMPATIBLE = Field(72, "Q")
COMPATIBLE = Field(80, "Q")
AUTOCLEAR = Field(88, "Q")
REFCOUNT_ORDER = Field(96, "I")
HEADER_LENGTH = Field(100, "I")
COMPRESSION_TYPE = Field(104, "B")


class Content(bytes):
    """The bytes of an image, not shown at length when a test fails."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image of version 3 with a backing file and clusters of 4 KiB."""
    directory = tmp_path_factory.mktemp("header")
    qemu.create(directory / "root.qcow2", 8 * MIB)
    path = qemu.create(directory / NAME, backing="root.qcow2", cluster_size=4 * KIB)
    return Content(path.read_bytes())


def qemu_opens(content: bytes) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / NAME
        path.write_bytes(content)
        # qemu-img info leaves out some checks, and QEMU 7.2's crashes on one of these images.
        node = {
            "driver": "qcow2",
            "backing": None,
            "file": {"driver": "file", "filename": str(path)},
        }
        command = ("qemu-io", "-r", "-c", "length", "json:" + json.dumps(node))
        result = qemu.run(*command, expect=(0, 1))
        return result.returncode == 0


@given(geometry=geometries(), sectors=st.integers(0, 2**20), name=st.text(max_size=40))
def test_every_field_is_what_was_asked_for(geometry: Geometry, sectors: int, name: str) -> None:
    backing = "b" + "".join(char for char in name if char.isalnum())
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / NAME
        qemu.qemu_img(
            "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", "-o",
            ",".join(f"{key}={value}" for key, value in geometry.options.items()),
            path, str(sectors * 512),
        )  # fmt: skip
        opened = Qcow2Image(BytesReadable(str(path), path.read_bytes()))
    header = opened.header
    assert header.version == (2 if geometry.compat == "0.10" else 3)
    assert header.header_length == (72 if geometry.compat == "0.10" else 112)
    assert header.cluster_size == geometry.cluster_size
    assert header.virtual_size == sectors * 512
    assert header.refcount_bits == geometry.refcount_bits
    assert header.extended_l2 == geometry.extended_l2
    assert header.compression_type.name.lower() == geometry.compression
    assert header.backing_name == backing
    assert header.backing_format == "raw"
    assert header.subcluster_size * header.subclusters_per_cluster == header.cluster_size
    assert header.l2_entries * header.l2_entry_size == header.cluster_size
    assert len(opened.l1) == header.l1_size >= header.l1_entries_used
    assert not (header.dirty)
    assert not (header.corrupt)
    assert not (header.encrypted)
    assert not (header.external_data_file)
    assert header.bitmaps is None


def test_the_compression_type_of_old_images_is_zlib(image: bytes) -> None:
    """Before QEMU 5.1 headers were 104 bytes long, and byte 104 the first extension's."""
    content = HEADER_LENGTH.put(image, 104)
    moved = content[:104] + struct.pack(">II", ExtensionType.END, 0) + content[112:]
    assert qemu_opens(moved)
    header = parse(moved)
    assert header.compression_type is Compression.ZLIB
    assert header.extra == b""


def test_unknown_header_fields_are_kept(image: bytes) -> None:
    content = HEADER_LENGTH.put(image, 120)
    content = content[:105] + b"seven__" + b"eight___" + struct.pack(">II", 0, 0) + content[128:]
    assert qemu_opens(content)
    assert parse(content).extra == b"seven__eight___"


def test_bitmaps(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / NAME, MIB)
    for name in ("one", "two"):
        qemu.qemu_img("bitmap", "--add", path, name)
    header = parse(path.read_bytes())
    assert header.bitmaps is not None
    assert header.bitmaps.count == 2
    assert header.bitmaps.directory_offset % header.cluster_size == 0
    directory = path.read_bytes()[header.bitmaps.directory_offset :]
    assert b"one" in directory[: header.bitmaps.directory_size]
    assert header.bitmaps_trusted
    assert not parse(AUTOCLEAR.put(path.read_bytes(), 0)).bitmaps_trusted
    extension = next(each for each in header.extensions if each.type == ExtensionType.BITMAPS)
    stored = path.read_bytes()[extension.offset :]
    assert stored.startswith(struct.pack(">II", ExtensionType.BITMAPS, 24) + extension.data)


def test_an_encrypted_image(tmp_path: Path) -> None:
    path = create_encrypted(tmp_path / NAME, MIB)
    header = parse(path.read_bytes())
    assert header.crypt_method is CryptMethod.LUKS
    assert header.encrypted
    assert header.luks_header is not None
    offset, length = header.luks_header
    assert path.read_bytes()[offset : offset + 4] == b"LUKS"
    assert length > 4 * KIB


def test_an_external_data_file(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / NAME, MIB, data_file=str(tmp_path / "data"), data_file_raw="on")
    header = parse(path.read_bytes())
    assert header.external_data_file
    assert header.raw_data_file
    assert header.data_file_name == str(tmp_path / "data")


def test_flags(image: bytes) -> None:
    content = INCOMPATIBLE.put(image, Incompatible.DIRTY | Incompatible.CORRUPT)
    content = COMPATIBLE.put(content, Compatible.LAZY_REFCOUNTS | 1 << 40)
    content = AUTOCLEAR.put(content, 1 << 50)
    header = parse(content)
    assert header.dirty
    assert header.corrupt
    assert header.compatible == Compatible.LAZY_REFCOUNTS | 1 << 40
    assert header.autoclear == 1 << 50
    assert not header.autoclear & Autoclear.BITMAPS


def test_backing_names_that_are_not_utf8(image: bytes) -> None:
    header = parse(image)
    start = header.backing_name_offset
    content = image[:start] + b"\xff" + image[start + 1 :]
    changed = parse(content).backing_name
    assert changed is not None
    assert changed.encode("utf-8", "surrogateescape")[:1] == b"\xff"


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (VERSION, 1, "version is 1, but must be 2 or 3"),
        (VERSION, 4, "version is 4, but must be 2 or 3"),
        (CLUSTER_BITS, 8, "cluster_bits is 8, but must be 9 to 21"),
        (CLUSTER_BITS, 40, "cluster_bits is 40, but must be 9 to 21"),
        (BACKING_OFFSET, 4097, "backing file name offset is 4097, but must be 0, or 112 to 4096"),
        (BACKING_LENGTH, 1024, "backing file name length is 1024, but must be at most 1023"),
        (SIZE, 2**63, f"virtual size is {2**63}, but must be a multiple of 512"),
        (SIZE, 2**62, f"virtual size is {2**62}, but must be at most {2**43}"),
        (SIZE, 2**40, "l1_size is 4, but must be 524288 to 4194304"),
        (CRYPT_METHOD, 3, "crypt_method is 3, but must be 0 (none), 1 (AES) or 2 (LUKS)"),
        (CRYPT_METHOD, 2, "crypt_method is 2, but must be 0 or 1 where there is no encryption"),
        (L1_SIZE, 3, "l1_size is 3, but must be 4 to 4194304"),
        (L1_SIZE, 2**22 + 1, "l1_size is 4194305, but must be 4 to 4194304"),
        (L1_OFFSET, 4097, "L1 table at offset 0x1001 is not aligned to clusters of 4096 bytes"),
        (L1_OFFSET, 2**63, "L1 table at offset 0x8000000000000000 (32 bytes) is not within"),
        (REFCOUNT_OFFSET, 4097, "refcount table at offset 0x1001 is not aligned to clusters"),
        (REFCOUNT_CLUSTERS, 0, "refcount_table_clusters is 0, but must be 1 to 2048"),
        (REFCOUNT_CLUSTERS, 2049, "refcount_table_clusters is 2049, but must be 1 to 2048"),
        (SNAPSHOT_COUNT, 65537, "snapshot count is 65537, but must be at most 65536"),
        (INCOMPATIBLE, 1 << 5, "feature that is not supported: incompatible feature bit 5"),
        (INCOMPATIBLE, 1 << 63, "feature that is not supported: incompatible feature bit 63"),
        (INCOMPATIBLE, 1 << 3, "compression_type is 0, but must be 1 (zstd) where incompatible"),
        (INCOMPATIBLE, 1 << 4, "cluster_bits is 12, but must be at least 14 with extended L2"),
        (AUTOCLEAR, 1 << 1, "autoclear_features is 2, but must be without the raw data file bit"),
        (REFCOUNT_ORDER, 7, "refcount_order is 7, but must be 0 to 6"),
        (HEADER_LENGTH, 96, "header_length is 96, but must be 104 to 4096"),
        (HEADER_LENGTH, 8192, "header_length is 8192, but must be 104 to 4096"),
        (COMPRESSION_TYPE, 1, "compression_type is 1, but must be 0 (zlib) where incompatible"),
        (COMPRESSION_TYPE, 2, "compression_type is 2, but must be 0 (zlib) or 1 (zstd)"),
    ],
)
def test_values_out_of_range(image: bytes, field: Field, value: int, sentence: str) -> None:
    content = field.put(image, value)
    with pytest.raises(FormatError) as caught:
        parse(content)
    assert str(caught.value).startswith(f"{NAME}: ")
    assert sentence in str(caught.value)
    assert not qemu_opens(content), "QEMU opens such an image"


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (BACKING_OFFSET, 8, "backing file name offset is 8, but must be 0, or 112 to 4096"),
        (SIZE, 8 * MIB - 1, "virtual size is 8388607, but must be a multiple of 512"),
        (L1_OFFSET, 0, "L1 table at offset 0x0 is where the header is"),
        (L1_OFFSET, 1 << 30, "L1 table at offset 0x40000000 (32 bytes) is not within the file"),
        (REFCOUNT_OFFSET, 0, "refcount table at offset 0x0 is where the header is"),
        (REFCOUNT_OFFSET, 1 << 30, "refcount table at offset 0x40000000 (4096 bytes) is not"),
        (HEADER_LENGTH, 113, "header_length is 113, but must be a multiple of 8"),
    ],
)
def test_values_that_qemu_lets_pass(image: bytes, field: Field, value: int, sentence: str) -> None:
    """They lose data quietly, or have QEMU read nonsense; we are stricter."""
    content = field.put(image, value)
    with pytest.raises(FormatError) as caught:
        parse(content)
    assert sentence in str(caught.value)


def test_a_snapshot_table_outside_the_file(image: bytes) -> None:
    content = SNAPSHOT_COUNT.put(SNAPSHOTS_OFFSET.put(image, 1 << 30), 1)
    with pytest.raises(BadOffset, match="snapshot table at offset 0x40000000"):
        parse(content)


@pytest.mark.parametrize("length", [0, 3, 71])
def test_files_too_short_for_a_header(image: bytes, length: int) -> None:
    with pytest.raises(NotQcow2, match=f"it has {length} bytes"):
        parse(image[:length])


@pytest.mark.parametrize("length", [72, 103, 104, 111, 112, 200])
def test_files_that_end_within_the_header_cluster(image: bytes, length: int) -> None:
    with pytest.raises(FormatError):
        parse(image[:length])


def test_files_that_end_within_the_l1_table(image: bytes) -> None:
    end = parse(image).l1_table_offset
    with pytest.raises(BadOffset, match="L1 table"):
        parse(image[: end + 31])
    assert parse(image[: end + 32])


@pytest.mark.parametrize("content", [b"\0" * 4096, b"QFI\xfa" * 1024, b"\x7fELF" + b"x" * 4096])
def test_files_of_another_kind(content: bytes) -> None:
    with pytest.raises(NotQcow2, match=r"base\.qcow2: not a qcow2 image: it starts with"):
        parse(content)


def with_extensions(image: bytes, *extensions: tuple[int, bytes], end: bool = True) -> bytes:
    """The image with these header extensions, and the backing name moved behind them."""
    header = parse(image)
    name = (header.backing_name or "").encode()
    data = b"".join(
        struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)
        for kind, content in extensions
    )
    data += struct.pack(">II", 0, 0) if end else b""
    start = header.header_length
    cluster = (image[:start] + data + name).ljust(header.cluster_size, b"\0")
    moved = BACKING_OFFSET.put(cluster, start + len(data))
    return moved + image[header.cluster_size :]


def test_unknown_extensions_are_kept(image: bytes) -> None:
    content = with_extensions(image, (0x12345678, b"odd"), (0x12345678, b"again"))
    assert qemu_opens(content)
    header = parse(content)
    assert [each.data for each in header.extensions] == [b"odd", b"again"]
    assert header.backing_name == "root.qcow2"


def test_extensions_may_end_at_the_backing_name(image: bytes) -> None:
    content = with_extensions(image, (ExtensionType.BACKING_FORMAT, b"qcow2..."), end=False)
    assert qemu_opens(content)
    assert parse(content).backing_format == "qcow2..."


@pytest.mark.parametrize(
    ("extensions", "sentence"),
    [
        ([(ExtensionType.BITMAPS, bytes(23))], "23 bytes long, but must be 24"),
        ([(ExtensionType.CRYPTO, bytes(16))], "there although crypt_method is 0"),
        ([(ExtensionType.CRYPTO, bytes(8))], "8 bytes long, but must be 16"),
        ([(ExtensionType.BACKING_FORMAT, b"x" * 16)], "16 bytes long, but must be at most 15"),
    ],
)
def test_malformed_extensions(
    image: bytes, extensions: list[tuple[int, bytes]], sentence: str
) -> None:
    content = AUTOCLEAR.put(with_extensions(image, *extensions), Autoclear.BITMAPS)
    with pytest.raises(BadExtension) as caught:
        parse(content)
    assert sentence in str(caught.value)
    assert not qemu_opens(content)


def test_a_reserved_field_of_the_bitmaps_extension(image: bytes) -> None:
    data = struct.pack(">IIQQ", 1, 1, 64, 4096)
    content = with_extensions(image, (ExtensionType.BITMAPS, data))
    content = AUTOCLEAR.put(content, Autoclear.BITMAPS)
    with pytest.raises(BadExtension, match="reserved field not 0"):
        parse(content)
    assert not qemu_opens(content)


@pytest.mark.parametrize("excess", [1, 2**31])
def test_an_extension_that_passes_its_end(image: bytes, excess: int) -> None:
    """Never a reason to stop and take what was found so far."""
    content = with_extensions(image, (0x12345678, b"12345678"), end=False)
    content = Field(116, "I").put(content, 8 + excess)
    with pytest.raises(BadExtension, match="reaches past the end of the extensions"):
        parse(content)
    assert not qemu_opens(content)


def test_an_extension_whose_header_is_cut(image: bytes) -> None:
    content = BACKING_OFFSET.put(with_extensions(image, (0x12345678, b"12345678")), 132)
    with pytest.raises(BadExtension, match="its header reaches past the end"):
        parse(content)
    assert not qemu_opens(content)


def test_an_extension_that_is_there_twice(image: bytes) -> None:
    content = with_extensions(image, *[(ExtensionType.BACKING_FORMAT, b"raw")] * 2)
    with pytest.raises(BadExtension, match=r"0xe2792aca \(backing format\).* is there twice"):
        parse(content)


def test_more_extensions_than_anyone_writes(image: bytes) -> None:
    content = with_extensions(image, *[(0x12345678, b"")] * 257)
    with pytest.raises(BadExtension, match="more than 256 extensions"):
        parse(content)


def test_names_with_nul_bytes(image: bytes) -> None:
    """QEMU, and whatever else takes C strings, would see another name."""
    start = parse(image).backing_name_offset
    content = image[: start + 4] + b"\0" + image[start + 5 :]
    with pytest.raises(BadHeader, match=r"backing file name is .* without NUL bytes"):
        parse(content)


def test_unknown_features_are_named_by_the_image(image: bytes) -> None:
    table = struct.pack(">BB46s", 0, 9, b"time travel") + struct.pack(">BB46s", 1, 8, b"no matter")
    content = with_extensions(image, (ExtensionType.FEATURE_NAMES, table))
    content = INCOMPATIBLE.put(content, 1 << 8 | 1 << 9)
    with pytest.raises(UnsupportedFeature) as caught:
        parse(content)
    assert caught.value.feature == "incompatible feature bit 8, time travel"


def test_feature_names_cannot_write_to_the_terminal(image: bytes) -> None:
    table = struct.pack(">BB46s", 0, 9, b"\x1b[2Jcleared\n")
    content = with_extensions(image, (ExtensionType.FEATURE_NAMES, table))
    with pytest.raises(UnsupportedFeature) as caught:
        parse(INCOMPATIBLE.put(content, 1 << 9))
    assert caught.value.feature == "?[2Jcleared?"


@st.composite
def field_changes(draw: st.DrawFn) -> tuple[Field, int]:
    every = [value for value in globals().values() if isinstance(value, Field)]
    field = draw(st.sampled_from(every))
    bits = 8 * struct.calcsize(">" + field.code)
    near = st.integers(0, 64)
    power = st.integers(0, bits - 1).map(lambda bit: 1 << bit)
    value = draw(st.one_of(near, power, power.map(lambda number: number - 1)))
    return field, min(value, 2**bits - 1)


@given(changes=st.lists(field_changes(), min_size=1, max_size=2))
@settings(max_examples=4 * settings().max_examples)
def test_what_is_accepted_qemu_opens(image: bytes, changes: list[tuple[Field, int]]) -> None:
    content = image
    for field, value in changes:
        content = field.put(content, value)
    try:
        header = parse(content)
    except FormatError:
        return
    # These need more than the image: the snapshots' tables, another file, a key.
    simple = not (header.snapshot_count or header.external_data_file or header.encrypted)
    assert not simple or qemu_opens(content)


@given(
    changes=st.lists(
        st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6
    )
)
@settings(max_examples=10 * settings().max_examples)
def test_any_bytes_are_parsed_or_refused(image: bytes, changes: list[tuple[int, bytes]]) -> None:
    content = bytearray(image)
    for position, data in changes:
        # Most of the cluster is empty: aim at what is not.
        place = position % 800
        content[place : place + len(data)] = data
    tracemalloc.start()
    try:
        parse(bytes(content))
    except FormatError as error:
        assert error.image == NAME  # noqa: PT017
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 32 * MIB
