# SPDX-License-Identifier: Apache-2.0
"""Headers that are looked at again: a changed one is never taken for the old one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.header import Header, parse_header
from chainmerge.qcow2.known_headers import KnownHeaders
from chainmerge.qcow2.readable import BytesReadable
from tests.support.qemu import create

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.qcow2.readable import Readable


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("headers")
    create(directory / "base.qcow2", 1 << 20)
    return create(directory / "top.qcow2", backing="base.qcow2").read_bytes()


def outcome(image: Readable, headers: KnownHeaders | None = None) -> Header | str:
    try:
        return parse_header(image) if headers is None else headers.parse("an image", image)
    except FormatError as error:
        return error.sentence


def test_what_is_the_same_is_parsed_once(image: bytes) -> None:
    headers = KnownHeaders()
    first = headers.parse("an image", BytesReadable("top", image))
    assert headers.parse("an image", BytesReadable("top", image)) is first
    assert headers.parse("another", BytesReadable("top", image)) == first


@given(at=st.integers(0, 700), value=st.integers(0, 255))
def test_every_byte_of_a_header_counts(image: bytes, at: int, value: int) -> None:
    headers = KnownHeaders()
    headers.parse("an image", BytesReadable("top", image))
    changed = BytesReadable("top", image[:at] + bytes([value]) + image[at + 1 :])
    assert outcome(changed, headers) == outcome(changed)


@given(size=st.integers(0, 400 << 10))
def test_the_size_of_the_file_counts(image: bytes, size: int) -> None:
    headers = KnownHeaders()
    headers.parse("an image", BytesReadable("top", image))
    cut = BytesReadable("top", image[:size].ljust(size, b"\0"))
    assert outcome(cut, headers) == outcome(cut)


def test_a_long_header_is_parsed_again(tmp_path: Path) -> None:
    name = "d/" * 500 + "base.qcow2"
    top = create(tmp_path / "top.qcow2", 1 << 20)
    data = bytearray(top.read_bytes())
    data[8:16] = (8192).to_bytes(8, "big")
    data[16:20] = len(name).to_bytes(4, "big")
    data[8192 : 8192 + len(name)] = name.encode()
    headers = KnownHeaders()
    assert headers.parse("an image", BytesReadable("top", bytes(data))).backing_name == name
    data[8192:8194] = b"e/"
    assert (
        headers.parse("an image", BytesReadable("top", bytes(data))).backing_name == "e" + name[1:]
    )
