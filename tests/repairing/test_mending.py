# SPDX-License-Identifier: Apache-2.0
"""Repair mends what is broken, keeps what the guest sees, and can be undone to the last byte."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.errors import Refused
from chainmerge.repairing.backup import BackupUnusable, ChangedSinceRepair
from chainmerge.storage.errors import ImageLocked
from chainmerge.storage.locks import LockMode, lock_image
from tests.chain.unchanged import refusal, unchanged
from tests.support import qemu
from tests.support.ailments import AILMENTS, HOPELESS, Ailment
from tests.support.damage import forget_autoclear, leak_clusters, mark_in_use
from tests.support.hostile import Victim, build
from tests.support.loopdev import loop_device
from tests.support.qemu import (
    DirtyRange,
    assert_clean,
    bitmap_names,
    check,
    content,
    create,
    dirty_ranges,
    qemu_img,
    qemu_io,
)
from tests.support.wounds import WOUNDS, inflict

if TYPE_CHECKING:
    from chainmerge.documents.repair import RepairReport

MIB = 1 << 20
DOCUMENT = Path(__file__).parents[2] / "docs" / "repair.md"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return build(tmp_path_factory.mktemp("template") / "images")


@pytest.fixture
def victim(template: Victim, tmp_path: Path) -> Victim:
    return template.copy_to(tmp_path / "images")


@pytest.fixture(scope="module")
def bits(template: Victim) -> dict[tuple[str, str], int | None]:
    """How many bytes are dirty, by image and bitmap."""
    rows = chainmerge.bitmaps_list(template.top).rows
    return {(Path(row.image).stem, row.name): row.dirty_bytes for row in rows}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = create(tmp_path / "disk.qcow2", 16 * MIB)
    for name in ("broken", "good"):
        chainmerge.bitmaps_add(image, name)
    qemu_io(image, "write -P 1 1M 1M")
    return image


def _undo(report: RepairReport) -> None:
    assert report.backup is not None
    chainmerge.undo_repair(report.backup)


# The table


@pytest.mark.parametrize("ailment", AILMENTS, ids=lambda ailment: ailment.name)
def test_every_kind_of_damage(
    template: Victim, victim: Victim, bits: dict[tuple[str, str], int | None], ailment: Ailment
) -> None:
    path = victim.image(ailment.role)
    sound = template.image(ailment.role)
    if ailment.changes_data:
        sound = victim.directory / "sound.qcow2"
    ailment.inflict(path)
    if ailment.changes_data:
        # QEMU copies what it can read, refcounts or not.
        qemu_img("convert", "-U", "-f", "qcow2", "-O", "qcow2", path, sound)
    damaged = path.read_bytes()

    with unchanged(victim.directory):
        planned = chainmerge.plan_repair(path)
    assert {finding.kind for finding in planned.findings} >= ailment.kinds, planned.findings
    assert planned.actions
    assert not planned.leaves_damage

    report = chainmerge.repair(path)
    assert (report.findings, report.actions) == (planned.findings, planned.actions)
    assert_clean(path)
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", path, sound)
    assert {name: one["flags"] for name, one in bitmap_names(path).items()} == ailment.bitmaps
    for row in chainmerge.bitmaps_list(path).rows:
        if row.image == str(path):
            assert row.dirty_bytes == (bits[ailment.role, row.name] if row.state == "valid" else 0)
    assert chainmerge.plan_repair(path).actions == ()

    mended = path.read_bytes()
    _undo(report)
    assert path.read_bytes() == damaged
    # And QEMU writes to what was mended, copying what has to be copied.
    path.write_bytes(mended)
    qemu_io(path, "write -P 1 0 1M")
    assert_clean(path)


@pytest.mark.parametrize("damage", HOPELESS)
def test_what_the_guest_sees_is_not_guessed(victim: Victim, damage: str) -> None:
    HOPELESS[damage](victim.base)
    with unchanged(victim.directory):
        report = chainmerge.repair(victim.base)
    assert report.leaves_damage
    assert report.actions == ()
    assert {finding.kind for finding in report.findings} == {"corruption"}


def test_the_documentation_has_the_same_table() -> None:
    rows = re.findall(r"^\| (.+?) +\| ", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    expected = [ailment.name for ailment in AILMENTS] + list(HOPELESS)
    assert [row for row in rows if row in expected] == expected


def test_a_cluster_that_two_others_lost(victim: Victim) -> None:
    """Refcounts can be mended; which of two places has the wrong data cannot be told."""
    from tests.support.wounds import OVERLAPS

    inflict(victim.base, OVERLAPS["L2: the same data twice"])
    damaged = victim.base.read_bytes()
    shown = content(victim.base)
    report = chainmerge.repair(victim.base)
    assert report.leaves_damage
    assert "lost-data" in {finding.kind for finding in report.findings}
    assert_clean(victim.base)
    assert content(victim.base) == shown
    _undo(report)
    assert victim.base.read_bytes() == damaged


# What it says


def test_broken_bitmaps_and_leaks(image: Path) -> None:
    mark_in_use(image, "broken")
    leak_clusters(image, 5)
    assert check(image)["leaks"] == 5
    expected = content(image)
    planned = chainmerge.plan_repair(image)
    report = chainmerge.repair(image)
    assert report.actions == planned.actions
    assert "'broken'" in report.consequences[0]
    assert "full" in report.consequences[0]
    assert set(bitmap_names(image)) == {"good"}
    assert dirty_ranges(image, "good") == [DirtyRange(MIB, MIB)]
    assert content(image) == expected
    assert_clean(image)
    assert report.verified
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


def test_names_that_nobody_can_read_any_more_leave_tombstones(victim: Victim) -> None:
    """Else images above would pass for a whole checkpoint with their own bits alone."""
    inflict(victim.root, WOUNDS["bitmaps: directory of ones"])
    chainmerge.repair(victim.root)
    verdicts = {one.name: one.passes for one in chainmerge.bitmaps_list(victim.top).verdicts}
    assert verdicts == {"both": False, "more": False}


def test_bitmaps_that_no_chain_can_use(image: Path) -> None:
    leaf = create(image.parent / "leaf.qcow2", backing=image.name)
    chainmerge.bitmaps_add(leaf, "good")
    with unchanged(image.parent):
        report = chainmerge.repair(image)
    assert [finding.kind for finding in report.findings] == ["unusable-bitmap"]
    assert "'broken'" in report.findings[0].sentence
    assert not report.leaves_damage
    # A second chain that has it can use it.
    other = create(image.parent / "other.qcow2", backing=image.name)
    chainmerge.bitmaps_add(other, "broken")
    assert chainmerge.plan_repair(image).findings == ()


def test_nothing_is_said_of_bitmaps_while_a_guest_runs(image: Path) -> None:
    leaf = create(image.parent / "leaf.qcow2", backing=image.name)
    with lock_image(leaf, LockMode.WRITER, 0):
        assert chainmerge.plan_repair(image).findings == ()


def test_nothing_wrong(image: Path) -> None:
    with unchanged(image.parent):
        report = chainmerge.repair(image)
    assert (report.findings, report.actions, report.backup) == ((), (), None)


def test_locked(image: Path) -> None:
    access = chainmerge.Access(lock_wait=0)
    with lock_image(image, LockMode.READER, 0):
        assert chainmerge.plan_repair(image, access).findings == ()
        with pytest.raises(ImageLocked):
            chainmerge.repair(image, access)
    with lock_image(image, LockMode.WRITER, 0), pytest.raises(ImageLocked):
        chainmerge.plan_repair(image, access)


def test_raw_images_have_nothing_to_repair(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"data".ljust(MIB, b"\0"))
    access = chainmerge.Access(formats={str(raw): "raw"})
    with unchanged(tmp_path):
        assert chainmerge.repair(raw, access).findings == ()


# The backup


def test_the_backup_is_where_it_was_asked_for(image: Path, tmp_path: Path) -> None:
    mark_in_use(image, "broken")
    elsewhere = tmp_path / "backups"
    elsewhere.mkdir()
    report = chainmerge.repair(image, backup_directory=elsewhere)
    assert report.backup is not None
    assert Path(report.backup).parent == elsewhere
    assert Path(report.backup).stat().st_mode & 0o777 == 0o600
    assert list(image.parent.glob("disk.qcow2?*")) == []


def test_an_image_whose_name_is_no_utf8(image: Path) -> None:
    leak_clusters(image, 5)
    odd = image.rename(image.with_name(os.fsdecode(b"caf\xe9")))
    before = odd.read_bytes()
    _undo(chainmerge.repair(odd))
    assert odd.read_bytes() == before


def test_no_place_for_the_backup(image: Path, tmp_path: Path) -> None:
    mark_in_use(image, "broken")
    with unchanged(image.parent), pytest.raises(chainmerge.ChainmergeError) as caught:
        chainmerge.repair(image, backup_directory=tmp_path / "nowhere")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("guest", ["write -P 7 1M 64k", "write -P 7 8M 64k", "discard 1M 64k"])
def test_no_undoing_once_a_guest_has_written(image: Path, guest: str) -> None:
    leak_clusters(image, 5)
    report = chainmerge.repair(image)
    qemu_io(image, guest)
    assert report.backup is not None
    backup = report.backup
    refusal(ChangedSinceRepair, image.parent, lambda: chainmerge.undo_repair(backup))


def test_no_undoing_on_another_file(image: Path) -> None:
    leak_clusters(image, 5)
    report = chainmerge.repair(image)
    copy = image.with_name("copy")
    copy.write_bytes(image.read_bytes())
    copy.replace(image)
    assert report.backup is not None
    backup = report.backup
    refusal(ChangedSinceRepair, image.parent, lambda: chainmerge.undo_repair(backup))


def test_undoing_one_repair_after_another(image: Path) -> None:
    """The second one goes first; the first one alone would not fit."""
    stages = [image.read_bytes()]
    mark_in_use(image, "broken")
    stages.append(image.read_bytes())
    first = chainmerge.repair(image)
    leak_clusters(image, 5)
    second = chainmerge.repair(image)
    assert first.backup is not None
    backup = first.backup
    refusal(ChangedSinceRepair, image.parent, lambda: chainmerge.undo_repair(backup))
    _undo(second)
    assert check(image)["leaks"] == 5


def test_undoing_twice(image: Path) -> None:
    leak_clusters(image, 5)
    before = image.read_bytes()
    report = chainmerge.repair(image)
    _undo(report)
    _undo(report)
    assert image.read_bytes() == before
    # Whatever becomes of the image after that is none of the backup's business.
    qemu_io(image, "write -P 7 8M 1M")
    with unchanged(image.parent):
        _undo(report)


def test_any_damage_to_a_backup_is_noticed(victim: Victim) -> None:
    inflict(victim.base, WOUNDS["refcount table: all ones"])
    damaged = victim.base.read_bytes()
    report = chainmerge.repair(victim.base)
    assert report.backup is not None
    backup = Path(report.backup)
    sound = backup.read_bytes()
    repaired = victim.base.read_bytes()
    # Of the bytes of a head, of a record, and of what is kept: some of each.
    for position in sorted({*range(0, 400, 7), *range(0, len(sound), 997)}):
        changed = bytearray(sound)
        changed[position] ^= 0x55
        backup.write_bytes(changed)
        try:
            chainmerge.undo_repair(backup)
        except Refused:
            assert victim.base.read_bytes() == repaired, position
        else:
            # Compressed data has bits that mean nothing.
            assert victim.base.read_bytes() == damaged, position
            victim.base.write_bytes(repaired)


def test_what_is_no_backup(image: Path, tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("other", b"QFI\xfb" * 500)):
        other = tmp_path / name
        other.write_bytes(data)
        refusal(BackupUnusable, tmp_path, partial(chainmerge.undo_repair, other))


def test_an_image_on_a_block_device(tmp_path: Path, victim: Victim) -> None:
    """It has no end of file, and anything may stand behind what is used."""
    shown = content(victim.root)
    inflict(victim.root, WOUNDS["refcount table: all ones"])
    damaged = victim.root.read_bytes()
    size = -(-len(damaged) // MIB) * MIB + MIB
    store = tmp_path / "store"
    store.write_bytes(damaged + b"\xaa" * (size - len(damaged)))
    with loop_device(store, size) as device:
        report = chainmerge.repair(device, backup_directory=tmp_path)
        assert_clean(device)
        assert content(device) == shown
        _undo(report)
    assert store.read_bytes()[: len(damaged)] == damaged


def test_a_device_without_room_is_left_alone(tmp_path: Path, victim: Victim) -> None:
    inflict(victim.root, WOUNDS["refcount table: all ones"])
    store = tmp_path / "store"
    store.write_bytes(victim.root.read_bytes())
    size = -(-store.stat().st_size // 4096) * 4096
    with loop_device(store, size) as device:
        before = store.read_bytes()
        with pytest.raises(chainmerge.ChainmergeError) as caught:
            chainmerge.repair(device, backup_directory=tmp_path)
        assert caught.value.code == "metadata-space-missing"
        assert store.read_bytes() == before
    assert qemu.check(victim.base)
