# SPDX-License-Identifier: Apache-2.0
"""What a journal is worth when images, requests or itself are not what they were."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pytest
from msgspec.structs import replace

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.plan import EngineName
from chainmerge.documents.progress import Stage
from chainmerge.errors import Interrupted
from chainmerge.merging import resuming, settling
from chainmerge.options import MergeOptions
from chainmerge.records import files as state_files
from chainmerge.records import merge_journal
from chainmerge.records.identity import identify, same_image
from chainmerge.records.live_journal import LiveState, live_journal_file, save_live_journal
from chainmerge.records.merge_journal import JournalState, journal_file, load_journal
from chainmerge.records.progress import UNKNOWN
from chainmerge.records.saved_bitmaps import saved_bitmaps_file
from tests.merging.journal.killed import (
    AFTER_SWITCH,
    MIB,
    OPTIONS,
    Images,
    Outcome,
    copy,
    die,
    killed,
    only,
    outcome,
    unfinished,
)
from tests.records.pivoted import pivoted
from tests.support.loopdev import loop_device
from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    content,
    create,
    info,
    qemu_io,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_what_a_guest_wrote_to_top_since_is_merged(switched: Images) -> None:
    """Into a cluster that top had: nothing but the file's times tells."""
    qemu_io(switched.top, "write -P 99 2M 64k")
    expected = content(switched.top)
    report = switched.merge(MergeOptions(delete=True))
    assert report.outcome is MergeOutcome.MERGED
    assert content(switched.base) == expected


def test_after_a_boot_content_is_compared(
    switched: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "this_boot", lambda: "another")
    report = switched.merge(MergeOptions())
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert report.plan is not None
    assert not journal_file(switched.base).exists()


def test_a_merge_that_a_vm_had_begun_is_finished_with_all_that_it_left(switched: Images) -> None:
    """The VM died while it copied, and so did the same merge, done cold, when base was switched."""
    pivot = pivoted(switched.base, switched.top)
    save_live_journal(msgspec.structs.replace(pivot, state=LiveState.COPYING))
    assert switched.merge(MergeOptions()).plan is None
    assert not live_journal_file(switched.base).exists()
    assert not unfinished(switched.directory)


def test_another_request_is_planned_anew(switched: Images) -> None:
    report = switched.merge(MergeOptions(delete=True))
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert not switched.top.exists()
    assert info(switched.leaf)["backing-filename"] == "base.qcow2"


def test_a_delete_that_is_not_asked_for_again_is_not_done(
    templates: dict[int, Images], tmp_path: Path
) -> None:
    images = copy(templates[2], tmp_path / "it")
    killed(images, MergeOptions(delete=True), AFTER_SWITCH["record"])
    images.merge(MergeOptions())
    assert images.top.exists()
    assert bitmap_names(images.base)["new"]["flags"] == ["auto"]


def test_a_child_that_came_since_is_repointed(switched: Images) -> None:
    late = create(switched.directory / "late.qcow2", backing="top.qcow2")
    expected = content(late)
    switched.merge(MergeOptions())
    assert info(late)["backing-filename"] == "base.qcow2"
    assert content(late) == expected


def test_the_same_images_by_other_names(
    templates: dict[int, Images], outcomes: dict[tuple[int, str], Outcome], tmp_path: Path
) -> None:
    images, options = copy(templates[2], tmp_path / "it"), OPTIONS["delete"]
    killed(images, options, AFTER_SWITCH["repoint"])
    (tmp_path / "link").symlink_to(images.directory)
    report = Images(tmp_path / "link", 2).merge(options)
    assert report.plan is None
    assert len(report.repointed) == 1
    assert outcome(images, options) == outcomes[2, "delete"]


def test_another_overlay(switched: Images, tmp_path: Path) -> None:
    """Top was committed by hand and replaced: what the journal says is of no use."""
    for image in (switched.leaf, switched.top):
        image.rename(tmp_path / image.name)
    create(switched.top, backing="base.qcow2")
    qemu_io(switched.top, "write -P 9 0 1M")
    before, expected = journal_file(switched.base).read_bytes(), content(switched.top)
    with pytest.raises(Interrupted):
        switched.merge(MergeOptions(engine="qemu"), should_stop=_at(Stage.PRUNE))
    assert journal_file(switched.base).read_bytes() == before
    report = switched.merge(MergeOptions(engine="qemu"))
    assert report.outcome is MergeOutcome.MERGED
    assert any("was not part of that merge" in warning for warning in report.warnings)
    assert content(switched.base) == expected
    assert not journal_file(switched.base).exists()


def _at(stage: Stage) -> Callable[[], bool]:
    """Says yes from the third question on: locks and plan are asked for before *stage*."""
    assert stage is Stage.PRUNE
    asked = iter(range(1000))
    return lambda: next(asked) >= 2


def test_another_base(switched: Images, tmp_path: Path) -> None:
    shutil.copy(switched.base, tmp_path / "copy")
    (tmp_path / "copy").replace(switched.base)
    merge = only(unfinished(switched.base))
    assert merge.base_holds_data is None
    assert merge.command is None
    assert merge.warnings
    report = switched.merge(MergeOptions())
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert any("another one" in warning for warning in report.warnings)
    assert not journal_file(switched.base).exists()


def _journal_with(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "truncated": lambda content: content[:-100],
    "garbage": lambda _: os.urandom(1000),
    "nested": lambda _: b"[" * 1_000_000,
    "number": lambda _: b"9" * 1_000_000,
    "another version": _journal_with(version=2),
    "no overlays": _journal_with(overlays=[]),
    "no path": _journal_with(delete=["relative"]),
    "NUL": _journal_with(rename=["/a\0", "/b"]),
    "surrogate": _journal_with(delete=["/\ud800"]),
    "wrong type": _journal_with(base=7),
    "unknown state": _journal_with(state="done"),
    "huge": lambda content: content + b" " * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_journal(switched: Images, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    file = journal_file(switched.base)
    damaged = DAMAGE[damage](file.read_bytes())
    file.write_bytes(damaged)
    if damage == "huge":
        monkeypatch.setattr(state_files, "_LARGEST", len(damaged) - 101)
    merge = only(unfinished(switched.directory))
    assert (merge.base, merge.state) == (str(switched.base), UNKNOWN)
    assert any("cannot be used" in warning for warning in merge.warnings)
    report = switched.merge(MergeOptions())
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert any("cannot be used" in warning for warning in report.warnings)
    assert not file.exists()
    assert_clean(switched.base)


def test_a_pipe_is_no_journal(switched: Images) -> None:
    file = journal_file(switched.base)
    file.unlink()
    os.mkfifo(file)
    report = switched.merge(MergeOptions())
    assert any("pipe" in warning for warning in report.warnings)


@pytest.mark.parametrize("stage", [Stage.COPY, Stage.VERIFY])
def test_cancelled(templates: dict[int, Images], tmp_path: Path, stage: Stage) -> None:
    images = copy(templates[1], tmp_path / "it")
    seen: list[Stage] = []
    with pytest.raises(Interrupted):
        images.merge(
            MergeOptions(),
            on_progress=lambda event: seen.append(event.stage),
            should_stop=lambda: stage in seen,
        )
    assert not journal_file(images.base).exists()


def test_cancelled_after_the_switch(templates: dict[int, Images], tmp_path: Path) -> None:
    images = copy(templates[1], tmp_path / "it")
    with pytest.raises(Interrupted):
        images.merge(MergeOptions(), should_stop=lambda: _state_of(images) == "switched")
    report = images.merge(MergeOptions())
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert report.plan is None


def _state_of(images: Images) -> str | None:
    journal = load_journal(images.base)
    return None if journal is None else journal.state


def test_raw_base(tmp_path: Path) -> None:
    base = create(tmp_path / "base.raw", 8 * MIB, fmt="raw")
    top = create(tmp_path / "top.qcow2", backing=base.name, backing_format="raw")
    qemu_io(top, "write -P 3 0 4M")
    expected = content(top)
    pid = os.fork()
    if pid == 0:
        try:
            settling.record_intent = die
            chainmerge.merge(top)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert only(unfinished(tmp_path)).base_holds_data
    report = chainmerge.merge(top)
    assert report.plan is None
    assert content(base, "raw") == expected
    assert not journal_file(base).exists()


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    base = create(tmp_path / os.fsdecode(b"b\xff.qcow2"), 8 * MIB)
    top = tmp_path / os.fsdecode(b"t\xff.qcow2")
    create(top, backing=base.name)
    chainmerge.merge(top)
    assert not journal_file(base).exists()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("engine", ["native", "qemu"])
def test_a_directory_whose_name_is_no_utf8(
    templates: dict[int, Images],
    outcomes: dict[tuple[int, str], Outcome],
    tmp_path: Path,
    engine: Literal["native", "qemu"],
    name: str,
) -> None:
    """It is in the paths of all that is kept for a rerun."""
    images = copy(templates[2], tmp_path / os.fsdecode(b"caf\xe9"))
    options = replace(OPTIONS[name], engine=engine)
    assert images.merge(options).outcome is MergeOutcome.MERGED
    assert outcome(images, options) == outcomes[2, name]
    assert images.merge(options).outcome is MergeOutcome.ALREADY_MERGED


def test_states_only_move_down_the_list(switched: Images) -> None:
    journal = load_journal(switched.base)
    assert journal is not None
    assert journal.engine == EngineName.NATIVE
    assert merge_journal.enter_state(None, JournalState.DELETE) is None
    entered = merge_journal.enter_state(journal, JournalState.DELETE)
    assert entered is not None
    assert load_journal(switched.base) == entered
    assert merge_journal.enter_state(entered, JournalState.REPOINT) is entered


def test_saved_bitmaps_wait_until_the_end(templates: dict[int, Images], tmp_path: Path) -> None:
    images = copy(templates[2], tmp_path / "it")
    killed(images, MergeOptions(), AFTER_SWITCH["forget"])
    assert saved_bitmaps_file(images.base).exists()
    merge = only(unfinished(images.top))
    assert len(merge.files) == 2


def test_a_loop_device_is_known_by_its_file(tmp_path: Path) -> None:
    seen = []
    for name in ("one", "other", "one"):
        with loop_device(tmp_path / name, MIB) as device:
            seen.append(identify(device))
    one, other, again = seen
    assert same_image(one, again)
    assert not same_image(one, other)
