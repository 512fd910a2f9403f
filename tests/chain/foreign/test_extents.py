# SPDX-License-Identifier: Apache-2.0
"""Which other files a vmdk image may lead QEMU to, judged before QEMU opens any."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

import pytest

import chainmerge
from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import ForeignUnreadable
from chainmerge.chain.foreign.extents import NotUnderstood, extents_of
from chainmerge.chain.model import ChainPolicy
from chainmerge.errors import Refused
from chainmerge.options import MergeOptions
from chainmerge.qcow2.readable import BytesReadable
from tests.support.foreign import DISK, KINDS, Kind, foreign_image
from tests.support.qemu import create, info

if TYPE_CHECKING:
    from pathlib import Path

FLAT: Final = Kind("vmdk", "subformat=monolithicFlat")
SPARSE: Final = Kind("vmdk", "subformat=twoGbMaxExtentSparse")
LINE: Final = b'RW 16384 FLAT "root-flat.vmdk" 0'


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A text that names one file of data."""
    return foreign_image(tmp_path, FLAT)


def reason(image: Path, *allowed: Path) -> str:
    """Why an image is not read."""
    policy = ChainPolicy(allow_backing=allowed, formats={image: "vmdk"})
    with pytest.raises(ForeignUnreadable) as caught:
        _ = discover(image, policy).root.virtual_size
    return caught.value.reason


def found_in(image: Path, text: bytes) -> list[str]:
    """The files that a text leads to, all of which may be used."""
    readable = BytesReadable(str(image), text)
    return [path.name for path in extents_of(image, readable, lambda _: None)]


def rewritten(image: Path, old: bytes, new: bytes) -> Path:
    text = image.read_bytes()
    assert old in text
    image.write_bytes(text.replace(old, new))
    return image


@pytest.mark.parametrize("kind", [one for one in KINDS if one.format == "vmdk"], ids=str)
def test_those_that_qemu_names(tmp_path: Path, kind: Kind) -> None:
    image = foreign_image(tmp_path, kind)
    root = discover(image, ChainPolicy(formats={image: "vmdk"})).root
    told = info(image)["format-specific"]["data"]["extents"]
    in_files = {one["filename"] for one in told} - {str(image)}
    assert {str(path) for path in root.extents} == in_files
    assert root.virtual_size == DISK


def test_what_lies_elsewhere_is_not_opened(flat: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    os.mkfifo(place / "trap")
    names = (
        b"elsewhere/trap",
        os.fsencode(place / "trap"),
        b"../../../../../../../../../../etc/hostname",
        b"elsewhere/../../" + os.fsencode(tmp_path.parent.name) + b"/none",
    )
    for name in names:
        rewritten(flat, b"root-flat.vmdk", name)
        assert "outside of the allowed directories" in reason(flat)
        rewritten(flat, name, b"root-flat.vmdk")


def test_what_the_user_allows_is_opened(flat: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    (tmp_path / "root-flat.vmdk").rename(place / "root-flat.vmdk")
    rewritten(flat, b"root-flat.vmdk", b"elsewhere/root-flat.vmdk")
    assert "outside" in reason(flat)
    policy = ChainPolicy(allow_backing=(place,), formats={flat: "vmdk"})
    assert discover(flat, policy).root.virtual_size == DISK


def test_links_are_followed(flat: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    data = tmp_path / "root-flat.vmdk"
    data.rename(place / data.name)
    data.symlink_to(place / data.name)
    assert "outside" in reason(flat)


def test_what_is_no_file_is_not_opened(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "root-flat.vmdk").unlink()
    assert "no such file" in reason(flat)
    os.mkfifo(tmp_path / "root-flat.vmdk")
    assert "in another file" in reason(flat)


def test_a_text_in_an_extent(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, SPARSE)
    (extent,) = discover(image, ChainPolicy(formats={image: "vmdk"})).root.extents
    with extent.open("r+b") as file:
        # No sectors, and somewhere a text: QEMU goes by that.
        file.seek(12)
        file.write(struct.pack("<Q", 0))
    assert "a description of other files" in reason(image)
    sparse = foreign_image(tmp_path, KINDS[0], "sparse")
    with sparse.open("r+b") as file:
        file.seek(12)
        file.write(struct.pack("<Q", 0))
    assert "a description of other files" in reason(sparse)


@pytest.mark.parametrize(
    "line",
    [
        b'RW 16384 FLAT "a" 0 "b"',
        b'RW 16384 FLAT "a" 0;RW 1 FLAT "b" 0',
        b'\x0bRW 16384 FLAT "a" 0',
        b'\rRW 16384 FLAT "a" 0',
        b"RW",
        b'RW 16384 FLAT\t"',
        b'RW +16384 FLAT "a" 0',
        b'RW 0x40 FLAT "a" 0',
        b"RW 16384 ZERO",
        b'RW 16384 OTHER "a"',
        b'RDONLY 16384 FLAT "a" 0',
        b'RW 16384 FLAT "' + b"a" * 512 + b'" 0',
        b'RW 16384 FLAT "" 0',
        b"\xff\xfe",
        b"key value",
        b'RW = "a"',
    ],
)
def test_a_line_that_is_not_understood(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a").touch()
    text = b"# Disk DescriptorFile\nversion=1\n" + line + b'\nddb.adapterType = "ide"\n'
    with pytest.raises(NotUnderstood, match="line 3"):
        found_in(tmp_path / "image", text)


def test_what_is_behind_a_zero_byte_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    text = b'version=1\r\n\r\n\tRW  1\tFLAT "a"  0 \r\n'
    assert found_in(tmp_path / "image", text + b'\0RW 1 FLAT "b" 0\n') == ["a"]


def test_a_file_that_is_too_long_for_a_text(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"#\n" * (1 << 20))
    assert "neither a sparse vmdk image nor a text" in reason(image)


def test_a_root_of_many_files_is_not_deleted_by_halves(tmp_path: Path) -> None:
    image = foreign_image(tmp_path, FLAT)
    leaf = create(tmp_path / "leaf.qcow2", backing=image, backing_format="vmdk")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(Refused, match="keeps its data in other files"):
        chainmerge.flatten(leaf, options=MergeOptions(delete=True))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
