# SPDX-License-Identifier: Apache-2.0
"""How often a merge looks at the same thing: directories, refcounts, headers.

These are upper bounds. Each look is a read of storage that may be slow, and of what may have
changed since; one that a merge needs no more is taken out here as well.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.options import MergeOptions
from tests.support.images import MIB
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

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
        assert counts["headers parsed", f"base-{name}"] == 2 * 2
        assert counts["headers parsed", f"top-{name}"] == 2


def test_a_plan_looks_once(tmp_path: Path, effort: Effort) -> None:
    images = tmp_path / "images"
    images.mkdir()
    top = disk(images, "a")
    counts = effort.of(lambda: chainmerge.plan(top))
    assert counts["scans", str(images)] == 1
    assert counts["references counted", "base-a"] == 1
    assert ("references counted", "top-a") not in counts
    assert counts["headers parsed", "base-a"] == 2
