# SPDX-License-Identifier: Apache-2.0
"""The disks of a running VM, merged as one operation: planned together, finished together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

import chainmerge
from chainmerge import live
from chainmerge.documents.disks import DiskOutcome
from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError, ExitCode
from chainmerge.live.errors import (
    BaseWithoutTop,
    LiveDisksMismatched,
    LiveJobRunning,
    NothingToMerge,
    NotInVm,
    UnfinishedMergeFound,
    VmLost,
    VmRefused,
    VmUnreachable,
)
from chainmerge.merging.errors import DisksShareImage
from chainmerge.options import LiveOptions, MergeOptions
from chainmerge.records.disks import disk_file, keep_entry, load_entry
from chainmerge.records.live_journal import live_journal_file
from chainmerge.storage.errors import ImageLocked
from tests.conftest import SOAK
from tests.support.cli import chainmerge as command
from tests.support.cli import environment
from tests.support.disks_vm import (
    DISKS,
    OPTIONS,
    build_disks,
    device,
    dying_disks,
    running_disks,
    running_disks_of,
    writing_guests,
)
from tests.support.dying import DyingVm, random_moments
from tests.support.live_scenario import DISK, assert_closed_content, assert_closed_right, leftovers
from tests.support.live_vm import disk_of_nodes
from tests.support.qemu import check, content, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.documents.disks import DisksReport
    from chainmerge.documents.progress import ProgressEvent
    from tests.support.dying import Moment
    from tests.support.live_scenario import LiveScenario
    from tests.support.live_vm import Guest, LiveTestVm

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[2]
# To look at three disks and merge them takes about 160 calls, more where it takes longer.
LATEST_CALL = 190
MOMENTS = random_moments(50 if SOAK else 2, 14, LATEST_CALL)


@pytest.fixture
def scenarios(tmp_path: Path) -> list[LiveScenario]:
    return build_disks(tmp_path / "chains", 5)


def tops_of(scenarios: Sequence[LiveScenario]) -> list[Path]:
    return [scenario.top for scenario in scenarios]


def bases_of(scenarios: Sequence[LiveScenario]) -> list[Path]:
    return [scenario.base for scenario in scenarios]


def merged(vm: LiveTestVm, scenarios: Sequence[LiveScenario]) -> DisksReport:
    """Merge the disks, as an operator does who runs the same command once more."""
    with live.QmpMachine(str(vm.qmp)) as machine:
        disks = [machine.disk(device(number)) for number in range(len(scenarios))]
        report: DisksReport = live.merge_disks(
            disks, tops_of(scenarios), bases_of(scenarios), options=OPTIONS
        )
    return report


def assert_done(report: DisksReport) -> None:
    assert all(disk.is_done for disk in report.disks), report
    assert report.exit_code == ExitCode.DONE


def assert_right(scenarios: Sequence[LiveScenario], guests: Sequence[Guest]) -> None:
    """The VM has ended in order, and all disks are what they have to be."""
    for scenario, guest in zip(scenarios, guests, strict=True):
        assert_closed_right(scenario, guest)
    assert_nothing_left(scenarios)


def assert_nothing_left(scenarios: Sequence[LiveScenario]) -> None:
    for scenario in scenarios:
        assert not any(path.exists() for path in scenario.merged)
        assert leftovers(scenario) == []
        assert not disk_file(scenario.base).exists()
    assert chainmerge.status([scenarios[0].base.parents[1]]).merges == ()


def test_all_are_merged_while_guests_write(tmp_path: Path, scenarios: list[LiveScenario]) -> None:
    seen: list[ProgressEvent] = []
    with running_disks(tmp_path / "vm", scenarios) as (vm, disks):
        with writing_guests(disks, 5) as guests, live.QmpMachine(str(vm.qmp)) as machine:
            opened = [machine.disk(device(number)) for number in range(DISKS)]
            plan = live.plan_disks(opened, tops_of(scenarios), bases_of(scenarios))
            assert plan.feasible
            report = live.merge_disks(
                opened,
                tops_of(scenarios),
                bases_of(scenarios),
                options=OPTIONS,
                on_progress=seen.append,
            )
            assert [one.outcome for one in report.disks] == [DiskOutcome.MERGED] * DISKS
            again = live.merge_disks(opened, tops_of(scenarios), options=OPTIONS)
            assert [one.outcome for one in again.disks] == [DiskOutcome.ALREADY_MERGED] * DISKS
        assert {event.top for event in seen} == set(map(str, tops_of(scenarios)))
        first_copy = next(n for n, event in enumerate(seen) if event.stage is Stage.COPY)
        planned = [event.top for event in seen[:first_copy] if event.stage is Stage.PLAN]
        assert set(planned) == set(map(str, tops_of(scenarios)))
        vm.quit()
    assert_right(scenarios, guests)


def run_and_die(
    vm: LiveTestVm, scenarios: Sequence[LiveScenario], call: int, moment: Moment
) -> None:
    """Run a manager that dies at a call, if it comes to that."""
    pairs = [f"{scenario.top}={scenario.base}" for scenario in scenarios]
    words = ("-m", "tests.support.disks_vm", str(vm.qmp), str(call), moment, *pairs)
    result = subprocess.run(
        (sys.executable, *words),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode in (0, -9), result.stderr


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
def test_a_manager_that_was_killed_is_run_again(tmp_path: Path, call: int, moment: Moment) -> None:
    scenarios = build_disks(tmp_path / "chains", call)
    with running_disks(tmp_path / "vm", scenarios) as (vm, disks):
        with writing_guests(disks, call) as guests:
            run_and_die(vm, scenarios, call, moment)
            assert vm.alive
            assert_done(merged(vm, scenarios))
            for guest in guests:
                guest.wait_for(len(guest.journal) + 5)
        assert vm.jobs() == []
        vm.quit()
    assert_right(scenarios, guests)


OF_A_DEAD_VM = (
    ExitCode.UNKNOWN,
    # Before the first merge had begun, between two, and after the last.
    ExitCode.REFUSED,
    ExitCode.FAILED,
    ExitCode.DONE,
)


def merge_until_it_dies(
    vm: LiveTestVm, tops: Sequence[Path], bases: Sequence[Path], call: int, moment: Moment
) -> ExitCode:
    with live.QmpMachine(str(vm.qmp)) as machine:
        dying = dying_disks(machine, DISKS, call, moment, vm.kill)
        try:
            report: DisksReport = live.merge_disks(dying, tops, bases, options=OPTIONS)
        except ChainmergeError as error:
            return error.exit_code
    errors = [one.error.code for one in report.disks if one.error is not None]
    assert len(errors) < 2, "without the VM no other disk is begun"
    assert set(errors) <= {VmLost.code, VmUnreachable.code}
    return report.exit_code


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
def test_a_vm_that_was_killed_is_merged_cold(tmp_path: Path, call: int, moment: Moment) -> None:
    scenarios = build_disks(tmp_path / "chains", call)
    tops, bases = tops_of(scenarios), bases_of(scenarios)
    with (
        running_disks(tmp_path / "vm", scenarios) as (vm, disks),
        writing_guests(disks, call, flushes=True) as guests,
    ):
        status = merge_until_it_dies(vm, tops, bases, call, moment)
        assert vm.alive or status in OF_A_DEAD_VM
        if vm.alive:
            vm.kill()
    report = chainmerge.merge_disks(tops, bases, options=MergeOptions(delete=True))
    assert_done(report)
    assert_nothing_left(scenarios)
    for scenario, guest in zip(scenarios, guests, strict=True):
        assert guest.may_be(scenario.before, content(scenario.result))
        assert check(scenario.base)["corruptions"] == 0


def test_what_refuses_one_refuses_all(tmp_path: Path, scenarios: list[LiveScenario]) -> None:
    with running_disks(tmp_path / "vm", scenarios) as (vm, disks):
        before = [disk.chain() for disk in disks]
        create(tmp_path / "copy.qcow2", 48 << 20)
        vm.execute(
            "blockdev-add",
            driver="qcow2",
            node_name="copy",
            file={"driver": "file", "filename": str(tmp_path / "copy.qcow2")},
        )
        vm.execute(
            "blockdev-mirror", job_id="copies", device="d2-image1", target="copy", sync="full"
        )
        with live.QmpMachine(str(vm.qmp)) as machine:
            opened = [machine.disk(device(number)) for number in range(DISKS)]
            with pytest.raises(LiveJobRunning):
                live.merge_disks(opened, tops_of(scenarios), bases_of(scenarios))
        assert [disk.chain() for disk in disks] == before
    assert not any(disk_file(base).exists() for base in bases_of(scenarios))
    assert all(leftovers(scenario) == [] for scenario in scenarios)


def test_an_image_that_two_merges_need_refuses_both(
    tmp_path: Path, scenarios: list[LiveScenario]
) -> None:
    with (
        running_disks(tmp_path / "vm", scenarios) as (vm, _),
        live.QmpMachine(str(vm.qmp)) as machine,
    ):
        disks = [machine.disk(device(0)), machine.disk(device(0))]
        with pytest.raises(DisksShareImage):
            live.merge_disks(disks, [scenarios[0].top] * 2)
        plan = live.plan_disks(disks, [scenarios[0].top] * 2)
        assert "disks-share-image" in {one.code for one in plan.refusals}
        with pytest.raises(LiveDisksMismatched):
            live.merge_disks(disks, [scenarios[0].top])


def test_one_that_fails_does_not_keep_the_others(
    tmp_path: Path, scenarios: list[LiveScenario]
) -> None:
    def refuse() -> None:
        raise VmRefused("the VM", "block-commit", "the storage is gone")

    tops, bases = tops_of(scenarios), bases_of(scenarios)
    with running_disks(tmp_path / "vm", scenarios) as (vm, disks):
        with writing_guests(disks, 6) as guests, live.QmpMachine(str(vm.qmp)) as machine:
            opened: list[Any] = [machine.disk(device(number)) for number in range(DISKS)]
            opened[1] = DyingVm(opened[1], 0, "before", refuse, name_of_call="start_commit")
            report = live.merge_disks(opened, tops, bases, options=OPTIONS)
            failed = [DiskOutcome.MERGED, DiskOutcome.FAILED, DiskOutcome.MERGED]
            assert [one.outcome for one in report.disks] == failed
            assert report.exit_code == ExitCode.FAILED
            assert report.disks[1].error is not None
            assert "the storage is gone" in report.disks[1].error.message
            (unfinished,) = chainmerge.status([tmp_path / "chains"]).merges
            assert unfinished.base == str(bases[1])
            assert list(unfinished.disks) == list(map(str, tops))
            machine.__exit__(None, None, None)
            assert_done(merged(vm, scenarios))
        vm.quit()
    assert_right(scenarios, guests)


def test_stopped_in_the_middle(tmp_path: Path, scenarios: list[LiveScenario]) -> None:
    """What status says by then finishes all, in the VM and without it."""
    tops, bases = tops_of(scenarios), bases_of(scenarios)
    stop = False

    def watch(event: ProgressEvent) -> None:
        nonlocal stop
        stop = stop or (event.top == str(tops[1]) and event.stage is Stage.COPY)

    with running_disks(tmp_path / "vm", scenarios) as (vm, disks):
        with writing_guests(disks, 7) as guests:
            with live.QmpMachine(str(vm.qmp)) as machine:
                opened = [machine.disk(device(number)) for number in range(DISKS)]
                report = live.merge_disks(
                    opened,
                    tops,
                    bases,
                    options=OPTIONS,
                    on_progress=watch,
                    should_stop=lambda: stop,
                )
            assert [one.outcome for one in report.disks] == [
                DiskOutcome.MERGED,
                DiskOutcome.INTERRUPTED,
                DiskOutcome.NOT_BEGUN,
            ]
            assert report.exit_code == ExitCode.INTERRUPTED
            merges = chainmerge.status([tmp_path / "chains"]).merges
            assert {merge.base for merge in merges} == {str(bases[1]), str(bases[2])}
            for merge in merges:
                assert merge.base_is_locked
                assert merge.command is not None
                assert merge.command.startswith("chainmerge live merge --qmp ")
                assert all(str(top) in merge.command for top in tops)
                assert "`chainmerge merge " in merge.warnings[0]
            finished = command(*merges[0].command.split()[1:])  # type: ignore[union-attr]
            assert finished.status == ExitCode.DONE, finished.err
            assert "3 of 3 disks merged" in finished.out
        vm.quit()
    assert_right(scenarios, guests)


def stopped_after_the_first(vm: LiveTestVm, scenarios: Sequence[LiveScenario]) -> None:
    stop = False

    def watch(event: ProgressEvent) -> None:
        nonlocal stop
        stop = stop or (event.top == str(scenarios[0].top) and event.stage is Stage.SETTLE)

    with live.QmpMachine(str(vm.qmp)) as machine:
        report = live.merge_disks(
            [machine.disk(device(number)) for number in range(DISKS)],
            tops_of(scenarios),
            bases_of(scenarios),
            options=OPTIONS,
            on_progress=watch,
            should_stop=lambda: stop,
        )
    assert [one.outcome for one in report.disks[1:]] == [DiskOutcome.NOT_BEGUN] * 2


def test_what_has_not_begun_is_cancelled_while_the_vm_runs(
    tmp_path: Path, scenarios: list[LiveScenario]
) -> None:
    with running_disks(tmp_path / "vm", scenarios) as (vm, disks):
        stopped_after_the_first(vm, scenarios)
        # This process has asked for it, and might be at work.
        with pytest.raises(ImageLocked):
            chainmerge.cancel(scenarios[1].top)
        for scenario in scenarios[1:]:
            entry = load_entry(scenario.base)
            assert entry is not None
            assert entry.request is not None
            keep_entry(replace(entry, request=replace(entry.request, by=None)))
        found = chainmerge.status([tmp_path / "chains"]).merges
        assert [one.cancel_command is not None for one in found] == [True, True]
        before = disks[1].chain()
        assert chainmerge.cancel(scenarios[1].top).base == str(scenarios[1].base)
        (left,) = chainmerge.status([tmp_path / "chains"]).merges
        assert left.base == str(scenarios[2].base)
        assert chainmerge.cancel(scenarios[2].base).freed_bytes == 0
        assert chainmerge.status([tmp_path / "chains"]).merges == ()
        assert disks[1].chain() == before
    assert not any(disk_file(scenario.base).exists() for scenario in scenarios)


def test_what_was_stopped_is_finished_once_the_vm_has_ended(
    tmp_path: Path, scenarios: list[LiveScenario]
) -> None:
    with running_disks(tmp_path / "vm", scenarios) as (vm, disks):
        with writing_guests(disks, 8) as guests:
            stopped_after_the_first(vm, scenarios)
        vm.quit()
    (first, second) = chainmerge.status([tmp_path / "chains"]).merges
    assert first.command == second.command
    assert first.command is not None
    assert first.command.startswith("chainmerge merge ")
    assert first.vm_may_start
    finished = command(*first.command.split()[1:])
    assert finished.status == ExitCode.DONE, finished.err
    assert_nothing_left(scenarios)
    for scenario, guest in zip(scenarios, guests, strict=True):
        assert_closed_content(scenario, guest)


def test_disks_that_are_pulled_from_one_base_are_told_apart(tmp_path: Path) -> None:
    """A base that several disks, or several VMs, have in common holds nothing that is one's own."""
    root = create(tmp_path / "root.qcow2", DISK)
    golden = create(tmp_path / "golden.qcow2", backing=root.name)
    qemu_io(golden, "write -q -P 1 0 1M")
    tops = [create(tmp_path / f"top{number}.qcow2", backing=golden.name) for number in range(2)]
    chains = [[root, golden, top] for top in tops]
    pull = LiveOptions(direction="pull")
    stopped_at = Stage.SETTLE
    stages: list[Stage] = []
    journals: list[bytes] = []

    def should_stop() -> bool:
        return stopped_at in stages

    def watch(event: ProgressEvent) -> None:
        stages.append(event.stage)
        if event.stage is Stage.COPY:
            journals.extend(
                one.read_bytes() for one in map(live_journal_file, tops) if one.exists()
            )

    with running_disks_of(tmp_path / "vm", chains) as (vm, disks):
        with live.QmpMachine(str(vm.qmp)) as machine:
            report = live.merge_all_disks(
                machine, options=pull, on_progress=watch, should_stop=should_stop
            )
        assert [one.outcome for one in report.disks] == [DiskOutcome.MERGED, DiskOutcome.NOT_BEGUN]
        (left,) = chainmerge.status([tmp_path]).merges
        assert left.top == str(tops[1])
        assert not disk_file(golden).exists()
        with live.QmpMachine(str(vm.qmp)) as machine:
            begun = live_journal_file(tops[1])
            stages.clear()
            stopped_at = Stage.COPY
            journals.clear()
            live.merge_all_disks(machine, options=pull, on_progress=watch, should_stop=should_stop)
            # A pull that is told to stop is undone; one that was killed leaves this.
            begun.write_bytes(journals[-1])
            with pytest.raises(UnfinishedMergeFound) as found:
                live.plan_all_disks(machine, options=pull)
            assert (found.value.base, found.value.file) == (str(tops[1]), str(begun))
            begun.unlink()
            again = live.merge_all_disks(machine, options=pull)
        assert again.exit_code == ExitCode.DONE
        assert [disk.chain()[1:] for disk in disks] == [[root.name]] * 2
    assert chainmerge.status([tmp_path]).merges == ()
    assert not any(disk_file(top).exists() for top in tops)


# All disks


def with_more_disks(directory: Path) -> list[str]:
    """A disk without a chain, and a drive without a medium."""
    directory.mkdir()
    alone = create(directory / "alone.qcow2", 16 << 20)
    return [
        *disk_of_nodes([alone], "alone", "a-"),
        *("-device", "virtio-scsi-pci", "-device", "scsi-cd,id=cd"),
    ]


LEFT_OUT = {"alone": "its image has no backing file", "cd": "it has no medium"}


def test_all_disks_that_have_a_chain(tmp_path: Path) -> None:
    """An active merge on each; the command says what is left out, and finds its images again."""
    scenarios = build_disks(tmp_path / "chains", 9, kinds=(True, True))
    more = with_more_disks(tmp_path / "more")
    with running_disks(tmp_path / "vm", scenarios, more) as (vm, disks):
        words = ("--qmp", vm.qmp, "--all-disks", "--delete", "--json")
        plan = command("live", "plan", *words)
        assert plan.status == ExitCode.DONE, plan.err
        assert [one["top"] for one in plan.json["disks"]] == [str(one.top) for one in scenarios]
        assert {one["disk"]: one["reason"] for one in plan.json["left_out"]} == LEFT_OUT
        with writing_guests(disks, 9) as guests:
            merge = command("live", "merge", *words)
        assert merge.status == ExitCode.DONE, merge.err
        assert [one["outcome"] for one in merge.json["disks"]] == ["merged"] * 2
        assert {one["disk"]: one["reason"] for one in merge.json["left_out"]} == LEFT_OUT
        assert [len(disk.chain()) for disk in disks] == [1, 2]
        # Named, they are found again; the other disks have nothing to do with these.
        again = command("live", "merge", *words[:4], *(one.top for one in scenarios))
        assert again.status == ExitCode.DONE, again.err
        assert "2 of 2 disks merged" in again.out
        assert "Left out: alone: none of the images to merge is in its chain" in again.out
        vm.quit()
    assert guests[0].applied_to(scenarios[0].before) == content(scenarios[0].base)


def test_all_disks_again_after_a_kill_merges_what_was_asked_for(tmp_path: Path) -> None:
    """Not the next snapshot of the disk that is done."""
    chains = []
    for number in range(2):
        directory = tmp_path / "chains" / f"disk{number}"
        directory.mkdir(parents=True)
        images = [create(directory / "0.qcow2", 16 << 20)]
        for level in range(1, 4):
            images.append(create(directory / f"{level}.qcow2", backing=images[-1].name))
            qemu_io(images[-1], f"write -q -P {level} {level}M 1M")
        chains.append(images)
    with running_disks_of(tmp_path / "vm", chains) as (vm, disks):
        stop = False

        def watch(event: ProgressEvent) -> None:
            nonlocal stop
            stop = stop or event.stage is Stage.SETTLE

        with live.QmpMachine(str(vm.qmp)) as machine:
            first = live.merge_all_disks(
                machine, options=OPTIONS, on_progress=watch, should_stop=lambda: stop
            )
            outcomes = [one.outcome for one in first.disks]
            assert outcomes == [DiskOutcome.MERGED, DiskOutcome.NOT_BEGUN]
            again = live.merge_all_disks(machine, options=OPTIONS)
        assert [one.top for one in again.disks] == [str(images[3]) for images in chains]
        assert [disk.chain() for disk in disks] == [["2.qcow2", "1.qcow2", "0.qcow2"]] * 2


def test_what_all_disks_cannot_be(tmp_path: Path) -> None:
    scenarios = build_disks(tmp_path / "chains", 10, kinds=(True,))
    more = with_more_disks(tmp_path / "more")
    with running_disks(tmp_path / "vm", scenarios, more) as (vm, _):
        with live.QmpMachine(str(vm.qmp)) as machine:
            with pytest.raises(BaseWithoutTop):
                live.merge_all_disks(machine, bases=[scenarios[0].base])
            stray = create(tmp_path / "stray.qcow2", 16 << 20)
            with pytest.raises(NotInVm):
                live.merge_all_disks(machine, [stray])
            with pytest.raises(ChainmergeError, match="no such"):
                live.merge_all_disks(machine, [tmp_path / "gone.qcow2"])
            live.merge_all_disks(machine)
            with pytest.raises(NothingToMerge, match="no medium"):
                live.merge_all_disks(machine)
        for words in (
            ("--all-disks",),
            ("--qmp", vm.qmp, "--all-disks", "--device", "disk0"),
            ("--qmp", vm.qmp, "--device", "disk0"),
            ("--qmp", vm.qmp, "--device", "disk0", "--device", "alone", scenarios[0].top),
        ):
            ran = command("live", "merge", *words)
            assert ran.status == ExitCode.USAGE, ran.err
            assert "--all-disks" in ran.err
