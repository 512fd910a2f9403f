# SPDX-License-Identifier: Apache-2.0
"""What an earlier run left is used for the images that it is of, and for no others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.errors import Refused
from chainmerge.merging import by_qemu, journal
from chainmerge.options import MergeOptions
from chainmerge.records.errors import BitmapsSetAside, MergedBefore
from chainmerge.records.merged_record import merged_record_file
from tests.records.killed import DELETE, chain, killed_at, killed_at_call
from tests.support.cli import chainmerge as command
from tests.support.qemu import content, create, dirty_ranges, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path


# Top that stays


@pytest.mark.parametrize("engine", ["native", "qemu"])
def test_top_that_stays_is_not_merged_over_what_base_got_since(tmp_path: Path, engine: Any) -> None:
    base, top = chain(tmp_path, "base", "top")
    options = MergeOptions(engine=engine)
    chainmerge.merge(top, base, options=options)
    for image in (base, top):
        found = chainmerge.plan_repair(image)
        assert (found.findings, found.warnings) == ((), ())
    assert chainmerge.merge(top, base, options=options).outcome is MergeOutcome.ALREADY_MERGED
    assert chainmerge.plan(top, base, options=options).refusals == ()
    qemu_io(base, "write -P 77 2M 64k")
    newer = content(base)
    assert "merged-before" in {
        one.code for one in chainmerge.plan(top, base, options=options).refusals
    }
    for asked in (options, MergeOptions(engine=engine, delete=True)):
        with pytest.raises(MergedBefore):
            chainmerge.merge(top, base, options=asked)
    assert content(base) == newer
    # It is the guest's image after all.
    expected = content(top)
    chainmerge.merge(top, base, options=MergeOptions(engine=engine, despite_newer_base=True))
    assert content(base) == expected


def test_top_that_stays_does_not_take_what_base_got_since_along(tmp_path: Path) -> None:
    """Also where the guest has written over most of what was merged."""
    base, top = chain(tmp_path, "base", "top")
    pull = MergeOptions(direction="pull", delete=True)
    chainmerge.merge(top, base)
    qemu_io(base, "write -P 77 0 8M")
    newer = content(base)
    with pytest.raises(MergedBefore):
        chainmerge.merge(top, base, options=pull)
    assert "merged-before" in {
        one.code for one in chainmerge.plan(top, base, options=pull).refusals
    }
    assert content(base) == newer


def test_a_range_that_stays_is_not_merged_over_what_base_got_since(tmp_path: Path) -> None:
    base, mid, top = chain(tmp_path, "base", "mid", "top")
    chainmerge.merge(top, base)
    qemu_io(base, "write -P 77 2M 64k")
    newer = content(base)
    for overlay in (mid, top):
        with pytest.raises(Refused):
            chainmerge.merge(overlay, base)
    mid.unlink()
    with pytest.raises(MergedBefore):
        chainmerge.merge(top, base)
    assert content(base) == newer


def test_top_that_is_written_to_is_merged_again(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    chainmerge.merge(top)
    qemu_io(top, "write -P 77 2M 64k")
    expected = content(top)
    assert chainmerge.merge(top).outcome is MergeOutcome.MERGED
    assert content(base) == expected


def test_another_overlay_under_the_name_of_top_is_merged(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    chainmerge.merge(top)
    qemu_io(base, "write -P 5 5M 64k")
    top.unlink()
    create(top, backing=base.name)
    qemu_io(top, "write -P 77 2M 64k")
    expected = content(top)
    assert chainmerge.merge(top).outcome is MergeOutcome.MERGED
    assert content(base) == expected


def test_a_commit_of_others_that_was_killed_is_seen_beside_a_record(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    chainmerge.merge(top)
    # The guest goes on with top, and somebody else's commit of that is killed.
    qemu_io(top, "write -P 77 2M 4M")
    qemu_io(base, "write -P 77 2M 1M", "write -P 2 1M 1M")
    assert len(chainmerge.plan_repair(base).warnings) == 1


# Pulls


def test_a_later_pull_of_another_image_under_the_same_name(tmp_path: Path) -> None:
    root, base, top = chain(tmp_path, "root", "base", "top")
    pull = MergeOptions(direction="pull", delete=True)
    chainmerge.merge(top, options=pull)
    assert chainmerge.merge(top, options=pull).outcome is MergeOutcome.ALREADY_MERGED
    assert not base.exists()
    # A snapshot is put in below: the image that top stands on is another one of that name.
    moved = root.rename(tmp_path / "older.qcow2")
    create(root, backing=moved.name)
    expected = content(top)
    report = chainmerge.merge(top, options=pull)
    assert report.outcome is MergeOutcome.MERGED
    assert not root.exists()
    assert moved.exists()
    assert content(top) == expected


def test_a_pull_that_is_finished_after_its_switch_leaves_nothing_unfinished(tmp_path: Path) -> None:
    """Killed when it was about to note that nothing of it is leaked, with its images to delete."""
    root, top = chain(tmp_path, "root", "top")
    pull = MergeOptions(direction="pull", delete=True)
    expected = content(top)

    killed_at_call(journal, "record_pull", 2, lambda: chainmerge.merge(top, options=pull))
    assert len(chainmerge.status([tmp_path]).merges) == 1
    chainmerge.merge(top, root, options=pull)
    assert chainmerge.status([tmp_path]).merges == ()
    assert not root.exists()
    assert content(top) == expected


def test_a_record_that_makes_no_sense(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    chainmerge.merge(top, options=DELETE)
    file = merged_record_file(top)
    whole = json.loads(file.read_bytes())
    for spoilt in (
        {**whole, "result": f"{base}\0"},
        {**whole, "base": "\0"},
        {**whole, "delete": [{"path": "/a\0", "identity": whole["result_identity"]}]},
        {**whole, "superseded": {"images": [], "since": ""}},
    ):
        file.write_text(json.dumps(spoilt))
        ran = command("merge", "--json", "--delete", top)
        assert ran.json["code"] == "image-missing", ran.out
        assert command("status", "--json", top).status in (0, 3, 5)
        assert command("repair", "--json", base).status == 0


def test_checkpoints_that_are_set_aside_are_not_merged_past(tmp_path: Path) -> None:
    """Put back later, they would lack what the image below had recorded."""
    root, base, top = chain(tmp_path, "root", "base", "top")
    for number, image in enumerate((root, base, top)):
        qemu_img("bitmap", "--add", image, "cp")
        qemu_io(image, f"write -P 9 {number * 512}k 64k")
    written = {dirty.start for image in (root, base, top) for dirty in dirty_ranges(image, "cp")}
    options = MergeOptions(engine="qemu")
    killed_at(by_qemu, "_copy", lambda: chainmerge.merge(top, base, options=options))
    before = [image.read_bytes() for image in (root, base, top)]
    for asked in (MergeOptions(direction="pull"), MergeOptions()):
        with pytest.raises(BitmapsSetAside):
            chainmerge.merge(base, root, options=asked)
        assert "bitmaps-set-aside" in {
            one.code for one in chainmerge.plan(base, root, options=asked).refusals
        }
    assert [image.read_bytes() for image in (root, base, top)] == before
    chainmerge.merge(top, base, options=options)
    chainmerge.merge(base, root, options=MergeOptions(direction="pull"))
    assert {dirty.start for dirty in dirty_ranges(base, "cp")} >= written
