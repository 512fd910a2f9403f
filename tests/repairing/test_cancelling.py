# SPDX-License-Identifier: Apache-2.0
"""Merges that are killed, and undone: everything is as if they had never begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.merging import by_native, by_qemu
from chainmerge.merging import journal as merging_journal
from chainmerge.options import Access, MergeOptions
from chainmerge.records.disks import disk_file
from chainmerge.records.merge_journal import journal_file
from chainmerge.records.saved_bitmaps import saved_bitmaps_file
from chainmerge.repairing import cancelling
from chainmerge.repairing.errors import CannotCancel, NothingToCancel
from chainmerge.storage.errors import ImageLocked
from chainmerge.storage.locks import LockMode, lock_image
from tests.merging.journal.killed import (
    AFTER_SWITCH,
    MIB,
    Images,
    build,
    copy,
    dies_after,
    dies_once_called,
    killed,
    native_commit,
    only,
    unfinished,
)
from tests.records.killed import chain, killed_at
from tests.records.killed import killed as killed_in
from tests.support.cli import chainmerge as command
from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    content,
    create,
    dirty_ranges,
    qemu_img,
    qemu_io,
)

if TYPE_CHECKING:
    from collections.abc import Callable

BEFORE_SWITCH: dict[str, Callable[[], None]] = {
    "prepared": dies_once_called(by_native, "leaks_reclaimed"),
    "filled": dies_once_called(native_commit, "_count"),
    "copied": dies_once_called(by_native, "verify_soundness"),
    "switching": dies_once_called(native_commit, "_switch"),
}
PULL = MergeOptions(direction="pull", delete=True)
COMMIT = MergeOptions(direction="commit", delete=True)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Images]:
    directory = tmp_path_factory.mktemp("templates")
    return {levels: build(directory / str(levels), levels) for levels in (1, 2)}


def everything(images: Images) -> dict[str, Any]:
    """What each image shows, and the bits of its bitmaps."""
    return {
        path.name: (
            content(path),
            {
                name: (bitmap["flags"], bitmap["flags"] == ["auto"] and dirty_ranges(path, name))
                for name, bitmap in bitmap_names(path).items()
            },
        )
        for path in sorted(images.directory.glob("*.qcow2"))
    }


def assert_as_never_begun(images: Images, before: dict[str, Any]) -> None:
    assert everything(images) == before
    for path in images.directory.glob("*.qcow2"):
        assert_clean(path)
    assert not [path.name for path in images.directory.iterdir() if path.name.startswith(".")]
    assert not unfinished(images.directory)


def assert_can_be_merged(images: Images, options: MergeOptions) -> None:
    expected = content(images.leaf)
    images.merge(options)
    assert content(images.leaf) == expected
    assert_clean(images.leaf)


@pytest.mark.parametrize(
    ("levels", "point"), [(1, "prepared"), (1, "filled"), (2, "copied"), (2, "switching")]
)
@pytest.mark.parametrize("options", [COMMIT, PULL], ids=["commit", "pull"])
def test_killed_before_the_switch(
    templates: dict[int, Images], tmp_path: Path, levels: int, point: str, options: MergeOptions
) -> None:
    images = copy(templates[levels], tmp_path / "it")
    before = everything(images)
    killed(images, options, BEFORE_SWITCH[point])
    merge = only(unfinished(images.directory))
    assert (merge.vm_may_start, merge.vm_image) == (True, str(images.top))
    assert merge.cancel_command == f"chainmerge cancel {images.top}"
    named = images.top if options is PULL else images.base
    ran = command("cancel", "--json", named)
    assert ran.status == 0, ran
    if point == "switching":
        assert ran.json["freed_bytes"] > 0
    assert_as_never_begun(images, before)
    assert_can_be_merged(images, options)


POINTS_OF_CANCEL: dict[str, Callable[[], None]] = {
    "begun": dies_once_called(cancelling, "reclaim_leaks"),
    "given back": dies_after(cancelling, "reclaim_leaks"),
    "cut": dies_after(cancelling, "cut_to_image_end"),
    "note": dies_after(cancelling, "forget_saved_bitmaps"),
    "journal": dies_once_called(cancelling, "forget_journal"),
}


@pytest.mark.parametrize("point", POINTS_OF_CANCEL)
def test_killed_while_it_is_undone(
    templates: dict[int, Images], tmp_path: Path, point: str
) -> None:
    images = copy(templates[2], tmp_path / "it")
    before = everything(images)
    killed(images, COMMIT, BEFORE_SWITCH["switching"])

    def dying() -> None:
        POINTS_OF_CANCEL[point]()
        chainmerge.cancel(images.top)

    killed_in(dying)
    assert only(unfinished(images.directory)).cancel_command is not None
    chainmerge.cancel(images.top)
    assert_as_never_begun(images, before)
    assert_can_be_merged(images, COMMIT)


def test_killed_pull_killed_while_it_is_undone(
    templates: dict[int, Images], tmp_path: Path
) -> None:
    images = copy(templates[1], tmp_path / "it")
    before = everything(images)
    killed(images, PULL, BEFORE_SWITCH["switching"])
    killed_at(cancelling, "forget_merged_record", lambda: chainmerge.cancel(images.top))
    chainmerge.cancel(images.top)
    assert_as_never_begun(images, before)


@pytest.mark.parametrize("point", ["release", "switched", "repoint", "recorded", "delete"])
def test_what_has_taken_effect_is_not_undone(
    templates: dict[int, Images], tmp_path: Path, point: str
) -> None:
    images = copy(templates[1], tmp_path / "it")
    expected = content(images.leaf)
    killed(images, COMMIT, AFTER_SWITCH[point])
    merge = only(unfinished(images.directory))
    assert merge.cancel_command is None
    before = everything(images)
    ran = command("cancel", "--json", images.base)
    assert (ran.status, ran.json["code"]) == (3, "cannot-cancel")
    assert merge.command is not None
    assert merge.command in ran.json["hint"]
    assert everything(images) == before
    images.merge(COMMIT)
    assert content(images.leaf) == expected


def test_a_pull_that_has_taken_effect_is_not_undone(
    templates: dict[int, Images], tmp_path: Path
) -> None:
    images = copy(templates[1], tmp_path / "it")
    killed(images, PULL, AFTER_SWITCH["release"])
    with pytest.raises(CannotCancel):
        chainmerge.cancel(images.top)


def test_nothing_is_known(templates: dict[int, Images]) -> None:
    with pytest.raises(NothingToCancel):
        chainmerge.cancel(templates[1].top)


def test_somebody_has_it_open(templates: dict[int, Images], tmp_path: Path) -> None:
    images = copy(templates[1], tmp_path / "it")
    killed(images, COMMIT, BEFORE_SWITCH["switching"])
    with lock_image(images.base, LockMode.READER, 0), pytest.raises(ImageLocked):
        chainmerge.cancel(images.top, Access(lock_wait=0))
    chainmerge.cancel(images.top)


def test_base_was_written_over(tmp_path: Path) -> None:
    """By QEMU's engine, or raw: top hides it, and only finishing it ends that."""
    base, top = chain(tmp_path, "base", "top")
    for image in (base, top):
        qemu_img("bitmap", "--add", image, "cp")
    expected = content(top)
    killed_at(
        by_qemu,
        "_store_bitmaps",
        lambda: chainmerge.merge(top, options=MergeOptions(engine="qemu")),
    )
    merge = only(unfinished(tmp_path))
    assert (merge.vm_may_start, merge.vm_image, merge.cancel_command) == (True, str(top), None)
    with pytest.raises(CannotCancel, match="neither the old nor the new"):
        chainmerge.cancel(base)
    # The other engine does not make base what it was by beginning.
    options = MergeOptions(engine="native")
    killed_at(native_commit, "_switch", lambda: chainmerge.merge(top, options=options))
    with pytest.raises(CannotCancel):
        chainmerge.cancel(base)
    # Nor does a second attempt of that one.
    killed_at(native_commit, "_switch", lambda: chainmerge.merge(top, options=options))
    saved_bitmaps_file(base).unlink(missing_ok=True)
    with pytest.raises(CannotCancel):
        chainmerge.cancel(base)
    assert content(top) == expected


def test_a_guest_wrote_after_the_switch(templates: dict[int, Images], tmp_path: Path) -> None:
    """The first attempt has taken effect, the second has not: base is not what it was."""
    images = copy(templates[1], tmp_path / "it")
    images.leaf.unlink()
    killed(images, MergeOptions(), AFTER_SWITCH["switched"])
    qemu_io(images.top, "write -P 9 5M 64k")
    killed(images, MergeOptions(), BEFORE_SWITCH["switching"])
    with pytest.raises(CannotCancel):
        chainmerge.cancel(images.top)


def test_a_raw_base(tmp_path: Path) -> None:
    base = create(tmp_path / "base.raw", 8 * MIB, fmt="raw")
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", top)
    qemu_io(top, "write -P 7 1M 1M")
    expected = content(top)
    killed_at(by_native, "verify_content", lambda: chainmerge.merge(top))
    merge = only(unfinished(tmp_path))
    assert (merge.vm_may_start, merge.vm_image, merge.cancel_command) == (True, str(top), None)
    with pytest.raises(CannotCancel):
        chainmerge.cancel(top)
    assert content(top) == expected


def test_one_of_several_disks(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        found.append(chain(tmp_path / name, "base", "top"))
    (first, one), (second, two) = found
    shown = [content(image) for image in (first, one, second, two)]
    killed_at(native_commit, "_switch", lambda: chainmerge.merge_disks([one, two]))
    assert len(unfinished(tmp_path)) == 2
    chainmerge.cancel(one)
    assert [merge.top for merge in unfinished(tmp_path)] == [str(two)]
    chainmerge.cancel(second)
    assert unfinished(tmp_path) == ()
    assert not disk_file(first).exists()
    assert not disk_file(second).exists()
    assert [content(image) for image in (first, one, second, two)] == shown


@pytest.mark.parametrize("options", [COMMIT, PULL], ids=["commit", "pull"])
def test_how_far_it_came(tmp_path: Path, options: MergeOptions) -> None:
    base, top = chain(tmp_path, "base", "top")

    def dying() -> None:
        merging_journal.SECONDS_BETWEEN = 0  # type: ignore[misc]
        dies_after(merging_journal, "_note")()
        chainmerge.merge(top, options=options)

    killed_in(dying)
    merge = only(unfinished(tmp_path))
    assert merge.bytes_done is not None
    assert merge.bytes_total is not None
    assert 0 < merge.bytes_done <= merge.bytes_total
    assert merge.rate
    assert merge.process is not None
    assert not merge.process.running
    shown = command("status", base).out
    assert "MiB of " in shown
    assert f"pid {merge.process.pid}" in shown


def test_an_old_journal_tells_less(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    killed_at(native_commit, "_switch", lambda: chainmerge.merge(top))
    file = journal_file(base)
    document = json.loads(file.read_bytes())
    for name in ("copied", "written_over"):
        del document[name]
    del document["request"]["by"]
    file.write_text(json.dumps(document))
    merge = only(unfinished(tmp_path))
    assert merge.process is None
    chainmerge.cancel(top)
    assert_clean(base)


VM_POINTS = [
    (1, "neither", "switched"),
    (1, "neither", "end"),
    (2, "delete", "released"),
    (1, "delete", "recorded"),
    (2, "delete", "deleted one"),
    (1, "delete", "deleted"),
    (1, "both", "recorded"),
    (2, "both", "renamed"),
    (1, "both", "tidy"),
]
VM_OPTIONS = {
    "neither": MergeOptions(),
    "delete": MergeOptions(delete=True),
    "both": MergeOptions(delete=True, direction="commit", keep_name=True),
}


@pytest.mark.parametrize(("levels", "name", "point"), VM_POINTS)
def test_a_guest_goes_on_where_it_is_told_to(
    templates: dict[int, Images], tmp_path: Path, levels: int, name: str, point: str
) -> None:
    """What it writes there is in the result once the merge is finished."""
    images, options = copy(templates[levels], tmp_path / "it"), VM_OPTIONS[name]
    images.leaf.unlink()
    killed(images, options, AFTER_SWITCH[point])
    merge = only(unfinished(images.directory))
    assert merge.vm_may_start, merge
    assert merge.vm_image is not None
    assert merge.command is not None
    qemu_io(Path(merge.vm_image), "write -P 9 5M 64k")
    expected = content(Path(merge.vm_image))
    program, *words = merge.command.split()
    assert program == "chainmerge"
    ran = command(*words)
    assert ran.status == 0, ran
    assert content(images.result(options)) == expected
    assert_clean(images.result(options))
