# SPDX-License-Identifier: Apache-2.0
"""Records of images whose inode or device number is another's now."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.merging import by_qemu, concluding, recorded, settling
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.pivot import LivePivotUnclear
from chainmerge.records import files as state_files
from chainmerge.records.errors import LeftoverUnclear
from chainmerge.records.files import write_state
from chainmerge.records.identity import ImageIdentity
from chainmerge.records.live_journal import LIVE_JOURNAL, load_live_journal, save_live_journal
from chainmerge.records.merged_record import merged_record_file
from chainmerge.storage.errors import ImageMissing
from tests.records.killed import DELETE, MIB, chain, killed_at, run_verbatim
from tests.records.pivoted import pivoted
from tests.support.loopdev import loop_device, mounted_file_system
from tests.support.qemu import bitmap_names, content, create, dirty_ranges, qemu_img, qemu_io
from tests.support.reused import made_again

if TYPE_CHECKING:
    from collections.abc import Iterator


DEVICES = Access(allow_backing=("/dev",))


# Inodes that are used again


@pytest.fixture(params=["ext4", "ext3"])
def without_births(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that keeps no time of birth, and uses the numbers of inodes again."""
    with mounted_file_system(tmp_path, request.param, 64 * MIB, "-I", "128") as place:
        yield place


@pytest.mark.parametrize("killed_before_noting", [False, True])
@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_what_comes_after_a_deleted_image_is_not_deleted(
    without_births: Path,
    direction: Any,
    killed_before_noting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, mid, top = chain(without_births, "base", "mid", "top")
    expected = content(top)
    numbers = {path: path.stat().st_ino for path in (base, mid, top)}
    if killed_before_noting:
        for module in (concluding, recorded, settling):
            monkeypatch.setattr(module, "note_deleted", lambda *_: None, raising=False)
    options = MergeOptions(delete=True, direction=direction)
    chainmerge.merge(top, base, options=options)
    result = base if direction == "commit" else top
    assert not mid.exists()
    made_again(mid, numbers[mid])
    create(mid, 8 * MIB)
    assert mid.stat().st_ino == numbers[mid]
    qemu_io(mid, "write -P 99 0 8M")
    fresh = content(mid)
    again = chainmerge.merge(top, base, options=options)
    assert again.outcome is MergeOutcome.ALREADY_MERGED
    assert again.deleted == ()
    assert content(mid) == fresh
    assert content(result) == expected


@pytest.fixture
def without_evidence(without_births: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system that has no handles either, as those in user space have none that last."""
    monkeypatch.setattr("chainmerge.records.identity._LASTING_HANDLES", frozenset())
    return without_births


def test_where_nothing_tells_nothing_is_deleted_or_done(without_evidence: Path) -> None:
    base, mid, top = chain(without_evidence, "base", "mid", "top")
    expected = content(top)
    report = chainmerge.merge(top, base, options=DELETE)
    assert set(report.deleted) == {str(mid), str(top)}
    assert content(base) == expected
    with pytest.raises(LeftoverUnclear):
        chainmerge.merge(top, base, options=DELETE)
    merged_record_file(top).unlink()
    with pytest.raises(ImageMissing):
        chainmerge.merge(top, base, options=DELETE)


def test_saved_bitmaps_of_who_knows_which_image(without_evidence: Path) -> None:
    base, top = chain(without_evidence, "base", "top")
    for image in (base, top):
        qemu_img("bitmap", "--add", image, "cp")
    options = MergeOptions(engine="qemu")
    killed_at(by_qemu, "_copy", lambda: chainmerge.merge(top, options=options))
    with pytest.raises(LeftoverUnclear) as refused:
        chainmerge.merge(top, options=options)
    with pytest.raises(LeftoverUnclear):
        chainmerge.plan(top, options=options)
    assert bitmap_names(base)["cp"]["flags"] == []
    Path(refused.value.file).unlink()
    chainmerge.merge(top, options=options)


# Block devices under other numbers


@pytest.fixture
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "state"
    monkeypatch.setattr(state_files, "STATE_DIRECTORY", directory)
    return directory


def _attached(stack: contextlib.ExitStack, file: Path, link: Path) -> Path:
    """A loop device over *file*, behind a link, as those of udev are."""
    device = stack.enter_context(loop_device(file, 32 * MIB))
    link.unlink(missing_ok=True)
    link.symlink_to(device)
    return device


def test_saved_bitmaps_of_a_device_are_found_under_another_number(tmp_path: Path) -> None:
    volume, link, top = tmp_path / "volume", tmp_path / "lv", tmp_path / "top.qcow2"
    with contextlib.ExitStack() as stack:
        _attached(stack, volume, link)
        create(link, 8 * MIB)
        qemu_img("bitmap", "--add", link, "cp")
        qemu_io(link, "write -P 1 0 1M")
        create(top, backing=str(link))
        qemu_img("bitmap", "--add", top, "cp")
        qemu_io(top, "write -P 2 4M 1M")
        options = MergeOptions(engine="qemu")
        killed_at(by_qemu, "_copy", lambda: chainmerge.merge(top, None, DEVICES, options))
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(loop_device(tmp_path / "other", 32 * MIB))
        second = _attached(stack, volume, link)
        assert len({other, second}) == 2
        (found,) = chainmerge.status([top]).merges
        run_verbatim(found.command, tmp_path)
        assert bitmap_names(link)["cp"]["flags"] == ["auto"]
        starts = {run.start // MIB for run in dirty_ranges(link, "cp")}
        assert starts == {0, 4}


@pytest.mark.usefixtures("state_directory")
def test_a_live_merge_of_before_is_found_under_the_name_of_the_node(tmp_path: Path) -> None:
    link, top = tmp_path / "lv", tmp_path / "top.qcow2"
    with contextlib.ExitStack() as stack:
        device = _attached(stack, tmp_path / "volume", link)
        create(link, 8 * MIB)
        create(top, backing=str(link))
        qemu_io(top, "write -P 2 0 1M")
        name = f"{str(device).strip('/').replace('/', '-')}.{LIVE_JOURNAL.suffix}"
        write_state(state_files.STATE_DIRECTORY / name, pivoted(link, top))
        qemu_io(link, "write -P 9 0 1M")
        newer = content(link)
        with pytest.raises(LivePivotUnclear):
            chainmerge.merge(top, None, DEVICES)
        in_base = Access(allow_backing=("/dev",), active=str(link))
        assert chainmerge.merge(top, None, in_base).outcome is MergeOutcome.ALREADY_MERGED
        assert content(link) == newer
        assert not list(state_files.STATE_DIRECTORY.iterdir())


def test_a_live_merge_of_a_device_is_known_under_another_number(tmp_path: Path) -> None:
    """Old data of top must not go over what the guest wrote to base after the pivot."""
    volume, link, top = tmp_path / "volume", tmp_path / "lv", tmp_path / "top.qcow2"
    with contextlib.ExitStack() as stack:
        _attached(stack, volume, link)
        create(link, 8 * MIB)
        create(top, backing=str(link))
        qemu_io(top, "write -P 2 0 1M")
        save_live_journal(pivoted(link, top))
        qemu_io(link, "write -P 9 0 1M")
        newer = content(link)
    with contextlib.ExitStack() as stack:
        stack.enter_context(loop_device(tmp_path / "other", 32 * MIB))
        _attached(stack, volume, link)
        with pytest.raises(LivePivotUnclear) as unclear:
            chainmerge.merge(top, None, DEVICES)
        assert content(link) == newer
        run_verbatim(unclear.value.if_base, tmp_path)
        assert content(link) == newer
        assert load_live_journal(link) is None
        # The guest goes on, and somebody runs the first command again.
        qemu_io(link, "write -P 10 0 1M")
        newest = content(link)
        assert chainmerge.merge(top, None, DEVICES).outcome is MergeOutcome.ALREADY_MERGED
        assert content(link) == newest


@pytest.mark.usefixtures("state_directory")
def test_what_is_filed_under_a_node_is_not_taken_for_another_volumes(tmp_path: Path) -> None:
    link, top = tmp_path / "lv", tmp_path / "top.qcow2"
    with contextlib.ExitStack() as stack:
        device = _attached(stack, tmp_path / "volume", link)
        create(link, 8 * MIB)
        create(top, backing=str(link))
        qemu_io(top, "write -P 2 0 1M")
        expected = content(top)
        other = ImageIdentity(str(device), "block", 0, "LVM-another")
        foreign = msgspec.structs.replace(pivoted(link, top), base=other)
        name = f"{str(device).strip('/').replace('/', '-')}.{LIVE_JOURNAL.suffix}"
        file = state_files.STATE_DIRECTORY / name
        write_state(file, foreign)
        assert chainmerge.merge(top, None, DEVICES).outcome is MergeOutcome.MERGED
        assert content(link) == expected
        assert file.exists()
