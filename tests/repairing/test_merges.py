# SPDX-License-Identifier: Apache-2.0
"""Merges that were interrupted, ours and those of others: repair undoes or finishes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.options import MergeOptions
from chainmerge.records.merge_journal import journal_file
from chainmerge.records.saved_bitmaps import saved_bitmaps_file
from tests.chain.unchanged import unchanged
from tests.support.qemu import (
    assert_clean,
    bitmap_names,
    content,
    create,
    info,
    qemu_img,
    qemu_io,
)

if TYPE_CHECKING:
    from chainmerge.documents.repair import RepairReport
    from tests.support.merge_scenario import Scenario

MIB = 1 << 20


def _die_at(top: Path, stage: Stage, options: MergeOptions) -> None:
    """Merge in a process that kills itself when *stage* is announced or first moves on."""
    pid = os.fork()
    if pid == 0:

        def on_progress(event: ProgressEvent) -> None:
            if event.stage is stage and (stage is not Stage.COPY or event.done):
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            chainmerge.merge(top, options=options, on_progress=on_progress)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def _repaired(image: Path) -> RepairReport:
    """Repair, after a plan that changes nothing and says the same."""
    with unchanged(image.parent):
        planned = chainmerge.plan_repair(image)
    assert planned.actions
    assert not planned.leaves_damage, planned.findings
    report = chainmerge.repair(image)
    assert report.actions == planned.actions
    assert not report.leaves_damage
    return report


@pytest.mark.parametrize("stage", [Stage.COPY, Stage.VERIFY])
def test_before_the_switch_it_is_undone(scenario: Scenario, stage: Stage) -> None:
    before = content(scenario.base)
    names = {name: bitmap["flags"] for name, bitmap in bitmap_names(scenario.base).items()}
    _die_at(scenario.top, stage, MergeOptions(engine="native"))
    report = _repaired(scenario.base)
    assert [finding.kind for finding in report.findings if finding.kind == "interrupted-merge"]
    assert content(scenario.base) == before
    assert {name: one["flags"] for name, one in bitmap_names(scenario.base).items()} == names
    assert_clean(scenario.base)
    assert content(scenario.top) == scenario.expected_content
    assert not journal_file(scenario.base).exists()
    assert chainmerge.status([scenario.base]).merges == ()
    chainmerge.merge(scenario.top)
    scenario.assert_merged()


def test_in_place_it_is_finished(scenario: Scenario) -> None:
    """Base has some of top's data in place of its own: it is no restore point."""
    _die_at(scenario.top, Stage.VERIFY, MergeOptions(engine="native", data="in-place"))
    _repaired(scenario.base)
    scenario.assert_merged()
    assert_clean(scenario.base)


@pytest.mark.parametrize("asked_about", ["base", "top"])
@pytest.mark.parametrize("delete", [False, True])
def test_after_the_switch_it_is_finished(
    scenario: Scenario, asked_about: str, delete: bool
) -> None:
    _die_at(scenario.top, Stage.SETTLE, MergeOptions(engine="native", delete=delete))
    _repaired(scenario.directory / f"{asked_about}.qcow2")
    scenario.assert_merged()
    assert_clean(scenario.base)
    assert scenario.top.exists() != delete
    assert chainmerge.status([scenario.base]).merges == ()


@pytest.mark.parametrize("stage", [Stage.COPY, Stage.BITMAPS, Stage.SETTLE])
def test_a_merge_by_qemu_is_finished(scenario: Scenario, stage: Stage) -> None:
    _die_at(scenario.top, stage, MergeOptions(engine="qemu"))
    _repaired(scenario.base)
    scenario.assert_merged()
    assert_clean(scenario.base)
    assert not saved_bitmaps_file(scenario.base).exists()


def test_a_damaged_journal_is_for_who_started_it(scenario: Scenario) -> None:
    _die_at(scenario.top, Stage.VERIFY, MergeOptions(engine="native"))
    journal_file(scenario.base).write_bytes(b"{")
    # Only the journal says that what is leaked is not what a lost table led to.
    report = chainmerge.repair(scenario.base, reclaim=True)
    assert report.leaves_damage
    assert "run the same merge again" in report.findings[-1].sentence
    assert_clean(scenario.base)
    chainmerge.merge(scenario.top)
    scenario.assert_merged()


def test_a_merge_that_goes_on_is_left_alone(scenario: Scenario) -> None:
    """Its images are locked, so nothing is decided about it."""
    from chainmerge.storage.errors import ImageLocked
    from chainmerge.storage.locks import LockMode, lock_image

    _die_at(scenario.top, Stage.VERIFY, MergeOptions(engine="native"))
    access = chainmerge.Access(lock_wait=0)
    with lock_image(scenario.base, LockMode.WRITER, 0), pytest.raises(ImageLocked):
        chainmerge.repair(scenario.base, access)


@pytest.mark.parametrize("stage", [Stage.COPY, Stage.VERIFY])
def test_a_pull_before_its_switch_is_undone(tmp_path: Path, stage: Stage) -> None:
    base = create(tmp_path / "base.qcow2", 64 * MIB)
    qemu_io(base, "write -P 7 0 32M")
    top = create(tmp_path / "top.qcow2", backing=base.name)
    qemu_io(top, "write -P 2 40M 1M")
    expected = content(top)
    _die_at(top, stage, MergeOptions(direction="pull", delete=True))
    chainmerge.repair(top)
    assert info(top)["backing-filename"] == base.name
    assert content(top) == expected
    assert_clean(top)


# Somebody else's


@dataclass(frozen=True)
class HalfDone:
    """A chain of which ``qemu-img commit`` was killed in the middle."""

    base: Path
    top: Path
    shown: bytes


def _half_commit(directory: Path, bitmaps: tuple[str, ...]) -> HalfDone:
    base = create(directory / "base.qcow2", 128 * MIB)
    qemu_io(base, "write -P 1 0 64M")
    top = create(directory / "top.qcow2", backing=base.name)
    for name in bitmaps:
        for image in (base, top):
            qemu_img("bitmap", "--add", image, name)
    qemu_io(top, "write -P 5 0 64M", "write -P 6 100M 1M")
    shown = content(top)
    entries = json.loads(qemu_img("map", "--output=json", base))
    place = entries[0]["offset"] + 16 * MIB
    with base.open("rb", buffering=0) as file:
        command = ["qemu-img", "commit", "-q", "-r", "40M", str(top)]
        with subprocess.Popen(command) as process:
            while os.pread(file.fileno(), 1, place) != b"\5":
                assert process.poll() is None
            process.kill()
    return HalfDone(base, top, shown)


@pytest.mark.parametrize("asked_about", ["base", "top"])
def test_a_half_done_commit_of_somebody_else(tmp_path: Path, asked_about: str) -> None:
    chain = _half_commit(tmp_path, ("cp",))
    assert "in-use" in bitmap_names(chain.base)["cp"]["flags"]
    assert content(chain.base) != chain.shown
    report = _repaired(tmp_path / f"{asked_about}.qcow2")
    assert "half-done-commit" in {finding.kind for finding in report.findings}
    assert content(chain.base) == chain.shown
    assert content(chain.top) == chain.shown
    assert_clean(chain.base)
    assert all("in-use" not in one["flags"] for one in bitmap_names(chain.base).values())


def test_a_half_done_commit_that_left_no_mark(tmp_path: Path) -> None:
    """A guest could have written the same again, so nothing is done about it."""
    chain = _half_commit(tmp_path, ())
    with unchanged(tmp_path):
        report = chainmerge.repair(chain.base)
    assert report.actions == ()
    assert "chainmerge merge" in report.warnings[0]
    chainmerge.merge(chain.top)
    assert content(chain.base) == chain.shown


def test_a_snapshot_of_an_image_with_broken_bitmaps_is_no_commit(tmp_path: Path) -> None:
    """A guest died, then somebody took a snapshot, and the guest wrote some of the same."""
    from tests.support.damage import mark_in_use

    base = create(tmp_path / "base.qcow2", 16 * MIB)
    qemu_img("bitmap", "--add", base, "cp")
    qemu_io(base, "write -P 5 0 4M")
    mark_in_use(base, "cp")
    top = create(tmp_path / "top.qcow2", backing=base.name)
    qemu_io(top, "write -P 5 0 512k", "write -P 6 1M 1M")
    before = content(base)
    report = chainmerge.repair(base)
    assert {finding.kind for finding in report.findings} == {"broken-bitmap"}
    assert content(base) == before


def test_what_large_clusters_have_copied_up_is_no_commit(tmp_path: Path) -> None:
    """Of each cluster the guest has written a little; the rest is what base has, too."""
    from tests.support.damage import mark_in_use

    base = create(tmp_path / "base.qcow2", 16 * MIB)
    qemu_img("bitmap", "--add", base, "cp")
    qemu_io(base, "write -P 5 0 16M")
    mark_in_use(base, "cp")
    top = tmp_path / "top.qcow2"
    named = ("-b", base.name, "-F", "qcow2", "-o", "cluster_size=2M")
    qemu_img("create", "-q", "-f", "qcow2", *named, top)
    qemu_io(top, "write -P 6 5800k 64k", "write -P 5 2M 64k", "write -P 5 0 64k")
    before = content(base)
    report = chainmerge.repair(base)
    assert {finding.kind for finding in report.findings} == {"broken-bitmap"}
    assert content(base) == before


@pytest.mark.parametrize(
    ("guest", "why"),
    [
        (("write -z 0 4M", "write -P 5 4M 4M", "write -P 6 9M 1M"), "zeros that base lacks"),
        (("discard 0 4M", "write -P 5 4M 4M", "write -P 6 9M 1M"), "a hole that base lacks"),
        (("write -P 5 4M 64k",), "one cluster, which is all that top has"),
        (("write -P 5 4M 512k", "write -P 6 9M 1M"), "less than a mebibyte"),
        (("write -P 0 4M 4M", "write -P 6 9M 1M"), "zeros alone"),
        (("write -P 5 4M 4M",), "all of it, so nothing is half done"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_proves_no_half_done_commit(tmp_path: Path, guest: tuple[str, ...], why: str) -> None:
    """A writer to base has died, and base is a restore point that nobody may destroy."""
    from tests.support.damage import mark_in_use

    base = create(tmp_path / "base.qcow2", 16 * MIB)
    qemu_img("bitmap", "--add", base, "cp")
    filled = "write -P 0 0 8M" if why == "zeros alone" else "write -P 5 0 8M"
    qemu_io(base, filled)
    mark_in_use(base, "cp")
    top = create(tmp_path / "top.qcow2", backing=base.name)
    qemu_io(top, *guest)
    before = content(base)
    for image in (base, top):
        planned = chainmerge.plan_repair(image)
        assert "half-done-commit" not in {finding.kind for finding in planned.findings}
    chainmerge.repair(base)
    assert content(base) == before


def test_a_half_done_commit_shows_its_evidence(tmp_path: Path) -> None:
    chain = _half_commit(tmp_path, ("cp",))
    (finding,) = [
        one for one in chainmerge.plan_repair(chain.base).findings if one.kind == "half-done-commit"
    ]
    assert f"of its {65 * MIB} bytes of data" in finding.sentence
    assert "it has inconsistent (in-use) bitmaps: 'cp'" in finding.sentence


@pytest.mark.parametrize("delete", [False, True])
def test_a_finished_merge_is_no_interrupted_commit(tmp_path: Path, delete: bool) -> None:
    """Top was left, and then a writer to base died."""
    from tests.support.damage import leak_clusters

    base = create(tmp_path / "base.qcow2", 128 * MIB)
    qemu_io(base, "write -P 1 0 80M")
    top = create(tmp_path / "top.qcow2", backing=base.name)
    # More than is compared at the beginning.
    qemu_io(top, "write -P 5 0 70M", "write -z 75M 1M", "write -P 6 100M 8M")
    chainmerge.merge(top, options=MergeOptions(delete=delete))
    leak_clusters(base, 5)
    for image in (base, top):
        if image.exists():
            planned = chainmerge.plan_repair(image)
            assert {one.kind for one in planned.findings} <= {"leaked-clusters"}, planned.findings
            assert planned.warnings == ()
