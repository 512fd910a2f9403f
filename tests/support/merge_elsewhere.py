# SPDX-License-Identifier: Apache-2.0
"""A chain of real images with a checkpoint, merged by a chainmerge that is installed elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    content,
    create,
    dirty_ranges,
    qemu_img,
    qemu_io,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.clean_root import CleanRoot

MIB: Final = 1 << 20


def build_pair(directory: Path) -> Path:
    """Make base.qcow2 with a bitmap, and top.qcow2 on it with another write; return the latter."""
    directory.mkdir()
    base = create(directory / "base.qcow2", 64 * MIB)
    qemu_io(base, f"write -P 0x11 0 {4 * MIB}")
    qemu_img("bitmap", "--add", base, "daily")
    top = create(directory / "top.qcow2", backing="base.qcow2")
    qemu_img("bitmap", "--add", top, "daily")
    qemu_io(top, f"write -P 0x22 {2 * MIB} {4 * MIB}")
    return top


def assert_merges(root: CleanRoot, command: str) -> None:
    """Merge two images there, and have this machine's QEMU judge the result."""
    directory = root.path / "srv/images"
    top = build_pair(directory)
    wanted = content(top)
    dirty = dirty_ranges(top, "daily")
    root.do(f"{command} merge --delete /srv/images/top.qcow2")
    base = directory / "base.qcow2"
    assert not top.exists()
    assert content(base) == wanted
    assert list(bitmap_names(base)) == ["daily"]
    assert dirty_ranges(base, "daily") == dirty
    assert_clean(base)
    root.do("rm -r /srv/images")
