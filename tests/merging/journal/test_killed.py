# SPDX-License-Identifier: Apache-2.0
"""A native merge that was killed once base was switched is finished without reading data again."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import pytest
from msgspec.structs import replace

from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.merging import by_native
from chainmerge.merging.errors import LeftoverInUse
from chainmerge.options import Access, MergeOptions
from chainmerge.planning import already_merged
from chainmerge.records.merge_journal import journal_file
from tests.merging.journal.killed import (
    AFTER_SWITCH,
    LEVELS,
    OPTIONS,
    Images,
    Outcome,
    copy,
    dies_after,
    dies_once_called,
    killed,
    only,
    outcome,
    unfinished,
)
from tests.support.qemu import (
    content,
    create,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


BEFORE_SWITCH: dict[str, Callable[[], None]] = {
    "prepared": dies_once_called(by_native, "leaks_reclaimed"),
    "written": dies_once_called(by_native, "record_switching"),
    "switching": dies_after(by_native, "record_switching"),
}
REPOINTING = {"repoint", "repointed one"}
NAMING = {"rename", "renamed"}
DELETING = {"deleted one"}
RECORDED = {"delete", "deleted", "tidy"}


def _happens(levels: int, point: str, options: MergeOptions) -> bool:
    if point in NAMING:
        return options.keep_name
    if point in DELETING:
        return options.delete and (levels > 1 or not options.keep_name)
    if point in REPOINTING:
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
    images, options = copy(templates[levels], tmp_path / "it"), OPTIONS[name]
    killed(images, options, AFTER_SWITCH[point])
    assert content(images.leaf) == outcomes[levels, name]["leaf"]
    assert journal_file(images.base).exists()
    merge = only(unfinished(images.directory))
    assert merge.base_holds_data is not False
    # Between the switch of top's header and the entry in the journal, only the images tell.
    if (levels, name, point) != (2, "neither", "repointed one"):
        monkeypatch.setattr(already_merged, "base_shows_all", _never)
    events: list[ProgressEvent] = []
    report = images.merge(options, on_progress=events.append)
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    assert report.bytes_copied == 0
    assert not {event.stage for event in events} & {Stage.COPY, Stage.VERIFY}
    assert not report.warnings
    assert outcome(images, options) == outcomes[levels, name]
    assert not _small_files(images, ("journal", "saved"))
    assert not unfinished(images.directory)


@pytest.mark.parametrize("place", ["beside it", "elsewhere"])
def test_an_image_that_is_left_to_be_deleted_got_an_overlay(
    templates: dict[int, Images], tmp_path: Path, place: str
) -> None:
    images = copy(templates[2], tmp_path / "it")
    options = MergeOptions(delete=True)
    killed(images, options, AFTER_SWITCH["deleted one"])
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
    images, options = copy(templates[levels], tmp_path / "it"), OPTIONS[name]
    killed(images, options, AFTER_SWITCH[point])
    journal_file(images.base).unlink()
    # Nobody knows any more whose leaked clusters these are, so nobody frees them unasked.
    report = images.merge(replace(options, reclaim=True))
    assert report.outcome is MergeOutcome.ALREADY_MERGED
    found, expected = outcome(images, options), outcomes[levels, name]
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
    images, options = copy(templates[levels], tmp_path / "it"), OPTIONS[name]
    killed(images, options, BEFORE_SWITCH[point])
    merge = only(unfinished(images.directory))
    assert merge.base_holds_data is False
    report = images.merge(options)
    assert report.outcome is MergeOutcome.MERGED
    assert report.bytes_copied > 0
    assert outcome(images, options) == outcomes[levels, name]
    assert not _small_files(images, ("journal", "saved"))


def _small_files(images: Images, kinds: tuple[str, ...]) -> list[Path]:
    return [file for kind in kinds for file in images.directory.glob(f".*.chainmerge-{kind}")]
