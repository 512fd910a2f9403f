# SPDX-License-Identifier: Apache-2.0
"""Ranges of a file, and which of them have space of their own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.storage.file_space import ByteRanges, space_of, united
from chainmerge.storage.files import FileReadable
from tests.support.loopdev import loop_device, mounted_tmpfs

if TYPE_CHECKING:
    from pathlib import Path

KIB = 1 << 10

pairs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted), max_size=8)


def ranges(bounds: list[list[int]]) -> ByteRanges:
    array = np.array(bounds, dtype=np.int64).reshape(-1, 2)
    return united([(array[:, 0], array[:, 1])])


def members(of: ByteRanges) -> set[int]:
    return {at for start, length in of.pairs() for at in range(start, start + length)}


@given(pairs, pairs, st.integers(0, 60))
def test_ranges_are_sets(one: list[list[int]], other: list[list[int]], end: int) -> None:
    a, b = ranges(one), ranges(other)
    expected = {at for start, stop in one for at in range(start, stop)}
    assert members(a) == expected
    assert a.total == len(expected)
    assert (a.start[1:] > a.end[:-1]).all()
    assert members(a.without(b)) == members(a) - members(b)
    assert members(a.before(end)) == {at for at in expected if at < end}


def test_holes_and_what_is_reserved(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"d" * (64 * KIB))
        os.posix_fallocate(file.fileno(), 128 * KIB, 64 * KIB)
        file.truncate(512 * KIB)
    written = ranges([[0, 256 * KIB], [500 * KIB, 600 * KIB]])
    with FileReadable(path) as file:
        space = space_of(file)
    assert space is not None
    # Ends of allocated extents may lie a block further.
    assert abs(space.missing(written) - 228 * KIB) <= 8 * KIB
    assert space.holes(written).total == space.missing(written)


def test_a_file_system_that_does_not_tell(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path, 1 << 20) as mount:
        path = mount / "file"
        with path.open("wb") as file:
            file.write(b"d" * (64 * KIB))
            file.truncate(512 * KIB)
        with FileReadable(path) as readable:
            space = space_of(readable)
        assert space is not None
        assert space.missing(ranges([[0, 128 * KIB]])) == 64 * KIB


def test_a_device_has_all_its_space(tmp_path: Path) -> None:
    with loop_device(tmp_path / "file", 64 * KIB) as device, FileReadable(device) as readable:
        assert space_of(readable) is None
