# SPDX-License-Identifier: Apache-2.0
"""The bitmaps commands on real images; QEMU reads back what they wrote."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.bitmaps.errors import (
    BitmapExists,
    BitmapMissing,
    BitmapsImpossible,
    BitmapWorthless,
    BrokenBitmapsInTheWay,
    ClearingUnsafe,
    GranularityInvalid,
    RemovalUnsafe,
    SizesDiffer,
)
from chainmerge.chain.errors import DataFileRefused
from chainmerge.options import Access
from tests.support.damage import mark_in_use
from tests.support.qemu import (
    DirtyRange,
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

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create(tmp_path / "disk.qcow2", 16 * MIB)


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = create(tmp_path / "base.qcow2", 16 * MIB)
    top = create(tmp_path / "top.qcow2", backing="base.qcow2")
    leaf = create(tmp_path / "leaf.qcow2", backing="top.qcow2")
    return base, top, leaf


def test_add(image: Path) -> None:
    chainmerge.bitmaps_add(image, "a", 4096)
    chainmerge.bitmaps_add(image, "-b", enabled=False)
    found = bitmap_names(image)
    assert found["a"] == {"name": "a", "granularity": 4096, "flags": ["auto"]}
    assert found["-b"] == {"name": "-b", "granularity": 65536, "flags": []}
    qemu_io(image, "write -P 1 1M 64k")
    assert dirty_ranges(image, "a") == [DirtyRange(MIB, 65536)]
    assert dirty_ranges(image, "-b") == []
    assert_clean(image)


@pytest.mark.parametrize("granularity", [0, 256, 3000, 1 << 32])
def test_add_with_an_impossible_granularity(image: Path, granularity: int) -> None:
    before = image.read_bytes()
    with pytest.raises(GranularityInvalid):
        chainmerge.bitmaps_add(image, "a", granularity)
    assert image.read_bytes() == before


def test_add_twice(image: Path) -> None:
    chainmerge.bitmaps_add(image, "a")
    with pytest.raises(BitmapExists):
        chainmerge.bitmaps_add(image, "a")


@pytest.mark.parametrize("kind", ["raw", "v2"])
def test_images_without_bitmaps(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    if kind == "raw":
        create(image, MIB, fmt="raw")
    else:
        create(image, MIB, compat="0.10")
    access = Access(formats={str(image): "raw" if kind == "raw" else "qcow2"})
    with pytest.raises(BitmapsImpossible):
        chainmerge.bitmaps_add(image, "a", access=access)


def test_remove(image: Path) -> None:
    for name in ("a", "b", "c"):
        chainmerge.bitmaps_add(image, name)
    qemu_io(image, "write -P 1 0 1M")
    chainmerge.bitmaps_remove(image, ["a", "c"])
    assert set(bitmap_names(image)) == {"b"}
    assert dirty_ranges(image, "b") == [DirtyRange(0, MIB)]
    with pytest.raises(BitmapMissing):
        chainmerge.bitmaps_remove(image, ["a"])
    assert chainmerge.bitmaps_remove_all(image).names == ("b",)
    assert bitmap_names(image) == {}
    assert_clean(image)


@pytest.mark.parametrize("enabled", [True, False])
def test_clear_is_what_qemu_does(image: Path, tmp_path: Path, enabled: bool) -> None:
    """Bits go, all else stays: QEMU is asked to do the same to a copy."""
    chainmerge.bitmaps_add(image, "other", 4096)
    chainmerge.bitmaps_add(image, "spent", 32768)
    qemu_io(image, "write -P 1 1M 3M")
    if not enabled:
        qemu_img("bitmap", "--disable", image, "spent")
    twin = tmp_path / "twin.qcow2"
    shutil.copyfile(image, twin)
    guest = content(image)
    qemu_img("bitmap", "--clear", twin, "spent")
    change = chainmerge.bitmaps_clear(image, ["spent"])
    assert (change.action, change.names) == ("clear", ("spent",))
    assert any("full" in warning for warning in change.warnings)
    assert bitmap_names(image) == bitmap_names(twin)
    for name in ("other", "spent"):
        assert dirty_ranges(image, name) == dirty_ranges(twin, name)
    assert dirty_ranges(image, "spent") == []
    assert content(image) == guest
    assert_clean(image)


def test_clear_of_what_is_broken_or_missing(image: Path) -> None:
    chainmerge.bitmaps_add(image, "broken")
    mark_in_use(image, "broken")
    before = image.read_bytes()
    with pytest.raises(BitmapWorthless):
        chainmerge.bitmaps_clear(image, ["broken"])
    with pytest.raises(BitmapMissing):
        chainmerge.bitmaps_clear(image, ["nothing"])
    assert image.read_bytes() == before


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_part_of_a_checkpoint_is_not_cleared(chain: tuple[Path, Path, Path], where: int) -> None:
    """What other images have of it would pass for all of it."""
    for one in chain:
        chainmerge.bitmaps_add(one, "cp")
    image = chain[where]
    before = image.read_bytes()
    with pytest.raises(ClearingUnsafe, match="'cp'") as refused:
        chainmerge.bitmaps_clear(image, ["cp"])
    others = [str(one) for one in chain if one != image]
    assert all(path in refused.value.sentence for path in others)
    assert image.read_bytes() == before
    chainmerge.bitmaps_clear(image, ["cp"], force=True)
    chainmerge.bitmaps_add(image, "own")
    chainmerge.bitmaps_clear(image, ["own"])


@pytest.mark.parametrize("name", ["itself", "link", "hard link"])
def test_merge_from_the_image_itself(image: Path, tmp_path: Path, name: str) -> None:
    """Whoever holds the image's lock does not wait for it."""
    source = image if name == "itself" else tmp_path / "other-name.qcow2"
    if name == "link":
        source.symlink_to(image)
    if name == "hard link":
        source.hardlink_to(image)
    chainmerge.bitmaps_add(image, "fine", 4096)
    qemu_io(image, "write -P 1 1M 4k")
    chainmerge.bitmaps_add(image, "coarse", 65536)
    no_waiting = Access(lock_wait=0)
    chainmerge.bitmaps_merge(image, "coarse", ["fine"], source_image=source, access=no_waiting)
    assert dirty_ranges(image, "coarse") == [DirtyRange(MIB, 65536)]


def test_merge(image: Path) -> None:
    chainmerge.bitmaps_add(image, "fine", 4096)
    qemu_io(image, "write -P 1 1M 4k")
    chainmerge.bitmaps_add(image, "coarse", 65536)
    qemu_io(image, "write -P 1 8M 4k")
    chainmerge.bitmaps_merge(image, "coarse", ["fine"])
    assert dirty_ranges(image, "coarse") == [DirtyRange(MIB, 65536), DirtyRange(8 * MIB, 65536)]


def test_merge_from_another_image(image: Path, tmp_path: Path) -> None:
    other = create(tmp_path / "other.qcow2", 16 * MIB)
    chainmerge.bitmaps_add(other, "a")
    qemu_io(other, "write -P 1 2M 64k")
    chainmerge.bitmaps_add(image, "target")
    chainmerge.bitmaps_merge(image, "target", ["a"], source_image=other)
    assert dirty_ranges(image, "target") == [DirtyRange(2 * MIB, 65536)]
    larger = create(tmp_path / "larger.qcow2", 32 * MIB)
    chainmerge.bitmaps_add(larger, "a")
    with pytest.raises(SizesDiffer):
        chainmerge.bitmaps_merge(image, "target", ["a"], source_image=larger)


def test_broken_bitmaps(image: Path, tmp_path: Path) -> None:
    chainmerge.bitmaps_add(image, "broken")
    chainmerge.bitmaps_add(image, "good")
    mark_in_use(image, "broken")
    before = image.read_bytes()
    with pytest.raises(BrokenBitmapsInTheWay, match="broken"):
        chainmerge.bitmaps_add(image, "more")
    other = create(tmp_path / "other.qcow2", 16 * MIB)
    chainmerge.bitmaps_add(other, "target")
    with pytest.raises(BitmapWorthless):
        chainmerge.bitmaps_merge(other, "target", ["broken"], source_image=image)
    assert image.read_bytes() == before
    chainmerge.bitmaps_remove(image, ["broken"])
    assert set(bitmap_names(image)) == {"good"}


def test_removal_under_an_image_with_the_same_name(chain: tuple[Path, Path, Path]) -> None:
    base, top, leaf = chain
    for image in (base, leaf):
        chainmerge.bitmaps_add(image, "cp")
    with pytest.raises(RemovalUnsafe, match=r"leaf\.qcow2"):
        chainmerge.bitmaps_remove(base, ["cp"])
    with pytest.raises(RemovalUnsafe):
        chainmerge.bitmaps_remove_all(base)
    chainmerge.bitmaps_remove(base, ["cp"], force=True)
    assert bitmap_names(base) == {}
    assert bitmap_names(top) == {}


def test_list_judges_every_name(chain: tuple[Path, Path, Path]) -> None:
    base, top, leaf = chain
    for image in chain:
        chainmerge.bitmaps_add(image, "whole")
    for image in (base, leaf):
        chainmerge.bitmaps_add(image, "gap")
    chainmerge.bitmaps_add(base, "stale")
    chainmerge.bitmaps_add(top, "frozen", enabled=False)
    chainmerge.bitmaps_add(leaf, "frozen")
    listing = chainmerge.bitmaps_list(leaf)
    verdicts = {verdict.name: verdict.passes for verdict in listing.verdicts}
    assert verdicts == {"whole": True, "gap": False, "stale": False, "frozen": False}
    tombstones = {(row.image, row.name) for row in listing.rows if row.tombstone}
    assert tombstones == {(str(top), "frozen")}


def test_prune_stale_bitmaps_of_base(chain: tuple[Path, Path, Path]) -> None:
    base, top, _ = chain
    for number in range(20):
        chainmerge.bitmaps_add(base, f"stale-{number}")
    for image in (base, top):
        chainmerge.bitmaps_add(image, "good")
    expected = content(top)
    report = chainmerge.prune(top)
    assert len(report.removed) == 20
    assert report.kept == ("good",)
    assert set(bitmap_names(base)) == {"good"}
    assert content(top) == expected
    assert chainmerge.prune(top).removed == ()


def test_prune_leaves_a_tombstone_under_an_image_with_the_name(
    chain: tuple[Path, Path, Path],
) -> None:
    base, top, leaf = chain
    for image in (base, leaf):
        chainmerge.bitmaps_add(image, "gap")
    qemu_io(base, "write -P 1 0 1M")
    report = chainmerge.prune(top)
    assert report.tombstones == ("gap",)
    assert bitmap_names(base)["gap"]["flags"] == []
    assert dirty_ranges(base, "gap") == []
    assert not any(verdict.passes for verdict in chainmerge.bitmaps_list(leaf).verdicts)


def test_prune_the_whole_chain(chain: tuple[Path, Path, Path]) -> None:
    base, top, leaf = chain
    for image in chain:
        chainmerge.bitmaps_add(image, "whole")
    for image in (base, leaf):
        chainmerge.bitmaps_add(image, "gap")
    chainmerge.bitmaps_add(top, "middle")
    report = chainmerge.prune(top, access=Access(active=str(leaf)))
    assert [(row.image, row.name) for row in report.removed] == [
        (str(leaf), "gap"),
        (str(top), "middle"),
        (str(base), "gap"),
    ]
    assert [set(bitmap_names(image)) for image in chain] == [{"whole"}] * 3


def test_prune_leaves_images_alone_that_another_branch_reads(
    chain: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, top, leaf = chain
    branch = create(tmp_path / "branch.qcow2", backing="base.qcow2")
    for image in (base, branch):
        chainmerge.bitmaps_add(image, "of-the-branch")
    chainmerge.bitmaps_add(leaf, "of-the-branch", enabled=False)
    chainmerge.prune(top, access=Access(active=str(leaf)))
    assert set(bitmap_names(base)) == {"of-the-branch"}
    assert set(bitmap_names(leaf)) == set()
    assert chainmerge.bitmaps_list(branch).verdicts[0].passes


def test_thirty_two_bitmaps_cost_one_switch(image: Path) -> None:
    for number in range(32):
        qemu_img("bitmap", "--add", image, f"cp-{number}")
    top = create(image.parent / "top.qcow2", backing=image.name)
    assert len(chainmerge.prune(top).removed) == 32
    assert bitmap_names(image) == {}
    assert_clean(image)


def test_what_reads_no_data_asks_for_no_data_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image can name any file of the host as the one that holds its data."""
    # Where nobody looks for images.
    data = tmp_path / "1" / "2" / "3" / "4" / "data"
    data.parent.mkdir(parents=True)
    home = tmp_path / "images"
    home.mkdir()
    base = create(home / "base.qcow2", 16 * MIB, data_file=str(data), data_file_raw="on")
    qemu_io(base, "write -P 1 1M 1M")
    top = create(home / "top.qcow2", backing="base.qcow2")
    with pytest.raises(DataFileRefused):
        chainmerge.plan(top)
    opened = _files_opened(monkeypatch)
    for image in (base, top):
        chainmerge.bitmaps_add(image, "a")
        listing = chainmerge.bitmaps_list(image)
        assert [row.name for row in listing.rows] == ["a"] * (1 if image == base else 2)
    report = chainmerge.inspect(top)
    assert [one.allocated_bytes for one in report.images] == [16 * MIB, 0]
    assert report.images[0].details["data file"] == str(data)
    chainmerge.bitmaps_remove(top, ["a"])
    data.unlink()
    assert chainmerge.inspect(top).images[0].allocated_bytes == 16 * MIB
    assert str(data) not in opened
    assert str(base) in opened


def _files_opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is opened from now on."""
    opened: list[str] = []
    really_open = os.open

    def watched(path: str, *arguments: Any, **options: Any) -> int:
        opened.append(os.fspath(path))
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", watched)
    return opened


def test_a_chain_over_several_directories_is_pruned_from_its_leaf(tmp_path: Path) -> None:
    """What stands beside it on the same images need not be followed for that."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    root = create(tmp_path / "a" / "root", 16 * MIB)
    middle = create(tmp_path / "b" / "middle", backing="../a/root")
    leaf = create(tmp_path / "c" / "leaf", backing="../b/middle")
    create(tmp_path / "a" / "branch", backing="root")
    for image in (root, middle, leaf):
        qemu_img("bitmap", "--add", image, "broken")
    mark_in_use(middle, "broken")
    allowed = (str(tmp_path / "a"), str(tmp_path / "b"))
    access = Access(allow_backing=allowed, active=str(leaf), search=(str(tmp_path),))
    report = chainmerge.prune(leaf, access=access)
    assert [one.image for one in report.removed] == [str(leaf), str(middle)]
    assert "broken" in bitmap_names(root)
    assert bitmap_names(middle) == bitmap_names(leaf) == {}
