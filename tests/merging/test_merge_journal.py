# SPDX-License-Identifier: Apache-2.0
"""A native merge that was killed once base was switched is finished without reading data again."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import pytest

import chainmerge
from chainmerge.documents.merge import MergeOutcome, MergeReport
from chainmerge.documents.plan import EngineName
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import Interrupted
from chainmerge.merging import by_native, concluding, resuming, settling
from chainmerge.merging.errors import LeftoverInUse
from chainmerge.options import Access, MergeOptions
from chainmerge.planning import already_merged
from chainmerge.records import files as state_files
from chainmerge.records import merge_journal
from chainmerge.records.identity import identify, same_image
from chainmerge.records.merge_journal import JournalState, journal_file, load_journal
from chainmerge.records.saved_bitmaps import saved_bitmaps_file
from chainmerge.records.unfinished import UNKNOWN
from tests.support.loopdev import loop_device
from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    content,
    create,
    dirty_ranges,
    info,
    qemu_img,
    qemu_io,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.documents.status import UnfinishedMerge

MIB = 1 << 20
# The package has a function of that name.
native_commit = importlib.import_module("chainmerge.engines.native.commit")
OPTIONS = {
    "neither": MergeOptions(),
    "delete": MergeOptions(delete=True),
    "keep-name": MergeOptions(direction="commit", keep_name=True),
    "both": MergeOptions(delete=True, direction="commit", keep_name=True),
}
LEVELS = (1, 2)


@dataclass(frozen=True)
class Images:
    """A chain base <- (mid <-) top <- leaf."""

    directory: Path
    levels: int

    @property
    def base(self) -> Path:
        return self.directory / "base.qcow2"

    @property
    def top(self) -> Path:
        return self.directory / "top.qcow2"

    @property
    def leaf(self) -> Path:
        return self.directory / "leaf.qcow2"

    def result(self, options: MergeOptions) -> Path:
        return self.top if options.keep_name else self.base

    def merge(self, options: MergeOptions, **more: Any) -> MergeReport:
        return chainmerge.merge(self.top, self.base, options=options, **more)


def _build(directory: Path, levels: int) -> Images:
    directory.mkdir()
    images = Images(directory, levels)
    create(images.base, 8 * MIB)
    for name in ("everywhere", "broken", "stale"):
        qemu_img("bitmap", "--add", images.base, name)
    qemu_io(images.base, "write -P 1 0 2M", "write -P 1 7M 64k")
    qemu_img("bitmap", "--disable", images.base, "broken")
    below = images.base
    if levels == 2:
        mid = create(directory / "mid.qcow2", backing=below.name)
        for name in ("everywhere", "broken"):
            qemu_img("bitmap", "--add", mid, name)
        qemu_io(mid, "write -P 2 1M 2M")
        below = mid
    create(images.top, backing=below.name)
    # "new" is in top and above only: once base has it, an image in between is a gap.
    for name in ("everywhere", "new", "broken"):
        qemu_img("bitmap", "--add", images.top, name)
    qemu_io(images.top, "write -P 3 2M 2M", "write -z 7M 64k")
    create(images.leaf, backing=images.top.name)
    for name in ("everywhere", "new"):
        qemu_img("bitmap", "--add", images.leaf, name)
    qemu_io(images.leaf, "write -P 4 4M 1M")
    return images


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Images]:
    directory = tmp_path_factory.mktemp("templates")
    return {levels: _build(directory / str(levels), levels) for levels in LEVELS}


Outcome = dict[str, Any]


def _outcome(images: Images, options: MergeOptions) -> Outcome:
    """All that a merge decides about."""
    result = images.result(options)
    assert_clean(result)
    bitmaps = bitmap_names(result)
    return {
        "leaf": content(images.leaf),
        "result": content(result),
        "flags": {name: bitmap["flags"] for name, bitmap in bitmaps.items()},
        "bits": {
            name: dirty_ranges(result, name)
            for name, bitmap in bitmaps.items()
            if bitmap["flags"] == ["auto"]
        },
        "images": sorted(path.name for path in images.directory.glob("*.qcow2")),
        "backing": {
            path.name: info(path).get("backing-filename")
            for path in images.directory.glob("*.qcow2")
        },
    }


@pytest.fixture(scope="module")
def outcomes(
    templates: dict[int, Images], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], Outcome]:
    """What merges come to that nobody interrupts."""
    directory = tmp_path_factory.mktemp("outcomes")
    found = {}
    for levels, template in templates.items():
        for name, options in OPTIONS.items():
            images = _copy(template, directory / f"{levels}-{name}")
            images.merge(options)
            found[levels, name] = _outcome(images, options)
            assert not journal_file(images.base).exists()
    return found


def _unfinished(path: Path) -> tuple[UnfinishedMerge, ...]:
    """Without those that other tests do on devices at the same time."""
    found = chainmerge.status([path]).merges
    return tuple(merge for merge in found if not merge.base.startswith("/dev/"))


def _copy(images: Images, directory: Path) -> Images:
    shutil.copytree(images.directory, directory)
    return Images(directory, images.levels)


def _die(*_args: object, **_more: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _dies_once_called(module: Any, name: str) -> Callable[[], None]:
    assert hasattr(module, name)
    return lambda: setattr(module, name, _die)


def _dies_after(module: Any, name: str) -> Callable[[], None]:
    def arrange() -> None:
        original = getattr(module, name)

        def then_die(*args: Any, **more: Any) -> None:
            original(*args, **more)
            _die()

        setattr(module, name, then_die)

    return arrange


# Where a merge can be killed once base is switched, in order.
AFTER_SWITCH: dict[str, Callable[[], None]] = {
    "release": _dies_once_called(native_commit, "_release"),
    "released": _dies_after(native_commit, "_release"),
    "switched": _dies_once_called(concluding, "settle"),
    "repoint": _dies_once_called(settling, "repoint"),
    "repointed one": _dies_after(settling, "change_backing"),
    "record": _dies_once_called(settling, "record_intent"),
    "recorded": _dies_after(settling, "record_intent"),
    "rename": _dies_once_called(settling, "rename_base"),
    "renamed": _dies_after(settling, "rename_base"),
    "delete": _dies_once_called(settling, "delete_recorded"),
    "deleted one": _dies_after(Path, "unlink"),
    "deleted": _dies_after(settling, "delete_recorded"),
    "forget": _dies_once_called(settling, "forget_saved_bitmaps"),
    "tidy": _dies_once_called(concluding, "_drop_spent_tombstones"),
    "tidied": _dies_after(concluding, "replace_bitmaps"),
    "give back": _dies_once_called(concluding, "give_back"),
    "end": _dies_once_called(concluding, "forget_journal"),
}
BEFORE_SWITCH: dict[str, Callable[[], None]] = {
    "prepared": _dies_once_called(by_native, "leaks_reclaimed"),
    "written": _dies_once_called(by_native, "record_switching"),
    "switching": _dies_after(by_native, "record_switching"),
}
NAMING = {"rename", "renamed"}
DELETING = {"deleted one"}
RECORDED = {"delete", "deleted", "tidy"}


def _happens(levels: int, point: str, options: MergeOptions) -> bool:
    if point in NAMING:
        return options.keep_name
    if point in DELETING:
        return options.delete and (levels > 1 or not options.keep_name)
    if point == "repointed one":
        # With the name kept, all children stay as they are.
        return not options.keep_name
    if point == "tidied":
        return options.delete or options.keep_name
    return point not in RECORDED or options.delete or options.keep_name


POINTS = [
    (levels, name, point)
    for levels in LEVELS
    for name, options in OPTIONS.items()
    for point in AFTER_SWITCH
    if _happens(levels, point, options)
]


def _killed(images: Images, options: MergeOptions, arrange: Callable[[], None]) -> None:
    """Merge in a child process that kills itself where *arrange* made it to."""
    pid = os.fork()
    if pid == 0:
        try:
            arrange()
            images.merge(options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def _never(*_args: object, **_more: object) -> NoReturn:
    raise AssertionError("content was compared")


@pytest.mark.parametrize(("levels", "name", "point"), POINTS)
def test_killed_after_the_switch(
    templates: dict[int, Images],
    outcomes: dict[tuple[int, str], Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    levels: int,
    name: str,
    point: str,
) -> None:
    images, options = _copy(templates[levels], tmp_path / "it"), OPTIONS[name]
    _killed(images, options, AFTER_SWITCH[point])
    assert content(images.leaf) == outcomes[levels, name]["leaf"]
    assert journal_file(images.base).exists()
    merge = _only(_unfinished(images.directory))
    assert merge.base_holds_data is not False
    # Between the switch of top's header and the entry in the journal, only the images tell.
    if (levels, name, point) != (2, "neither", "repointed one"):
        monkeypatch.setattr(already_merged, "first_difference", _never)
    events: list[ProgressEvent] = []
    report = images.merge(options, on_progress=events.append)
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert report.bytes_copied == 0
    assert not {event.stage for event in events} & {Stage.COPY, Stage.VERIFY}
    assert not report.warnings
    assert _outcome(images, options) == outcomes[levels, name]
    assert not _small_files(images, ("journal", "saved"))
    assert not _unfinished(images.directory)


@pytest.mark.parametrize("place", ["beside it", "elsewhere"])
def test_an_image_that_is_left_to_be_deleted_got_an_overlay(
    templates: dict[int, Images], tmp_path: Path, place: str
) -> None:
    images = _copy(templates[2], tmp_path / "it")
    options = MergeOptions(delete=True)
    _killed(images, options, AFTER_SWITCH["deleted one"])
    left = images.directory / "mid.qcow2"
    assert not images.top.exists()
    directory = tmp_path / place
    directory.mkdir()
    overlay = create(directory / "new.qcow2", backing=left)
    if place == "beside it":
        overlay = overlay.rename(images.directory / overlay.name)
    access = Access(search=(str(directory),))
    with pytest.raises(LeftoverInUse, match=r"mid\.qcow2.*new\.qcow2"):
        images.merge(options, access=access)
    assert left.exists()
    overlay.unlink()
    assert images.merge(options, access=access).deleted == (str(left),)


@pytest.mark.parametrize(("levels", "name", "point"), POINTS)
def test_the_journal_is_lost(
    templates: dict[int, Images],
    outcomes: dict[tuple[int, str], Outcome],
    tmp_path: Path,
    levels: int,
    name: str,
    point: str,
) -> None:
    images, options = _copy(templates[levels], tmp_path / "it"), OPTIONS[name]
    _killed(images, options, AFTER_SWITCH[point])
    journal_file(images.base).unlink()
    # Nobody knows any more whose leaked clusters these are, so nobody frees them unasked.
    report = images.merge(replace(options, reclaim=True))
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    found, expected = _outcome(images, options), outcomes[levels, name]
    # Who loses top and the journal at once may keep tombstones that nothing needs.
    for spent in found["flags"].keys() - expected["flags"].keys():
        assert found["flags"].pop(spent) == []
    assert found == expected


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("point", BEFORE_SWITCH)
def test_killed_before_the_switch(
    templates: dict[int, Images],
    outcomes: dict[tuple[int, str], Outcome],
    tmp_path: Path,
    levels: int,
    name: str,
    point: str,
) -> None:
    images, options = _copy(templates[levels], tmp_path / "it"), OPTIONS[name]
    _killed(images, options, BEFORE_SWITCH[point])
    merge = _only(_unfinished(images.directory))
    assert merge.base_holds_data is False
    report = images.merge(options)
    assert report.outcome is MergeOutcome.MERGED
    assert report.bytes_copied > 0
    assert _outcome(images, options) == outcomes[levels, name]
    assert not _small_files(images, ("journal", "saved"))


def _only(merges: tuple[UnfinishedMerge, ...]) -> UnfinishedMerge:
    assert len(merges) == 1
    return merges[0]


def _small_files(images: Images, kinds: tuple[str, ...]) -> list[Path]:
    return [file for kind in kinds for file in images.directory.glob(f".*.chainmerge-{kind}")]


@pytest.fixture
def switched(templates: dict[int, Images], tmp_path: Path) -> Images:
    """A merge of one level that was killed when base was switched."""
    images = _copy(templates[1], tmp_path / "it")
    _killed(images, MergeOptions(), AFTER_SWITCH["switched"])
    return images


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


def test_another_request_is_planned_anew(switched: Images) -> None:
    report = switched.merge(MergeOptions(delete=True))
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert not switched.top.exists()
    assert info(switched.leaf)["backing-filename"] == "base.qcow2"


def test_a_delete_that_is_not_asked_for_again_is_not_done(
    templates: dict[int, Images], tmp_path: Path
) -> None:
    images = _copy(templates[2], tmp_path / "it")
    _killed(images, MergeOptions(delete=True), AFTER_SWITCH["record"])
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
    images, options = _copy(templates[2], tmp_path / "it"), OPTIONS["delete"]
    _killed(images, options, AFTER_SWITCH["repoint"])
    (tmp_path / "link").symlink_to(images.directory)
    report = Images(tmp_path / "link", 2).merge(options)
    assert report.plan is None
    assert len(report.repointed) == 1
    assert _outcome(images, options) == outcomes[2, "delete"]


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
    merge = _only(_unfinished(switched.base))
    assert merge.base_holds_data is None
    assert merge.command is None
    assert merge.warnings
    report = switched.merge(MergeOptions())
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert any("another image" in warning for warning in report.warnings)
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
    merge = _only(_unfinished(switched.directory))
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
    images = _copy(templates[1], tmp_path / "it")
    seen: list[Stage] = []
    with pytest.raises(Interrupted):
        images.merge(
            MergeOptions(),
            on_progress=lambda event: seen.append(event.stage),
            should_stop=lambda: stage in seen,
        )
    assert not journal_file(images.base).exists()


def test_cancelled_after_the_switch(templates: dict[int, Images], tmp_path: Path) -> None:
    images = _copy(templates[1], tmp_path / "it")
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
            settling.repoint = _die
            chainmerge.merge(top)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert _only(_unfinished(tmp_path)).base_holds_data
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
    images = _copy(templates[2], tmp_path / os.fsdecode(b"caf\xe9"))
    options = replace(OPTIONS[name], engine=engine)
    assert images.merge(options).outcome is MergeOutcome.MERGED
    assert _outcome(images, options) == outcomes[2, name]
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
    images = _copy(templates[2], tmp_path / "it")
    _killed(images, MergeOptions(), AFTER_SWITCH["forget"])
    assert saved_bitmaps_file(images.base).exists()
    merge = _only(_unfinished(images.top))
    assert len(merge.files) == 2


def test_a_loop_device_is_known_by_its_file(tmp_path: Path) -> None:
    seen = []
    for name in ("one", "other", "one"):
        with loop_device(tmp_path / name, MIB) as device:
            seen.append(identify(device))
    one, other, again = seen
    assert same_image(one, again)
    assert not same_image(one, other)
