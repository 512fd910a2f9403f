# SPDX-License-Identifier: Apache-2.0
"""How often a merge looks at the same thing: directories, refcounts, headers.

These are upper bounds. Each look is a read of storage that may be slow, and of what may have
changed since; one that a merge needs no more is taken out here as well.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.options import MergeOptions
from chainmerge.qcow2.mapping import OFFSET_MASK
from tests.support.images import GIB, KIB, MIB, open_qcow2
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from chainmerge.options import VerifyLevel

CALLS = {"parse_header": "headers parsed", "count_references": "references counted"}


class Effort:
    """What is counted while work is done: (what, of which file or directory)."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._is_counting = False
        sys.addaudithook(self._noticed)

    def of(self, work: Callable[[], object]) -> Counter[tuple[str, str]]:
        self.counts.clear()
        self._is_counting = True
        sys.setprofile(self._called)
        try:
            work()
        finally:
            sys.setprofile(None)
            self._is_counting = False
        return self.counts

    def _noticed(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_counting and event == "os.scandir":
            self.counts["scans", str(arguments[0])] += 1

    def _called(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name in CALLS and "chainmerge" in code.co_filename:
            name = Path(frame.f_locals["image"].name).name
            self.counts[CALLS[code.co_name], name] += 1


@pytest.fixture(scope="module")
def effort() -> Effort:
    # An audit hook stays for as long as the process lives.
    return Effort()


def disk(directory: Path, name: str) -> Path:
    base = create(directory / f"base-{name}", 8 * MIB)
    qemu_io(base, "write -P 1 0 1M")
    top = create(directory / f"top-{name}", backing=base.name)
    qemu_io(top, "write -P 2 1M 1M")
    return top


@pytest.mark.parametrize("names", ["a", "ab"])
@pytest.mark.parametrize("delete", [False, True])
def test_a_merge_looks_twice_at_most(
    tmp_path: Path, effort: Effort, names: str, delete: bool
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    tops = [disk(images, name) for name in names]
    options = MergeOptions(delete=delete)
    counts = effort.of(lambda: chainmerge.merge_disks(tops, options=options))
    # Before the locks are taken, and under them; with the disks that are merged together.
    assert counts["scans", str(images)] == 2
    for name in names:
        # As it is found, and as it is about to be switched to.
        assert counts["references counted", f"base-{name}"] == 2
        assert counts["references counted", f"top-{name}"] == 1
        # The old header and the new one.
        assert counts["headers parsed", f"base-{name}"] == 1 + 2
        assert counts["headers parsed", f"top-{name}"] == 1


LENGTH = 20


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Images with four L2 tables each, a few entries in use in each of these."""
    images = [create(tmp_path / "image-0", 2 * GIB)]
    for number in range(1, LENGTH):
        images.append(create(tmp_path / f"image-{number}", backing=images[-1].name))
        places = (512 * MIB * table + 64 * KIB * number for table in range(4))
        qemu_io(images[-1], *(f"write -q -P {number} {place} 64k" for place in places))
    return images


class TableReads:
    """How many bytes are read of the L2 tables of each image while work is done."""

    def __init__(self, images: list[Path]) -> None:
        self._tables = {image.name: tables_of(image) for image in images}
        self._names = {image.stat().st_ino: image.name for image in images}
        self.bytes: Counter[str] = Counter()

    def of(self, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
        pread, preadv = os.pread, os.preadv

        def counted_pread(fd: int, length: int, offset: int) -> bytes:
            self._count(fd, offset, length)
            return pread(fd, length, offset)

        def counted_preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            self._count(fd, offset, sum(map(len, buffers)))
            return preadv(fd, buffers, offset, flags)

        with monkeypatch.context() as patched:
            patched.setattr(os, "pread", counted_pread)
            patched.setattr(os, "preadv", counted_preadv)
            work()
        return self.bytes

    def _count(self, fd: int, offset: int, length: int) -> None:
        name = self._names.get(os.fstat(fd).st_ino)
        for table in self._tables.get(name or "", ()):
            low, high = max(offset, table), min(offset + length, table + 64 * KIB)
            self.bytes[name or ""] += max(0, high - low)


def tables_of(image: Path) -> list[int]:
    entries = open_qcow2(image).l1.tolist()
    return [entry & OFFSET_MASK for entry in entries if entry & OFFSET_MASK]


@pytest.mark.parametrize("level", ["metadata", "full"])
def test_tables_of_a_chain_are_read_once(
    chain: list[Path], level: VerifyLevel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = TableReads(chain)
    assert all(len(tables_of(image)) == 4 for image in chain[1:])
    options = MergeOptions(verify=level)
    counts = reads.of(lambda: chainmerge.merge(chain[-1], chain[0], options=options), monkeypatch)
    for image in chain[1:]:
        assert counts[image.name] == 4 * 64 * KIB


def test_each_image_of_a_chain_is_looked_at_once(chain: list[Path], effort: Effort) -> None:
    counts = effort.of(lambda: chainmerge.merge(chain[-1], chain[0]))
    for image in chain[1:-1]:
        assert counts["headers parsed", image.name] == 1
        assert counts["references counted", image.name] == 1
    # Top gets another backing name.
    assert counts["headers parsed", chain[-1].name] == 2
    assert counts["references counted", chain[-1].name] == 1


def test_a_plan_looks_once(tmp_path: Path, effort: Effort) -> None:
    images = tmp_path / "images"
    images.mkdir()
    top = disk(images, "a")
    counts = effort.of(lambda: chainmerge.plan(top))
    assert counts["scans", str(images)] == 1
    assert counts["references counted", "base-a"] == 1
    assert ("references counted", "top-a") not in counts
    assert counts["headers parsed", "base-a"] == 2
