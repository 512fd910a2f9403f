# SPDX-License-Identifier: Apache-2.0
"""What an earlier run left is used for the images that it is of, and for no others."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import pytest

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.errors import Interrupted, Refused
from chainmerge.merging import by_native, by_qemu, concluding, recorded, settling
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.pivot import LivePivotUnclear, LivePivotUnfinished
from chainmerge.records import files as state_files
from chainmerge.records import saved_bitmaps
from chainmerge.records.disks import disk_file
from chainmerge.records.errors import BitmapsSetAside, LeftoverUnclear, MergedBefore
from chainmerge.records.files import beside, write_state
from chainmerge.records.identity import ImageIdentity, identify
from chainmerge.records.live_journal import (
    LIVE_JOURNAL_SUFFIX as LIVE_SUFFIX,
)
from chainmerge.records.live_journal import (
    VERSION,
    LiveJournal,
    LiveState,
    load_live_journal,
    save_live_journal,
)
from chainmerge.records.merge_journal import journal_file, load_journal
from chainmerge.records.merged_record import load_merged_record, merged_record_file
from chainmerge.storage.errors import ImageMissing
from tests.support.cli import COMMAND, environment
from tests.support.cli import chainmerge as command
from tests.support.loopdev import loop_device, mounted_file_system
from tests.support.qemu import bitmap_names, content, create, dirty_ranges, info, qemu_img, qemu_io
from tests.support.reused import made_again

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.documents.status import UnfinishedMerge

MIB = 1 << 20
# The package has a function of that name.
native_commit = importlib.import_module("chainmerge.engines.native.commit")
DELETE = MergeOptions(delete=True)
DEVICES = Access(allow_backing=("/dev",))


def chain(directory: Path, *names: str) -> list[Path]:
    """Images of the given names, each on the one before; every one has data of its own."""
    images: list[Path] = []
    for number, name in enumerate(names):
        path = directory / f"{name}.qcow2"
        if images:
            create(path, backing=images[-1].name)
        else:
            create(path, 8 * MIB)
        qemu_io(path, f"write -P {number + 1} {number}M 2M")
        images.append(path)
    return images


def killed(work: Callable[[], object]) -> None:
    """Do it in a process that kills itself in it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def die(*_args: object, **_more: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def killed_at(owner: object, name: str, work: Callable[[], object]) -> None:
    """Do it in a process that kills itself instead of calling what *name* is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, die)
        killed(work)


def run_verbatim(line: str | None, directory: Path) -> None:
    """What a user does with a command that is printed: he copies it, from wherever he is."""
    assert line is not None
    program, _, words = line.partition(" ")
    assert program == "chainmerge"
    subprocess.run(
        ["bash", "-c", f"{shlex.join(COMMAND)} {words}"],
        check=True,
        cwd=directory,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


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


def _pivoted(base: Path, top: Path, top_since: str = "") -> LiveJournal:
    return LiveJournal(
        version=VERSION,
        address=["--qmp", "/run/vm", "--device", "disk"],
        job="job",
        base=identify(base),
        overlays=[identify(top)],
        above=None,
        backing_name=None,
        kept=[],
        stale=[],
        tombstones=[],
        delete=False,
        full_verify=True,
        state=LiveState.SETTLING,
        top_since=top_since,
    )


@pytest.mark.usefixtures("state_directory")
def test_a_live_merge_of_before_is_found_under_the_name_of_the_node(tmp_path: Path) -> None:
    link, top = tmp_path / "lv", tmp_path / "top.qcow2"
    with contextlib.ExitStack() as stack:
        device = _attached(stack, tmp_path / "volume", link)
        create(link, 8 * MIB)
        create(top, backing=str(link))
        qemu_io(top, "write -P 2 0 1M")
        name = f"{str(device).strip('/').replace('/', '-')}.{LIVE_SUFFIX}"
        write_state(state_files.STATE_DIRECTORY / name, _pivoted(link, top))
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
        save_live_journal(_pivoted(link, top))
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


@pytest.mark.parametrize(
    "options",
    [
        MergeOptions(direction="pull"),
        MergeOptions(direction="pull", delete=True),
        MergeOptions(keep_name=True),
        MergeOptions(keep_name=True, delete=True),
    ],
)
def test_what_a_pivot_has_left_does_not_become_the_result(
    tmp_path: Path, options: MergeOptions
) -> None:
    """The guest went on in base; whoever asks for the result in top would go on in old data."""
    base, top = chain(tmp_path, "base", "top")
    save_live_journal(_pivoted(base, top))
    qemu_io(base, "write -P 9 0 1M")
    newer = content(base)
    in_base = Access(active=str(base))
    for access in (in_base, Access()):
        with pytest.raises((LivePivotUnfinished, LivePivotUnclear)) as refused:
            chainmerge.merge(top, base, access, options)
        assert content(base) == newer
    with pytest.raises(LivePivotUnfinished) as refused:
        chainmerge.merge(top, base, in_base, options)
    plan = chainmerge.plan(top, base, in_base, options)
    assert plan.refusals[0].code == LivePivotUnfinished.code
    assert top.exists()
    assert str(base) in refused.value.finish


def test_a_plan_knows_of_a_pivot(tmp_path: Path) -> None:
    base, top = chain(tmp_path, "base", "top")
    save_live_journal(_pivoted(base, top))
    assert "was about to take effect" in " ".join(chainmerge.plan(top, base).warnings)
    qemu_io(base, "write -P 9 0 1M")
    plan = chainmerge.plan(top, base, Access(active=str(base)))
    assert (plan.progress, plan.refusals) == ("merged", ())
    assert chainmerge.plan(top, base, Access(active=str(top))).progress == "new"


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
        foreign = msgspec.structs.replace(_pivoted(link, top), base=other)
        name = f"{str(device).strip('/').replace('/', '-')}.{LIVE_SUFFIX}"
        file = state_files.STATE_DIRECTORY / name
        write_state(file, foreign)
        assert chainmerge.merge(top, None, DEVICES).outcome is MergeOutcome.MERGED
        assert content(link) == expected
        assert file.exists()


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
        assert command("status", "--json", top).status in (0, 3)
        assert command("repair", "--json", base).status == 0


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
    later = {"handle", "boot", "request", "left", "onto", "old_sector"}
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
    killed_at(by_native, "commit", lambda: chainmerge.merge_disks(tops, options=options))
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
    assert str(beside(base, saved_bitmaps.SAVED_BITMAPS_SUFFIX)) in found.files
    run_verbatim(found.command, Path("/"))
    assert not top.exists()
    assert bitmap_names(base)["cp"]["flags"] == ["auto"]


def test_names_that_no_shell_takes_as_they_are(tmp_path: Path) -> None:
    directory = tmp_path / "two words\nand $(more) 'quotes'"
    directory.mkdir()
    base, top = chain(directory, "base", "top")
    killed_at(by_native, "commit", lambda: chainmerge.merge(top, options=DELETE))
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
    killed_at(by_native, "commit", lambda: chainmerge.merge(top))
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
