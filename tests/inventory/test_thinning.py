# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a chain are thinned out as one operation: planned together, finished together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import chainmerge
from chainmerge import Access, MergeOptions, ProgressEvent, Retention, Stage
from chainmerge.chain.errors import ImageReplaced
from chainmerge.documents.disks import DiskOutcome
from chainmerge.documents.retention import RetentionRule
from chainmerge.errors import ExitCode, Interrupted, Refused
from chainmerge.inventory import thin_out as thinning_out
from chainmerge.inventory.errors import (
    ActiveIsNotLeaf,
    NoSnapshotMatches,
    NotLeaf,
    ThinningOutdated,
    ThinningUnfinished,
    UnfinishedMergeBelow,
)
from chainmerge.merging import by_native, by_qemu, settling
from chainmerge.options import OptionUnusable
from chainmerge.records.thinning import THINNING, load_thinning
from chainmerge.repairing.errors import CannotCancel
from chainmerge.storage.errors import ImageLocked
from chainmerge.storage.locks import LockMode, lock_image
from tests.chain.unchanged import unchanged
from tests.inventory.trees import DAY, view_of
from tests.records.killed import chain, killed_at, killed_at_call, run_verbatim
from tests.support.cli import chainmerge as command
from tests.support.live_vm import running_vm
from tests.support.qemu import assert_clean, bitmap_names, content, create, qemu_img, qemu_io

ONE = Retention(keep_last=1)
TWO_RANGES = Retention(keep=("s2.*",))
"""Of s0 to s4 and the leaf, s5."""
NAMES = tuple(f"s{number}" for number in range(6))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chain") / "images"
    directory.mkdir()
    images = chain(directory, *NAMES)
    for image in images[1:]:
        qemu_img("bitmap", "--add", image, "cp")
    qemu_img("bitmap", "--add", images[-1], "new")
    qemu_io(images[3], "write -P 90 6M 1M")
    qemu_io(images[-1], "write -P 91 7M 64k")
    return directory


@pytest.fixture
def images(template: Path, tmp_path: Path) -> list[Path]:
    directory = tmp_path / "images"
    shutil.copytree(template, directory)
    return [directory / f"{name}.qcow2" for name in NAMES]


def rules_of(report: Any) -> list[str]:
    """What decided on each snapshot, from the root up."""
    return [str(one.rule) for one in report.snapshots]


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.suffix in (".qcow2", ".raw"))


def assert_thinned(images: list[Path], before: dict[Path, Any], *stay: int) -> None:
    for number, image in enumerate(images):
        assert image.exists() == (number in stay), image
        if number in stay:
            assert view_of(image) == before[image]
            assert_clean(image)
    assert chainmerge.status([images[0].parent]).merges == ()
    assert not list(images[0].parent.glob(f"*{THINNING.suffix}"))


def views(images: list[Path]) -> dict[Path, Any]:
    return {image: view_of(image) for image in images}


# What is decided


def test_two_ranges_in_one_pass_each(images: list[Path]) -> None:
    before = views(images)
    seen: set[str] = set()
    with unchanged(images[0].parent):
        plan = chainmerge.plan_thin_out(images[-1], TWO_RANGES)
    assert rules_of(plan) == ["no-rule", "no-rule", "keep", "no-rule", "no-rule"]
    assert [(one.base, one.top) for one in plan.ranges] == [
        (str(images[3]), str(images[5])),
        (str(images[0]), str(images[2])),
    ]
    assert plan.feasible
    assert plan.bytes_to_copy == sum(one.bytes_copied for one in plan.ranges) > 0
    assert plan.freed_bytes > 0
    report = chainmerge.thin_out(
        images[-1], TWO_RANGES, on_progress=lambda event: seen.add(event.top)
    )
    assert [one.outcome for one in report.ranges] == [DiskOutcome.MERGED] * 2
    assert report.exit_code is ExitCode.DONE
    assert report.snapshots == plan.snapshots
    assert seen == {str(images[5]), str(images[2])}
    assert_thinned(images, before, 2, 5)
    again = chainmerge.thin_out(images[-1], TWO_RANGES)
    assert (rules_of(again), again.ranges) == (["keep"], ())


def test_another_branch_stays_with_what_it_stands_on(images: list[Path]) -> None:
    other = create(images[0].parent / "other.qcow2", backing=images[1].name)
    qemu_io(other, "write -P 77 0 1M")
    before, of_other = views(images), content(other)
    report = chainmerge.thin_out(images[-1], ONE)
    assert rules_of(report) == ["no-rule", "other-branch", "no-rule", "no-rule", "keep-last"]
    assert str(other) in report.snapshots[1].reason
    assert_thinned(images, before, 1, 4, 5)
    assert content(other) == of_other


def test_what_somebody_has_open_is_left_alone(images: list[Path]) -> None:
    """As the VM of another branch has: all that its disk stands on, to read."""
    before = views(images)
    with (
        lock_image(images[0], LockMode.READER, 0),
        lock_image(images[1], LockMode.READER, 0),
        lock_image(images[2], LockMode.READER, 0),
    ):
        report = chainmerge.thin_out(images[-1], Retention(keep_last=0))
    assert rules_of(report) == ["in-use", "in-use", "in-use", "no-rule", "no-rule"]
    assert_thinned(images, before, 0, 1, 2, 5)


def test_a_leaf_that_is_open_refuses_all(images: list[Path]) -> None:
    with lock_image(images[-1], LockMode.WRITER, 0), unchanged(images[0].parent):
        plan = chainmerge.plan_thin_out(images[-1], TWO_RANGES)
        assert [one.code for one in plan.refusals] == [ImageLocked.code]
        with pytest.raises(ImageLocked):
            chainmerge.thin_out(images[-1], TWO_RANGES, Access(lock_wait=0))
    assert load_thinning(images[-1]) is None


def test_a_running_vm_is_named_with_what_can_be_done_in_it(images: list[Path]) -> None:
    directory = images[0].parent
    with running_vm(directory.parent / "vm", images):
        for dry in ((), ("--dry-run",)):
            ran = command("thin-out", *dry, "--lock-wait", "0", "--keep-last", "1", images[-1])
            assert ran.status == 3
            said = " ".join((ran.out + ran.err).split())
            assert "`chainmerge live merge --qmp SOCKET --device disk0 --base BASE TOP`" in said
            assert str(images[0 if not dry else -1]) in said


def test_a_refusal_of_the_last_range_leaves_the_first_one_alone(images: list[Path]) -> None:
    qemu_img("snapshot", "-c", "internal", images[1])
    with unchanged(images[0].parent):
        plan = chainmerge.plan_thin_out(images[-1], TWO_RANGES)
        assert [len(one.refusals) for one in plan.ranges] == [0, 1]
        assert not plan.feasible
        ran = command("thin-out", "--json", "--keep", "s2.*", images[-1])
        assert (ran.status, ran.json["code"]) == (3, plan.refusals[0].code)
        shown = command("thin-out", "-n", "--keep", "s2.*", images[-1])
        assert shown.status == 3
        assert "REFUSED" in shown.out
    before = views(images)
    chainmerge.thin_out(images[-1], TWO_RANGES, options=MergeOptions(drop_snapshots=True))
    assert_thinned(images, before, 2, 5)


def test_what_only_locked_images_tell_is_found_before_anything_is_changed(
    images: list[Path],
) -> None:
    """Damage is looked for under the locks; that of the lower range comes last."""
    overlay = images[1]
    with overlay.open("r+b") as file:
        file.seek(40)
        l1 = int.from_bytes(file.read(8), "big")
        file.seek(l1)
        l2 = int.from_bytes(file.read(8), "big") & ~(1 << 63)
        # Guest cluster 16, which has data, and the one behind it share a cluster now.
        file.seek(l2 + 16 * 8)
        entry = file.read(8)
        assert int.from_bytes(entry, "big")
        file.write(entry)
    with unchanged(images[0].parent), pytest.raises(Refused) as found:
        chainmerge.thin_out(images[-1], TWO_RANGES)
    assert found.value.code == "image-damaged"
    assert load_thinning(images[-1]) is None


@pytest.mark.parametrize("direction", ["auto", "commit"])
def test_a_raw_root(tmp_path: Path, direction: Any) -> None:
    """The result has the format of its name; a commit leaves what cannot hold checkpoints."""
    root = create(tmp_path / "root.raw", 4 << 20, fmt="raw")
    qemu_io(root, "write -P 1 0 2M", fmt="raw")
    images = [root]
    for name in ("s1", "s2", "leaf"):
        image = tmp_path / f"{name}.qcow2"
        create(image, backing=images[-1].name, backing_format=images[-1].suffix[1:])
        if name != "s1":
            qemu_img("bitmap", "--add", image, "cp")
        qemu_io(image, f"write -P {len(images) + 1} 1M 64k")
        images.append(image)
    before = views(images)
    options = MergeOptions(direction=direction)
    report = chainmerge.thin_out(images[-1], Retention(keep_last=0), options=options)
    if direction == "auto":
        assert rules_of(report) == ["no-rule"] * 3
        assert_thinned(images, before, 3)
    else:
        assert rules_of(report) == ["bitmaps", "no-rule", "no-rule"]
        assert "'cp'" in report.snapshots[0].reason
        assert_thinned(images[1:], before, 2)
        assert view_of(root) == before[root]
    assert set(bitmap_names(images[-1])) == {"cp"}


def test_snapshots_at_which_checkpoints_begin(images: list[Path]) -> None:
    """One begins with the leaf, one with the first overlay."""
    before = views(images)
    report = chainmerge.thin_out(images[-1], Retention(keep_last=0, keep_checkpoints=True))
    assert rules_of(report) == [
        "keep-checkpoints",
        "no-rule",
        "no-rule",
        "no-rule",
        "keep-checkpoints",
    ]
    assert [one.reason for one in report.snapshots if one.stays] == [
        "checkpoint 'cp' begins there",
        "checkpoint 'new' begins there",
    ]
    assert_thinned(images, before, 0, 4, 5)


def test_ages_are_those_of_the_files(images: list[Path]) -> None:
    now = time.time()
    for number, image in enumerate(images[:-1]):
        os.utime(image, (now, now - (5 - number) * DAY))
    before = views(images)
    ran = command("thin-out", "--json", "-n", "--keep-within", "60h", images[-1])
    assert [one["stays"] for one in ran.json["snapshots"]] == [False, False, False, True, True]
    assert command("thin-out", "-q", "--keep-within", "60h", images[-1]).status == 0
    assert_thinned(images, before, 3, 4, 5)
    # What a merge has just written is no younger for it than the one above.
    assert images[3].stat().st_mtime >= now
    for within, rule in ((2.5 * DAY, "keep-within"), (1.5 * DAY, "no-rule")):
        later = chainmerge.plan_thin_out(images[-1], Retention(keep_within=within), now=now + DAY)
        assert rules_of(later) == [rule, rule]


@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_what_was_thinned_out_yesterday_is_no_cause_for_a_warning(
    images: list[Path], direction: Any
) -> None:
    """A merge has written to it after the next image: that is told from a write of somebody."""
    now = time.time()
    for number, image in enumerate(images):
        os.utime(image, (now, now - (9 - number) * DAY))
    options = MergeOptions(direction=direction)
    chainmerge.thin_out(images[-1], Retention(keep_last=3), options=options)
    next_one = Retention(keep_last=2)
    (plan,) = chainmerge.plan_thin_out(images[-1], next_one, options=options).ranges
    assert (plan.base, plan.warnings) == (str(images[2]), ())
    qemu_io(images[2], "write -P 99 0 64k")
    (plan,) = chainmerge.plan_thin_out(images[-1], next_one, options=options).ranges
    assert len(plan.warnings) == 1
    assert "was written" in plan.warnings[0]


def test_without_snapshots(tmp_path: Path) -> None:
    alone = create(tmp_path / "alone.qcow2", 1 << 20)
    assert chainmerge.plan_thin_out(alone, ONE).snapshots == ()
    ran = command("thin-out", "--keep-last", "1", alone)
    assert (ran.status, "has no snapshots" in ran.out) == (0, True)


def test_what_is_named_must_be_the_leaf(images: list[Path]) -> None:
    for function in (chainmerge.plan_thin_out, chainmerge.thin_out):
        with pytest.raises(NotLeaf):
            function(images[3], ONE)
        with pytest.raises(ActiveIsNotLeaf):
            function(images[-1], ONE, Access(active=str(images[3])))
    assert chainmerge.plan_thin_out(images[-1], ONE, Access(active=str(images[-1]))).feasible


@pytest.mark.parametrize("also", [{}, {"keep_checkpoints": True}])
def test_patterns_alone_of_which_none_matches(images: list[Path], also: dict[str, bool]) -> None:
    before = views(images)
    rules = Retention(keep=("montly-*", "leaf*"), **also)
    for function in (chainmerge.plan_thin_out, chainmerge.thin_out):
        with pytest.raises(NoSnapshotMatches):
            function(images[-1], rules)
    assert views(images) == before
    ran = command("thin-out", "--keep", "montly-*", images[-1])
    assert (ran.status, "--keep-last 0" in ran.err) == (ExitCode.USAGE, True)
    # Another rule says what stays, then.
    last = Retention(keep_last=1, keep=("montly-*",))
    assert sum(one.stays for one in chainmerge.plan_thin_out(images[-1], last).snapshots) == 1


def test_a_leaf_behind_a_link(images: list[Path]) -> None:
    before = views(images)
    link = images[0].parent / "disk.qcow2"
    link.symlink_to(images[-1])
    chainmerge.thin_out(link, TWO_RANGES)
    assert link.is_symlink()
    assert_thinned(images, before, 2, 5)
    assert content(link) == before[images[-1]].shown


def test_a_snapshot_is_kept_by_the_name_of_its_link_and_by_its_own(images: list[Path]) -> None:
    link = images[0].parent / "current.qcow2"
    link.symlink_to(images[2].name)
    qemu_img("rebase", "-q", "-u", "-b", link.name, "-F", "qcow2", images[3])
    for pattern in ("current.*", "s2.*"):
        plan = chainmerge.plan_thin_out(images[-1], Retention(keep=(pattern,)))
        assert [Path(one.image) for one in plan.snapshots if one.stays] == [link]


def test_wrong_usage(images: list[Path]) -> None:
    for now in (float("nan"), -1.0):
        with pytest.raises(OptionUnusable):
            chainmerge.plan_thin_out(images[-1], ONE, now=now)
    for arguments, code in (
        ((), "no-retention-rule"),
        (("--keep-checkpoints",), "no-retention-rule"),
        (("--keep-within", "7"), "usage"),
        (("--keep-last", "-1"), "usage"),
    ):
        ran = command("thin-out", "--json", *arguments, images[-1])
        assert (ran.status, ran.json["code"]) == (2, code)


# What is finished, and what is undone


def killed_at_note(number: int, images: list[Path], options: MergeOptions | None = None) -> None:
    """Before what is recorded is written for that time: the first one is of its beginning."""
    killed_at_call(
        thinning_out,
        "keep_thinning",
        number,
        lambda: chainmerge.thin_out(images[-1], TWO_RANGES, options=options),
    )


@pytest.mark.parametrize(
    ("call", "direction", "said"),
    [(2, "pull", "--direction pull "), (3, "commit", "--direction commit "), (3, "auto", "")],
)
def test_killed_after_a_range(images: list[Path], call: int, direction: Any, said: str) -> None:
    """Before that is noted: the first range is done, and perhaps the last one.

    By a commit the leaf has become the file of another image.
    """
    before = views(images)
    killed_at_note(call, images, MergeOptions(direction=direction))
    (merge,) = chainmerge.status([images[-1]]).merges
    assert merge.leaf == str(images[-1])
    assert merge.vm_may_start
    assert merge.command == f"chainmerge thin-out --keep 's2.*' {said}-- {images[-1]}"
    other = Retention(keep_last=3)
    with unchanged(images[0].parent):
        for function in (chainmerge.plan_thin_out, chainmerge.thin_out):
            with pytest.raises(ThinningUnfinished) as found:
                function(images[-1], other)
            assert merge.command in found.value.advice
    assert view_of(images[-1]) == before[images[-1]]
    run_verbatim(merge.command, images[0].parent)
    assert_thinned(images, before, 2, 5)


@pytest.mark.parametrize("keep_last", [0, 3])
def test_killed_in_the_middle_and_cancelled(images: list[Path], keep_last: int) -> None:
    """By any name; what was done stays done."""
    everything = {path.name: path.read_bytes() for path in images}
    before = views(images)
    work = Retention(keep_last=keep_last)
    killed_at(by_native, "verify_soundness", lambda: chainmerge.thin_out(images[-1], work))
    (merge,) = chainmerge.status([images[0].parent]).merges
    assert merge.leaf == str(images[-1])
    assert merge.command is not None
    assert merge.command.startswith("chainmerge thin-out ")
    assert merge.cancel_command is not None
    named = images[-1] if keep_last else Path(merge.base)
    ran = command("cancel", "--json", named)
    assert ran.status == 0, ran
    assert "the record of the snapshots that were to go" in ran.json["removed"]
    assert views(images) == before
    assert chainmerge.status([images[0].parent]).merges == ()
    assert {path.name for path in images[0].parent.iterdir()} == set(everything)


def test_cancelled_between_ranges(images: list[Path]) -> None:
    before = views(images)

    killed_at_call(
        thinning_out, "merge_requested", 2, lambda: chainmerge.thin_out(images[-1], TWO_RANGES)
    )
    (merge,) = chainmerge.status([images[-1]]).merges
    assert (merge.base, merge.top) == (str(images[0]), str(images[2]))
    assert merge.cancel_command == f"chainmerge cancel {images[-1]}"
    report = chainmerge.cancel(images[-1])
    assert report.removed == ("the record of the snapshots that were to go",)
    assert_thinned(images, before, 0, 1, 2, 5)


@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_cancelled_after_a_range_before_that_was_noted(images: list[Path], direction: Any) -> None:
    before = views(images)
    killed_at_note(2, images, MergeOptions(direction=direction))
    (merge,) = chainmerge.status([images[-1]]).merges
    assert (merge.base, merge.top) == (str(images[0]), str(images[2]))
    assert "merge 2 of 2" in merge.progress
    run_verbatim(merge.cancel_command, images[0].parent)
    assert_thinned(images, before, 0, 1, 2, 5)


@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_not_cancelled_after_the_last_range(images: list[Path], direction: Any) -> None:
    before = views(images)
    killed_at_note(3, images, MergeOptions(direction=direction))
    (merge,) = chainmerge.status([images[-1]]).merges
    assert merge.cancel_command is None
    with pytest.raises(CannotCancel) as found:
        chainmerge.cancel(images[-1])
    assert "has taken effect" in found.value.sentence
    run_verbatim(merge.command, images[0].parent)
    assert_thinned(images, before, 2, 5)


def test_a_merge_that_was_interrupted_comes_first(images: list[Path]) -> None:
    """It has written over its base, which a rule would keep."""
    before = views(images)
    top, base = images[-1], images[2]
    options = MergeOptions(direction="commit", engine="qemu", delete=True, keep_name=True)
    killed_at(by_qemu, "_store_bitmaps", lambda: chainmerge.merge(top, base, options=options))
    assert view_of(base) != before[base]
    with unchanged(base.parent):
        for function in (chainmerge.plan_thin_out, chainmerge.thin_out):
            with pytest.raises(UnfinishedMergeBelow):
                function(top, TWO_RANGES)
    chainmerge.merge(top, base, options=options)
    chainmerge.thin_out(top, ONE)
    assert view_of(top) == before[top]


def test_a_snapshot_that_is_made_while_it_waits_is_not_merged(images: list[Path]) -> None:
    """By one that gives the leaf's name to the new image."""
    leaf, moved = images[-1], images[-1].with_name("new.qcow2")
    work = Retention(keep=("s0.*", "s1.*", "s2.*"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_image(leaf, LockMode.WRITER, 0))

        def snapshot(event: ProgressEvent) -> None:
            if event.stage is Stage.WAIT and not moved.exists():
                leaf.rename(moved)
                create(leaf, backing=moved)
                stack.close()

        with pytest.raises(ImageReplaced):
            chainmerge.thin_out(leaf, work, Access(lock_wait=30), on_progress=snapshot)
    assert all(image.exists() for image in (*images, moved))
    assert not THINNING.place(leaf).exists()


def test_a_snapshot_that_came_in_between_is_not_merged(images: list[Path]) -> None:
    """It has taken over the name of the one that stays, which nothing was decided to become of."""
    killed_at_call(
        thinning_out, "merge_requested", 2, lambda: chainmerge.thin_out(images[-1], TWO_RANGES)
    )
    moved = images[2].rename(images[2].with_name("moved.qcow2"))
    create(images[2], backing=moved)
    before = views(images[:3])
    for _ in range(2):
        with unchanged(images[0].parent), pytest.raises(ThinningOutdated):
            chainmerge.thin_out(images[-1], TWO_RANGES)
    chainmerge.cancel(images[-1])
    assert_thinned(images, before | {images[-1]: view_of(images[-1])}, 0, 1, 2, 5)


def test_what_has_taken_effect_is_finished_and_not_cancelled(images: list[Path]) -> None:
    before = views(images)
    commit = MergeOptions(direction="commit")
    killed_at(
        settling,
        "rename_base",
        lambda: chainmerge.thin_out(images[-1], TWO_RANGES, options=commit),
    )
    with pytest.raises(CannotCancel) as found:
        chainmerge.cancel(images[-1])
    assert "chainmerge thin-out" in found.value.advice
    (merge,) = chainmerge.status([images[-1]]).merges
    run_verbatim(merge.command, images[0].parent)
    assert_thinned(images, before, 2, 5)


def test_stopped_and_run_again(images: list[Path]) -> None:
    before = views(images)
    done: list[str] = []

    def stop() -> bool:
        return bool(done)

    with unchanged(images[0].parent), pytest.raises(Interrupted):
        chainmerge.thin_out(images[-1], TWO_RANGES, should_stop=lambda: True)
    report = chainmerge.thin_out(
        images[-1],
        TWO_RANGES,
        on_progress=lambda event: done.append(event.top) if event.stage == "settle" else None,
        should_stop=stop,
    )
    assert report.exit_code is ExitCode.INTERRUPTED
    assert [one.outcome for one in report.ranges] == [
        DiskOutcome.MERGED,
        DiskOutcome.INTERRUPTED,
    ]
    report = chainmerge.thin_out(images[-1], TWO_RANGES)
    assert [one.outcome for one in report.ranges] == [
        DiskOutcome.ALREADY_MERGED,
        DiskOutcome.MERGED,
    ]
    assert_thinned(images, before, 2, 5)


def test_a_range_that_fails_keeps_the_next_one_from_being_begun(
    images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = views(images)
    qemu_img("snapshot", "-c", "internal", images[1])
    # It has come since everything was found to be in order.
    monkeypatch.setattr(thinning_out, "_require_all", lambda *_: None)
    report = chainmerge.thin_out(images[-1], TWO_RANGES)
    assert [one.outcome for one in report.ranges] == [DiskOutcome.MERGED, DiskOutcome.FAILED]
    assert report.exit_code is ExitCode.FAILED
    assert report.ranges[1].error is not None
    again = command("thin-out", "--json", "--keep", "s2.*", images[-1])
    assert again.status == 3
    assert load_thinning(images[-1]) is not None
    qemu_img("snapshot", "-d", "internal", images[1])
    chainmerge.thin_out(images[-1], TWO_RANGES)
    assert_thinned(images, before, 2, 5)


def test_a_record_of_another_image_under_the_name_of_the_leaf(images: list[Path]) -> None:
    killed_at_note(2, images)
    for image in images:
        image.unlink(missing_ok=True)
    others = chain(images[0].parent, *NAMES)
    before = views(others)
    assert load_thinning(others[-1]) is None
    assert not [one for one in chainmerge.status([others[0].parent]).merges if one.leaf]
    assert chainmerge.plan_thin_out(others[-1], ONE).feasible
    report = chainmerge.thin_out(others[-1], ONE)
    assert report.exit_code is ExitCode.DONE
    assert_thinned(others, before, 4, 5)


def test_a_record_that_makes_no_sense(images: list[Path]) -> None:
    killed_at_note(2, images)
    file = THINNING.found(images[-1])
    whole = json.loads(file.read_bytes())
    for spoilt in (
        {**whole, "leaf": "\0"},
        {**whole, "ranges": [{**whole["ranges"][0], "base": "s0.qcow2"}]},
        {**whole, "snapshots": 7},
        {"version": 1},
    ):
        file.write_text(json.dumps(spoilt))
        assert load_thinning(images[-1]) is None
        assert command("status", "--json", images[-1]).status in (0, 5)
    # The rest is decided anew then.
    report = chainmerge.thin_out(images[-1], TWO_RANGES)
    assert [one.outcome for one in report.ranges] == [DiskOutcome.MERGED]
    assert left_in(images[0].parent) == ["s2.qcow2", "s5.qcow2"]


def test_every_rule_is_in_the_description() -> None:
    described = chainmerge.SnapshotFate.__doc__ or ""
    assert all(f"``{rule}``" in described for rule in RetentionRule)
