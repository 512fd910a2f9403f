# SPDX-License-Identifier: Apache-2.0
"""Repair takes out what is broken and leaves the rest as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.storage.errors import ImageLocked
from chainmerge.storage.locks import LockMode, lock_image
from tests.support.damage import forget_autoclear, leak_clusters, mark_in_use
from tests.support.qemu import (
    DirtyRange,
    assert_clean,
    bitmap_names,
    check,
    content,
    create,
    dirty_ranges,
    qemu_io,
)

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = create(tmp_path / "disk.qcow2", 16 * MIB)
    for name in ("broken", "good"):
        chainmerge.bitmaps_add(image, name)
    qemu_io(image, "write -P 1 1M 1M")
    return image


def test_broken_bitmaps_and_leaks(image: Path) -> None:
    mark_in_use(image, "broken")
    leak_clusters(image, 5)
    assert check(image)["leaks"] == 5
    expected = content(image)
    before = image.read_bytes()
    planned = chainmerge.repair(image, dry_run=True)
    assert image.read_bytes() == before
    report = chainmerge.repair(image)
    assert report.actions == planned.actions
    assert "'broken'" in report.consequences[0]
    assert "full" in report.consequences[0]
    assert set(bitmap_names(image)) == {"good"}
    assert dirty_ranges(image, "good") == [DirtyRange(MIB, MIB)]
    assert content(image) == expected
    assert_clean(image)
    assert chainmerge.repair(image).actions == ()


def test_bitmaps_that_a_foreign_writer_did_not_know(image: Path) -> None:
    forget_autoclear(image)
    states = {row.name: row.state for row in chainmerge.bitmaps_list(image).rows}
    assert states == {"broken": "in-use", "good": "in-use"}
    chainmerge.repair(image)
    assert chainmerge.bitmaps_list(image).rows == ()
    assert_clean(image)


def test_a_tombstone_stays_under_an_image_with_the_name(image: Path) -> None:
    leaf = create(image.parent / "leaf.qcow2", backing=image.name)
    chainmerge.bitmaps_add(leaf, "broken")
    mark_in_use(image, "broken")
    report = chainmerge.repair(image)
    assert "tombstone" in report.actions[0]
    assert bitmap_names(image)["broken"]["flags"] == []
    assert not chainmerge.bitmaps_list(leaf).verdicts[0].passes


def test_nothing_wrong(image: Path) -> None:
    before = image.read_bytes()
    report = chainmerge.repair(image)
    assert (report.findings, report.actions) == ((), ())
    assert image.read_bytes() == before


def test_locked(image: Path) -> None:
    access = chainmerge.Access(lock_wait=0)
    with lock_image(image, LockMode.READER, 0), pytest.raises(ImageLocked):
        chainmerge.repair(image, access)
