# SPDX-License-Identifier: Apache-2.0
"""What records are read and printed: the commands that finish a merge, and the status."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.errors import Interrupted
from chainmerge.merging import by_native, by_qemu, concluding, settling
from chainmerge.options import Access, MergeOptions
from chainmerge.records.disks import disk_file
from chainmerge.records.merge_journal import journal_file, load_journal
from chainmerge.records.merged_record import load_merged_record, merged_record_file
from chainmerge.records.saved_bitmaps import SAVED_BITMAPS
from tests.records.killed import DELETE, chain, killed_at, run_verbatim
from tests.support.cli import chainmerge as command
from tests.support.qemu import bitmap_names, content, create, info, qemu_img, qemu_io

if TYPE_CHECKING:
    from chainmerge.documents.status import UnfinishedMerge


# The package has a function of that name.
native_commit = importlib.import_module("chainmerge.engines.native.commit")


# What is printed


def test_an_old_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A document of before: no handle, no request, no word of what was left."""
    base, top = chain(tmp_path, "base", "top")
    expected = content(top)
    killed_at(settling, "delete_recorded", lambda: chainmerge.merge(top, options=DELETE))
    file = merged_record_file(top)
    old = _of_before(json.loads(file.read_bytes()))
    file.write_text(json.dumps(old))
    (found,) = chainmerge.status([tmp_path]).merges
    run_verbatim(found.command, Path("/"))
    assert not top.exists()
    assert content(base) == expected
    assert chainmerge.merge(top, options=DELETE).outcome is MergeOutcome.ALREADY_MERGED


def test_an_old_journal_is_read_as_it_was_written(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    expected = content(top)
    killed_at(settling, "delete_recorded", lambda: chainmerge.merge(top, options=DELETE))
    merged_record_file(top).unlink()
    file = journal_file(base)
    file.write_text(json.dumps(_of_before(json.loads(file.read_bytes()))))
    (found,) = chainmerge.status([tmp_path]).merges
    assert found.base_holds_data
    run_verbatim(found.command, Path("/"))
    assert not top.exists()
    assert content(base) == expected


def test_an_old_entry_of_several_disks_is_read_as_it_was_written(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    entry = {
        "base": str(base),
        "top": str(top),
        "disks": [str(top), "/other"],
        "command": "chainmerge merge -- /as it was",
        "done": False,
    }
    disk_file(base).write_text(json.dumps(entry))
    (found,) = chainmerge.status([tmp_path]).merges
    assert found.command == entry["command"]


def _of_before(document: Any) -> Any:
    """The same, without the fields that came later."""
    if isinstance(document, list):
        return [_of_before(one) for one in document]
    if not isinstance(document, dict):
        return document
    later = {
        "handle",
        "boot",
        "request",
        "left",
        "onto",
        "old_sector",
        "copied",
        "by",
        "written_over",
    }
    return {
        name: _of_before(value)
        for name, value in document.items()
        if name not in later or (name == "boot" and "state" in document)
    }


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_the_options_of_the_request_are_printed(
    tmp_path: Path, moment: str, direction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backing file elsewhere, named only by an option, and paths that are relative."""
    away, here = tmp_path / "away", tmp_path / "here"
    away.mkdir()
    here.mkdir()
    (base,) = chain(away, "base")
    top = create(here / "top.qcow2", backing=str(base))
    qemu_io(top, "write -P 7 1M 1M")
    expected = content(top)
    monkeypatch.chdir(here)
    access = Access(allow_backing=("../away",), lock_wait=3.5, sole_user=True)
    options = MergeOptions(direction=direction, delete=True, detect_zeroes=True, bandwidth=1 << 30)

    def merge() -> object:
        return chainmerge.merge("top.qcow2", access=access, options=options)

    if moment == "before":
        killed_at(native_commit, "_switch", merge)
    else:
        killed_at(concluding if direction == "pull" else settling, "delete_recorded", merge)
    (found,) = _unfinished(away, here)
    assert found.command is not None
    options_asked = ("--lock-wait 3.5", "--sole-user", "--detect-zeroes", "--bandwidth")
    for words in ("--allow-backing", *options_asked):
        assert words in found.command
    run_verbatim(found.command, Path("/"))
    assert _unfinished(away, here) == []
    result = base if direction == "commit" else top
    assert content(result) == expected
    assert not (top if direction == "commit" else base).exists()


def _unfinished(*directories: Path) -> list[UnfinishedMerge]:
    return list(chainmerge.status(directories).merges)


@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_what_is_printed_of_several_disks_goes_the_same_way(tmp_path: Path, direction: Any) -> None:
    disks = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        disks.append(chain(tmp_path / name, "base", "top"))
    tops, bases = [disk[1] for disk in disks], [disk[0] for disk in disks]
    shown = [(content(base), content(top)) for base, top in disks]
    options = MergeOptions(direction=direction)
    killed_at(by_native, "commit_natively", lambda: chainmerge.merge_disks(tops, options=options))
    found = _unfinished(tmp_path / "one", tmp_path / "two")
    assert {merge.base for merge in found} == {str(base) for base in bases}
    assert len({merge.command for merge in found}) == 1
    run_verbatim(found[0].command, Path("/"))
    for (base, top), (below, whole) in zip(disks, shown, strict=True):
        assert content(top) == whole
        assert content(base) == (below if direction == "pull" else whole)
    assert _unfinished(tmp_path / "one", tmp_path / "two") == []


def test_saved_bitmaps_name_the_command(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    for image in (base, top):
        qemu_img("bitmap", "--add", image, "cp")
    options = MergeOptions(engine="qemu", delete=True)
    killed_at(by_qemu, "_copy", lambda: chainmerge.merge(top, options=options))
    (found,) = chainmerge.status([tmp_path]).merges
    assert (found.base, found.top) == (str(base), str(top))
    assert str(SAVED_BITMAPS.place(base)) in found.files
    run_verbatim(found.command, Path("/"))
    assert not top.exists()
    assert bitmap_names(base)["cp"]["flags"] == ["auto"]


def test_names_that_no_shell_takes_as_they_are(tmp_path: Path) -> None:
    directory = tmp_path / "two words\nand $(more) 'quotes'"
    directory.mkdir()
    base, top = chain(directory, "base", "top")
    killed_at(by_native, "commit_natively", lambda: chainmerge.merge(top, options=DELETE))
    shown = command("status", directory, COLUMNS="40").out
    line = next(line for line in shown.splitlines() if "chainmerge merge" in line)
    run_verbatim(line.strip(), Path("/"))
    assert base.exists()
    assert not top.exists()


@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_a_stop_right_after_the_switch_says_so(tmp_path: Path, direction: Any) -> None:
    base, top = chain(tmp_path, "base", "top")
    expected = content(top)
    options = MergeOptions(direction=direction, delete=True)
    result = base if direction == "commit" else top
    with pytest.raises(Interrupted) as stopped:
        chainmerge.merge(
            top,
            options=options,
            should_stop=lambda: (
                "switched" in _states(base) or not info(top).get("backing-filename")
            ),
        )
    assert stopped.value.state.startswith(f"{result} holds everything, verified")
    assert content(top) == expected
    assert chainmerge.merge(top, options=options).deleted


def _states(base: Path) -> list[str]:
    journal = load_journal(base)
    return [] if journal is None else [journal.state]


# Status


def test_status_of_what_is_not_there(tmp_path: Path) -> None:
    chain(tmp_path, "base", "top")
    ran = command("status", "--json", tmp_path / "nosuch")
    assert (ran.status, ran.json["code"]) == (3, "image-missing")
    ran = command("status", "--json", tmp_path / "base.qcow2", tmp_path / "nosuch")
    assert ran.status == 3


def test_status_of_a_top_that_was_deleted(tmp_path: Path) -> None:
    _base, top = chain(tmp_path, "base", "top")
    chainmerge.merge(top, options=DELETE)
    assert chainmerge.status([top]).merges == ()
    record = load_merged_record(top)
    assert record is not None
    # What was deleted is no wish any more.
    assert record.delete == []


def test_status_looks_below(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    _base, top = chain(below, "base", "top")
    killed_at(by_native, "commit_natively", lambda: chainmerge.merge(top))
    # Neither a loop nor what is elsewhere is followed.
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    report = chainmerge.status([tmp_path])
    assert [merge.top for merge in report.merges] == [str(top)]
    assert report.not_searched == ()


def test_status_says_what_it_did_not_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        (tmp_path / str(number)).mkdir()
    monkeypatch.setattr("chainmerge.records.unfinished._MOST_DIRECTORIES", 3)
    (sentence,) = chainmerge.status([tmp_path]).not_searched
    assert "more than 3 directories" in sentence
    walk = os.scandir

    def refuse(directory: Any) -> Any:
        if Path(directory).name == "1":
            raise PermissionError(13, "Permission denied")
        return walk(directory)

    monkeypatch.setattr("chainmerge.records.unfinished._MOST_DIRECTORIES", 100)
    monkeypatch.setattr(os, "scandir", refuse)
    (sentence,) = chainmerge.status([tmp_path]).not_searched
    assert sentence.startswith(f"{tmp_path / '1'} was not searched")
