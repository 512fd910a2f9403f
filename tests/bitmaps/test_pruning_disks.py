# SPDX-License-Identifier: Apache-2.0
"""Pruning of several disks: all of them or none, and what is left for a backup of all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import pytest

import chainmerge
from chainmerge.bitmaps.errors import BitmapsChanged, DisksShareBitmaps, MergeToFinishFirst
from chainmerge.chain.errors import ImageDirty
from chainmerge.documents.bitmaps import PruneOfDisks
from chainmerge.engines.metadata.errors import NotEnoughSpace
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.engines.qemu import commit as qemu
from chainmerge.options import Access, MergeOptions
from chainmerge.storage.errors import ImageLocked
from chainmerge.storage.locks import LockMode, lock_image
from tests.records.killed import chain, killed_at
from tests.support.cli import chainmerge as command
from tests.support.qemu import assert_clean, bitmap_names, create, qemu_img, qemu_io
from tests.support.surgery import INCOMPATIBLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainmerge.engines.metadata.bitmap_set import AnyBitmap
    from chainmerge.engines.metadata.replacement import RewriteOutcome
    from chainmerge.storage.files import WritablePort

Disk = tuple[Path, Path]
AT_ONCE: Final = Access(lock_wait=0)


@pytest.fixture
def disks(tmp_path: Path) -> list[Disk]:
    """Base and leaf of two disks: ``stale`` is in the bases alone, ``daily`` in all images."""
    found = []
    for name in ("vda", "vdb"):
        base = create(tmp_path / f"{name}-base.qcow2", 1 << 20)
        leaf = create(tmp_path / f"{name}.qcow2", backing=base)
        for image in (base, leaf):
            qemu_img("bitmap", "--add", image, "daily")
        qemu_img("bitmap", "--add", base, "stale")
        found.append((base, leaf))
    return found


def leaves(disks: Sequence[Disk]) -> list[Path]:
    return [leaf for _, leaf in disks]


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_what_is_stale_goes_from_every_disk(disks: list[Disk]) -> None:
    ran = command("bitmaps", "prune", "--json", *leaves(disks))
    assert ran.status == 0
    report = msgspec.json.decode(ran.out, type=PruneOfDisks)
    assert [[one.name for one in disk.removed] for disk in report.disks] == [["stale"]] * 2
    assert [(one.name, one.usable) for one in report.checkpoints] == [("daily", True)]
    for base, _ in disks:
        assert set(bitmap_names(base)) == {"daily"}
        assert_clean(base)
    again = command("bitmaps", "prune", *leaves(disks))
    assert (again.status, again.out.count("no stale bitmaps")) == (0, 2)
    assert "Checkpoints of all disks" in again.out


def test_a_checkpoint_that_one_disk_lacks(disks: list[Disk]) -> None:
    chainmerge.bitmaps_remove(disks[1][1], ["daily"])
    report = chainmerge.prune_disks(leaves(disks))
    (daily,) = report.checkpoints
    assert (daily.usable, [gap.image for gap in daily.gaps]) == (False, [str(disks[1][1])])


@pytest.mark.parametrize("which", [0, 1])
def test_a_disk_that_is_in_use_refuses_all(disks: list[Disk], tmp_path: Path, which: int) -> None:
    before = content_of(tmp_path)
    with lock_image(disks[which][0], LockMode.READER, 0), pytest.raises(ImageLocked):
        chainmerge.prune_disks(leaves(disks), AT_ONCE)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("which", [0, 1])
def test_a_disk_that_must_be_repaired_first_refuses_all(
    disks: list[Disk], tmp_path: Path, which: int
) -> None:
    INCOMPATIBLE.put(disks[which][0], 1)
    before = content_of(tmp_path)
    with pytest.raises(ImageDirty):
        chainmerge.prune_disks(leaves(disks))
    assert content_of(tmp_path) == before
    assert command("bitmaps", "prune", *leaves(disks)).status == 3


def test_disks_that_share_an_image_are_refused(disks: list[Disk], tmp_path: Path) -> None:
    clone = create(tmp_path / "clone.qcow2", backing=disks[0][0])
    before = content_of(tmp_path)
    with pytest.raises(DisksShareBitmaps):
        chainmerge.prune_disks([disks[0][1], clone], AT_ONCE)
    with pytest.raises(DisksShareBitmaps):
        chainmerge.prune_whole_disks([disks[1][1], disks[1][1]], AT_ONCE)
    with pytest.raises(DisksShareBitmaps):
        chainmerge.prune_disks([disks[0][1], disks[0][1]], AT_ONCE)
    assert content_of(tmp_path) == before


def test_what_is_refused_after_a_disk_was_changed_is_no_refusal(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def full(port: WritablePort, bitmaps: Sequence[AnyBitmap]) -> RewriteOutcome:
        written.append(Path(port.name))
        if len(written) > 1:
            raise NotEnoughSpace(port.name, 1)
        return replace_bitmaps(port, bitmaps)

    monkeypatch.setattr("chainmerge.bitmaps.opening.replace_bitmaps", full)
    with pytest.raises(BitmapsChanged):
        chainmerge.prune_disks(leaves(disks))


def test_what_is_broken_goes_from_whole_chains(disks: list[Disk], tmp_path: Path) -> None:
    (base, leaf), _ = disks
    chainmerge.bitmaps_remove(leaf, ["daily"])
    report = chainmerge.prune_whole_disks(leaves(disks))
    assert [sorted({one.name for one in disk.removed}) for disk in report.disks] == [
        ["daily", "stale"],
        ["stale"],
    ]
    assert set(bitmap_names(base)) == set()
    (daily,) = report.checkpoints
    assert not daily.usable
    before = content_of(tmp_path)
    assert all(not disk.removed for disk in chainmerge.prune_whole_disks(leaves(disks)).disks)
    assert content_of(tmp_path) == before


def test_options_that_are_for_one_disk(disks: list[Disk]) -> None:
    wrong: tuple[tuple[str | Path, ...], ...] = (
        ("prune", *leaves(disks), "--base", disks[0][0]),
        ("prune", *leaves(disks), "--active", disks[0][1]),
        ("prune",),
        ("prune", disks[0][1], "--domain", "vm"),
        ("list",),
        ("list", disks[0][1], "--domain", "vm"),
        ("list", disks[0][1], "--qmp", "socket"),
        ("list", "--domain", "vm", "--qmp", "socket"),
        ("list", disks[0][1], "--connect", "test:///default"),
    )
    for words in wrong:
        assert command("bitmaps", *words).status == 2


@pytest.mark.parametrize("prune", [chainmerge.prune, lambda top: chainmerge.prune_disks([top])])
def test_what_an_unfinished_merge_above_has_saved_is_not_taken_for_stale(
    tmp_path: Path, prune: Callable[[Path], object]
) -> None:
    """It left a tombstone in its base, below which a part of the checkpoint looks useless."""
    root, base, top = images = chain(tmp_path, "root", "base", "top")
    for image in images:
        qemu_img("bitmap", "--add", image, "daily")
        qemu_io(image, "write 0 64k")
    options = MergeOptions(direction="commit", engine="qemu")
    killed_at(qemu, "commit_by_daemon", lambda: chainmerge.merge(top, base, options=options))
    before = content_of(tmp_path)
    with pytest.raises(MergeToFinishFirst):
        prune(base)
    assert content_of(tmp_path) == before
    chainmerge.merge(top, base, options=options)
    assert [one.passes for one in chainmerge.bitmaps_list(base).verdicts] == [True]
    assert root.exists()
