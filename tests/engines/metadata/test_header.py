# SPDX-License-Identifier: Apache-2.0
"""Header clusters, recomposed: what they say, and that one sector write is all it takes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from chainmerge.chain.errors import ImageCorrupt
from chainmerge.engines.metadata.backing import change_backing
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.engines.metadata.errors import BackingNameUnfit, HeaderFull
from chainmerge.engines.metadata.header import (
    HeaderContent,
    HeaderWrite,
    compose_header,
    content_of,
)
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.qcow2.bitmaps import BitmapFlag
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.features import BitmapsExtension, Incompatible
from chainmerge.qcow2.header import Header, parse_header
from chainmerge.qcow2.readable import BytesReadable
from tests.support import qemu
from tests.support.crash import RecordingPort, Written

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
BITMAPS, BACKING_FORMAT, FEATURE_NAMES = 0x23852875, 0xE2792ACA, 0x6803F857
FEATURE_TABLE = struct.pack(">BB46s", 0, 0, b"dirty bit")

# Composing takes no processes, so there can be many examples.
many = settings(max_examples=20 * settings().max_examples)


@st.composite
def names(draw: st.DrawFn, longest: int) -> str:
    length = draw(
        st.one_of(st.integers(1, min(40, longest)), st.integers(min(300, longest), longest))
    )
    return draw(st.sampled_from("abc")) * length


@st.composite
def header_clusters(draw: st.DrawFn) -> bytes:
    """A header cluster as some program may have written it, garbage behind its end included."""
    cluster_bits = draw(st.sampled_from((9, 10, 12)))
    version = draw(st.sampled_from((2, 3, 3, 3)))
    header_length = 72 if version == 2 else draw(st.sampled_from((104, 112, 120)))
    extensions = draw(st.permutations([BITMAPS, BACKING_FORMAT, FEATURE_NAMES, 0x1234, 0x5678]))
    area = b""
    for kind in extensions[: draw(st.integers(0, 5))]:
        if kind == BITMAPS:
            data = struct.pack(">IIQQ", 2, 0, 64, 5 << cluster_bits)
        elif kind == BACKING_FORMAT:
            data = draw(st.sampled_from((b"raw", b"qcow2")))
        elif kind == FEATURE_NAMES:
            data = FEATURE_TABLE * draw(st.integers(0, 9))
        else:
            data = draw(st.binary(max_size=draw(st.sampled_from((9, 9, 150)))))
        area += struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
    area += bytes(8)
    name = draw(st.one_of(st.none(), names(300), names(1023))) or ""
    name_offset = header_length + len(area) + draw(st.sampled_from((0, 0, 8, 300)))
    size = 1 << cluster_bits
    assume(name_offset + len(name) <= size)
    fields = bytearray(header_length)
    struct.pack_into(
        ">4sIQI", fields, 0, b"QFI\xfb", version, name_offset if name else 0, len(name)
    )
    struct.pack_into(">IQIIQQIIQ", fields, 20, cluster_bits, MIB, 0, 100, size, 3 * size, 1, 0, 0)
    if version == 3:
        compatible, autoclear = draw(st.sampled_from((0, 1, 64))), draw(st.sampled_from((0, 1, 17)))
        struct.pack_into(">QQQII", fields, 72, 0, compatible, autoclear, 4, header_length)
        fields[112:] = b"\7" * len(fields[112:])
    start = bytes(fields) + area
    if name:
        start = start.ljust(name_offset, b"?") + name.encode()
    return start + b"!" * (size - len(start))


@st.composite
def contents(draw: st.DrawFn, header: Header) -> HeaderContent:
    bitmaps = draw(
        st.one_of(
            st.just(header.bitmaps),
            st.none(),
            st.builds(BitmapsExtension, st.integers(1, 9), st.integers(32, 99), st.just(7 << 9)),
        )
    )
    if header.version == 2:
        bitmaps = None
    name = draw(st.one_of(st.just(header.backing_name), st.none(), names(300), names(1023)))
    formats = st.one_of(st.just(header.backing_format), st.none(), st.just("host_device"))
    marks = st.sampled_from((header.incompatible, Incompatible.DIRTY, Incompatible.CORRUPT))
    return HeaderContent(
        virtual_size=draw(st.sampled_from((header.virtual_size, 512, 3 * MIB))),
        l1_size=draw(st.sampled_from((header.l1_size, 200))),
        l1_table_offset=draw(st.sampled_from((header.l1_table_offset, 10 << 12))),
        bitmaps=bitmaps,
        bitmaps_trusted=bitmaps is not None and draw(st.booleans()),
        refcount_table_offset=draw(st.sampled_from((header.refcount_table_offset, 9 << 12))),
        refcount_table_clusters=draw(st.integers(1, 3)),
        snapshot_count=(snapshots := draw(st.sampled_from((0, header.snapshot_count, 3)))),
        snapshots_offset=11 << 12 if snapshots else 0,
        backing_name=name,
        backing_format=draw(formats),
        incompatible=draw(marks) if header.version >= 3 else header.incompatible,
    )


def parsed(cluster: bytes) -> Header:
    """A file of one cluster is all that the header's offsets are judged by."""
    return parse_header(BytesReadable("header", cluster.ljust(1 << 20, b"\0")))


def said(header: Header) -> tuple[object, ...]:
    """What must be the same for the old header before the switch: everything but places."""
    return (
        replace(header, extensions=(), backing_name_offset=0, backing_name_length=0),
        tuple((item.type, item.data) for item in header.extensions),
    )


def others(header: Header, *, with_feature_names: bool) -> list[tuple[int, bytes]]:
    ours = {BITMAPS, BACKING_FORMAT} | (set() if with_feature_names else {FEATURE_NAMES})
    return [(item.type, item.data) for item in header.extensions if item.type not in ours]


def compose(cluster: bytes, content: HeaderContent) -> HeaderWrite:
    return compose_header("header", cluster, parsed(cluster), content)


def apply(cluster: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    result = bytearray(cluster)
    for offset, data in writes:
        result[offset : offset + len(data)] = data
    assert len(result) == len(cluster)
    return bytes(result)


@many
@given(data=st.data(), cluster=header_clusters())
def test_any_header_can_be_recomposed_into_any_content(data: st.DataObject, cluster: bytes) -> None:
    old = parsed(cluster)
    content = data.draw(contents(old))
    try:
        head = compose(cluster, content)
    except HeaderFull:
        event("full")
        # It may only be refused where names or unknown extensions are long.
        fixed = old.header_length + 32 + 24 + 8
        unknown = sum(16 + len(item) for _, item in others(old, with_feature_names=False))
        name = len((content.backing_name or "").encode())
        assert fixed + unknown + name > 512
        return
    assert len(head.sector) == 512
    assert all(offset >= 512 for offset, _ in head.beyond)

    # What is written before the switch means nothing to the old header, in whole or in part.
    for offset, beyond in head.beyond:
        for start in range(0, len(beyond), 512):
            torn = apply(cluster, [(offset + start, beyond[start : start + 512])])
            assert said(parsed(torn)) == said(old)
    prepared = apply(cluster, list(head.beyond))
    assert said(parsed(prepared)) == said(old)

    new = parsed(apply(prepared, [(0, head.sector)]))
    assert content_of(new) == content
    assert new.autoclear & ~1 == old.autoclear & 2
    assert new.extra == old.extra
    assert new.compatible == old.compatible
    assert others(new, with_feature_names=False) == others(old, with_feature_names=False)
    if content.bitmaps is not None:
        assert new.extensions[0].type == BITMAPS
        assert new.extensions[0].offset == new.header_length
    kept = others(new, with_feature_names=True) == others(old, with_feature_names=True)
    event(f"feature names kept: {kept}; bytes behind the sector: {bool(head.beyond)}")


def test_another_disk_size_and_l1_table_are_switched_to_with_the_first_sector(
    tmp_path: Path,
) -> None:
    image = qemu.create(tmp_path / "i.qcow2", MIB, cluster_size=4096)
    qemu.qemu_io(image, "write -q -P 7 0 1M")
    old = image.read_bytes()
    header = parsed(old)
    # The same L1 table, longer and elsewhere: one entry maps 2 MiB.
    table = old[header.l1_table_offset : header.l1_table_offset + 8]
    moved = len(old) + -len(old) % 4096
    content = replace(content_of(header), virtual_size=5 * MIB, l1_size=3, l1_table_offset=moved)
    head = compose(old[:4096], content)
    assert head.beyond == ()
    image.write_bytes(apply(old, [(0, head.sector)]).ljust(moved, b"\0") + table.ljust(4096, b"\0"))
    assert qemu.info(image)["virtual-size"] == 5 * MIB
    assert qemu.content(image) == b"\7" * MIB + bytes(4 * MIB)


def test_feature_names_are_kept_where_they_fit(tmp_path: Path) -> None:
    cluster = bytearray(qemu.create(tmp_path / "i.qcow2", MIB).read_bytes()[:65536])
    header = parsed(bytes(cluster))
    (table,) = header.extensions
    content = replace(content_of(header), bitmaps=BitmapsExtension(1, 32, 1 << 16))
    full = compose(bytes(cluster), content)
    assert FEATURE_NAMES not in {item.type for item in parsed(full.sector).extensions}

    # Two names fewer, and it fits.
    shorter = len(table.data) - 96
    struct.pack_into(">I", cluster, table.offset + 4, shorter)
    cluster[table.offset + 8 + shorter :] = bytes(65536 - table.offset - 8 - shorter)
    fitting = compose(bytes(cluster), content)
    assert [item.type for item in parsed(fitting.sector).extensions] == [BITMAPS, FEATURE_NAMES]


def test_a_long_extension_of_another_program_is_refused_and_nothing_written(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "i.qcow2", MIB)
    content = bytearray(image.read_bytes())
    content[112:1024] = bytes(1024 - 112)
    struct.pack_into(">II400s", content, 112, 0x12345678, 400, bytes(range(1, 201)) * 2)
    port = RecordingPort(bytes(content))
    bitmap = StoredBitmap("b", BitSet.empty(MIB, 65536), BitmapFlag.AUTO)
    with pytest.raises(HeaderFull) as refusal:
        replace_bitmaps(port, [bitmap])
    assert refusal.value.cluster_size == 65536
    assert not port.log


# The backing file


def test_qemu_reads_through_the_new_backing_file(tmp_path: Path) -> None:
    for number in (1, 2):
        base = qemu.create(tmp_path / f"{number}.qcow2", MIB)
        qemu.qemu_io(base, f"write -q -P {number} 0 1M")
    deep = tmp_path / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    qemu.create(deep / "raw", MIB, fmt="raw")
    top = qemu.create(tmp_path / "top.qcow2", backing="1.qcow2")
    qemu.qemu_io(top, "write -q -P 9 512k 64k")
    port = RecordingPort(top.read_bytes())
    own = b"\x09" * 65536
    for name, fmt, byte in (
        ("2.qcow2", "qcow2", b"\2"),
        (str(deep / "raw"), "raw", b"\0"),
        (str(tmp_path / "1.qcow2"), "qcow2", b"\1"),
        (None, None, b"\0"),
        ("2.qcow2", None, b"\2"),
    ):
        change_backing(port, name, fmt)
        top.write_bytes(port.content)
        assert qemu.content(top) == byte * (MIB // 2) + own + byte * (MIB // 2 - 65536)
        qemu.assert_clean(top)
        assert qemu.info(top).get("backing-filename") == name
        assert qemu.info(top).get("backing-filename-format") == fmt
    # QEMU changes it in turn, and stores it in its own way.
    qemu.qemu_img("rebase", "-u", "-b", "1.qcow2", "-F", "qcow2", top)
    assert qemu.content(top)[:1] == b"\1"


def test_only_the_first_sector_is_written_for_a_short_name(tmp_path: Path) -> None:
    qemu.create(tmp_path / "base.qcow2", MIB)
    top = qemu.create(tmp_path / "top.qcow2", backing=tmp_path / "base.qcow2")
    port = RecordingPort(top.read_bytes())
    change_backing(port, str(tmp_path / "other.qcow2"), "qcow2")
    writes = [event for event in port.log if isinstance(event, Written)]
    assert [(write.offset, len(write.data)) for write in writes] == [(0, 512)]


def test_bitmaps_and_a_dirty_bit_stay_what_they_are(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "i.qcow2", MIB)
    qemu.qemu_img("bitmap", "--add", image, "b")
    content = image.read_bytes()
    before = parsed(content)
    dirty = content[:79] + b"\1" + content[80:]
    for start in (content, dirty, content[:95] + b"\0" + content[96:]):
        port = RecordingPort(start)
        change_backing(port, "base", "raw")
        after = parsed(bytes(port.content))
        assert after.bitmaps == before.bitmaps
        assert after.autoclear == parsed(start).autoclear
        assert after.incompatible == parsed(start).incompatible


def test_version_2_images_can_be_given_another_backing_file(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", MIB)
    top = qemu.create(tmp_path / "top.qcow2", backing="base.qcow2", compat="0.10")
    port = RecordingPort(top.read_bytes())
    change_backing(port, str(base), "qcow2")
    top.write_bytes(port.content)
    assert qemu.info(top)["backing-filename"] == str(base)
    qemu.assert_clean(top)


def test_names_that_qemu_would_not_read_are_refused(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "i.qcow2", MIB)
    content = image.read_bytes()
    for name, fmt in (
        ("x" * 1024, "raw"),
        ("", "raw"),
        ("nul\0", "raw"),
        ("\ud800", "raw"),
        ("base", "a format of 16 b"),
        ("base", ""),
    ):
        port = RecordingPort(content)
        with pytest.raises(BackingNameUnfit):
            change_backing(port, name, fmt)
        assert not port.log
    data = tmp_path / "data"
    qemu.create(tmp_path / "d.qcow2", MIB, data_file=str(data), data_file_raw="on")
    with pytest.raises(BackingNameUnfit):
        change_backing(RecordingPort((tmp_path / "d.qcow2").read_bytes()), "base", "raw")
    with pytest.raises(ImageCorrupt):
        change_backing(RecordingPort(content[:79] + b"\2" + content[80:]), "base", "raw")


def test_a_name_too_long_for_small_clusters_is_refused(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "i.qcow2", MIB, cluster_size=512)
    port = RecordingPort(image.read_bytes())
    with pytest.raises(HeaderFull):
        change_backing(port, "x" * 400, "raw")
    assert not port.log
    change_backing(port, "x" * 370, "raw")
    assert parsed(bytes(port.content)).backing_name == "x" * 370
