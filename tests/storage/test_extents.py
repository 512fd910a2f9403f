# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.storage.extents import raw_data_extents
from chainmerge.storage.files import FileReadable
from tests.support.loopdev import loop_device
from tests.support.qemu import qemu_img

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 4096


@given(
    written=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=8),
    tail=st.integers(0, 3 * BLOCK),
)
def test_agrees_with_qemu(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[int, int]], tail: int
) -> None:
    image = tmp_path_factory.mktemp("extents") / "image"
    with image.open("wb") as file:
        for start, count in written:
            os.pwrite(file.fileno(), b"x" * count * BLOCK, start * BLOCK)
        file.truncate(file.seek(0, os.SEEK_END) + tail)
    with FileReadable(image) as readable:
        ours = list(raw_data_extents(readable))
        content = image.read_bytes()
    described = json.loads(qemu_img("map", "-f", "raw", "--output=json", image))
    theirs = [extent for extent in described if extent["data"]]
    # QEMU sees a raw image in sectors and rounds its last one up.
    assert [(start, -(-(start + length) // 512) * 512) for start, length in ours] == [
        (extent["start"], -(-(extent["start"] + extent["length"]) // 512) * 512)
        for extent in theirs
    ]
    without_data = bytearray(content)
    for start, length in ours:
        without_data[start : start + length] = bytes(length)
    assert not any(without_data)


def test_nothing_in_an_empty_file(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    with FileReadable(image) as readable:
        assert list(raw_data_extents(readable)) == []


def test_a_hole_of_any_size_costs_nothing(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 1 << 43)
    with FileReadable(image) as readable:
        assert list(raw_data_extents(readable)) == []


def test_a_file_system_that_knows_no_holes() -> None:
    with FileReadable("/proc/self/maps") as readable:
        readable.size = 1 << 20  # /proc has files of size 0 only
        assert list(raw_data_extents(readable)) == [(0, 1 << 20)]


def test_a_block_device_is_all_data(tmp_path: Path) -> None:
    with loop_device(tmp_path / "backing", 1 << 20) as device, FileReadable(device) as readable:
        assert list(raw_data_extents(readable)) == [(0, 1 << 20)]


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4", "ext2"])
def test_on_every_file_system(file_systems: dict[str, Path], kind: str) -> None:
    image = file_systems[kind] / "sparse"
    with image.open("wb") as file:
        file.write(b"x" * 65536)
        file.seek(1 << 20)
        file.write(b"x" * 65536)
        file.truncate(4 << 20)
        os.fsync(file.fileno())
    with FileReadable(image) as readable:
        assert list(raw_data_extents(readable)) == [(0, 65536), (1 << 20, 65536)]
    image.unlink()
