# SPDX-License-Identifier: Apache-2.0
"""The disks of one machine are merged as one operation: planned together, finished together."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.documents.disks import DiskOutcome
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import ExitCode, Failed
from chainmerge.merging import disks as several_disks
from chainmerge.merging.errors import DisksMismatched, DisksShareImage
from chainmerge.options import MergeOptions
from chainmerge.records.disks import DISK_ENTRY, disk_file, keep_entry
from chainmerge.storage.errors import WriteFailed
from chainmerge.storage.files import AppendedFile, WritablePort
from chainmerge.storage.volume_errors import FileSystemFull
from tests.chain.unchanged import refusal, unchanged
from tests.support.cli import chainmerge as command
from tests.support.cli import environment
from tests.support.loopdev import mounted_file_system
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

    from chainmerge.merging.preparing import Prepared

MIB = 1 << 20
DISKS = 3
OUTCOMES = (DiskOutcome.MERGED, DiskOutcome.ALREADY_MERGED)


@dataclass(frozen=True)
class Machine:
    """A machine with several disks, each ``base <- top``, in directories of their own."""

    directory: Path
    shown: tuple[bytes, ...]
    bits: tuple[list[Any], ...]

    @property
    def tops(self) -> list[Path]:
        return [self.directory / f"disk{number}" / "top.qcow2" for number in range(DISKS)]

    @property
    def bases(self) -> list[Path]:
        return [self.directory / f"disk{number}" / "base.qcow2" for number in range(DISKS)]

    def copy_to(self, directory: Path) -> Machine:
        shutil.copytree(self.directory, directory)
        return Machine(directory, self.shown, self.bits)

    def assert_disk_merged(self, number: int) -> None:
        base = self.bases[number]
        assert content(base) == self.shown[number]
        assert dirty_ranges(base, "cp") == self.bits[number]
        assert bitmap_names(base)["cp"]["flags"] == ["auto"]
        assert_clean(base)

    def assert_merged(self) -> None:
        for number in range(DISKS):
            self.assert_disk_merged(number)
        assert not list(self.directory.rglob(f"*{DISK_ENTRY.suffix}*"))
        assert chainmerge.status(self.directories).merges == ()

    @property
    def directories(self) -> list[Path]:
        return [base.parent for base in self.bases]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    directory = tmp_path_factory.mktemp("machine") / "images"
    directory.mkdir()
    machine = Machine(directory, (), ())
    for number, (base, top) in enumerate(zip(machine.bases, machine.tops, strict=True)):
        base.parent.mkdir()
        create(base, 16 * MIB)
        qemu_img("bitmap", "--add", base, "cp")
        qemu_io(base, f"write -P {number + 1} 0 4M")
        create(top, backing=base.name)
        qemu_img("bitmap", "--add", top, "cp")
        qemu_io(top, f"write -P {number + 10} 2M 3M", "write -z 8M 1M")
    merged = machine.copy_to(directory.parent / "merged")
    for top in merged.tops:
        chainmerge.merge(top)
    return Machine(
        directory,
        tuple(content(top) for top in machine.tops),
        tuple(dirty_ranges(base, "cp") for base in merged.bases),
    )


@pytest.fixture
def machine(template: Machine, tmp_path: Path) -> Machine:
    return template.copy_to(tmp_path / "images")


def test_all_are_merged(machine: Machine) -> None:
    seen: list[str] = []
    with unchanged(machine.directory):
        plan = chainmerge.plan_disks(machine.tops)
    assert plan.feasible
    assert [disk.top for disk in plan.disks] == [str(top) for top in machine.tops]
    report = chainmerge.merge_disks(machine.tops, on_progress=lambda event: seen.append(event.top))
    assert [disk.outcome for disk in report.disks] == [DiskOutcome.MERGED] * DISKS
    assert report.exit_code == ExitCode.DONE
    assert set(seen) == {str(top) for top in machine.tops}
    machine.assert_merged()
    again = chainmerge.merge_disks(machine.tops)
    assert [disk.outcome for disk in again.disks] == [DiskOutcome.ALREADY_MERGED] * DISKS


def test_all_is_planned_before_anything_is_written(machine: Machine) -> None:
    """What refuses the last disk leaves the first one alone."""
    sibling = create(machine.bases[2].with_name("sibling.qcow2"), backing="base.qcow2")
    assert sibling.exists()
    with unchanged(machine.directory):
        plan = chainmerge.plan_disks(machine.tops)
        assert [disk.feasible for disk in plan.disks] == [True, True, False]
        assert not plan.feasible
        with pytest.raises(chainmerge.ChainmergeError) as caught:
            chainmerge.merge_disks(machine.tops)
    assert caught.value.exit_code == ExitCode.REFUSED


def test_planning_of_all_comes_before_the_first_copy(machine: Machine) -> None:
    seen: list[Stage] = []
    chainmerge.merge_disks(machine.tops, on_progress=lambda event: seen.append(event.stage))
    first_copy = seen.index(Stage.COPY)
    assert seen[:first_copy].count(Stage.PLAN) == DISKS
    assert Stage.PLAN not in seen[first_copy:]


def test_one_that_fails_does_not_keep_the_others(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = machine.bases[1]
    write = WritablePort.write

    def fail(port: WritablePort, offset: int, data: bytes) -> None:
        if port.name == str(broken):
            raise WriteFailed(port.name, offset, len(data), "the storage is gone")
        write(port, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(WritablePort, "write", fail)
        report = chainmerge.merge_disks(machine.tops)
    failed = [DiskOutcome.MERGED, DiskOutcome.FAILED, DiskOutcome.MERGED]
    assert [disk.outcome for disk in report.disks] == failed
    assert report.exit_code == ExitCode.FAILED
    assert report.disks[1].error is not None
    assert str(broken) in report.disks[1].error.message
    machine.assert_disk_merged(0)
    machine.assert_disk_merged(2)
    assert content(machine.tops[1]) == machine.shown[1]
    (unfinished,) = chainmerge.status(machine.directories).merges
    assert unfinished.base == str(broken)
    assert list(unfinished.disks) == [str(top) for top in machine.tops]
    assert unfinished.command is not None
    assert unfinished.command.endswith(" ".join(map(str, machine.tops)))
    assert chainmerge.merge_disks(machine.tops).exit_code == ExitCode.DONE
    machine.assert_merged()


def test_stopped_in_the_middle(machine: Machine) -> None:
    stop = False

    def watch(event: ProgressEvent) -> None:
        nonlocal stop
        stop = stop or (event.top == str(machine.tops[1]) and event.stage is Stage.COPY)

    report = chainmerge.merge_disks(machine.tops, on_progress=watch, should_stop=lambda: stop)
    assert [disk.outcome for disk in report.disks] == [
        DiskOutcome.MERGED,
        DiskOutcome.INTERRUPTED,
        DiskOutcome.NOT_BEGUN,
    ]
    assert report.exit_code == ExitCode.INTERRUPTED
    left = {merge.base for merge in chainmerge.status(machine.directories).merges}
    assert left == {str(base) for base in machine.bases[1:]}
    assert chainmerge.merge_disks(machine.tops).exit_code == ExitCode.DONE
    machine.assert_merged()


def test_disks_that_have_an_image_in_common(machine: Machine) -> None:
    base = machine.bases[0]
    other = create(base.with_name("other.qcow2"), backing=base.name)
    tops = [machine.tops[0], other]
    error = refusal(DisksShareImage, machine.directory, lambda: chainmerge.merge_disks(tops))
    assert error.image == str(base)
    twice = [machine.tops[0], machine.tops[0]]
    refusal(DisksShareImage, machine.directory, lambda: chainmerge.merge_disks(twice))
    assert not chainmerge.plan_disks(tops).feasible


def test_disks_on_a_common_root(tmp_path: Path) -> None:
    root = create(tmp_path / "root.qcow2", 4 * MIB)
    qemu_io(root, "write -P 3 0 1M")
    tops = []
    for name in ("a", "b"):
        base = create(tmp_path / f"{name}-base.qcow2", backing=root.name)
        tops.append(create(tmp_path / f"{name}-top.qcow2", backing=base.name))
        qemu_io(tops[-1], "write -P 4 2M 1M")
    shown = [content(top) for top in tops]
    assert chainmerge.merge_disks(tops).exit_code == ExitCode.DONE
    assert [content(tmp_path / f"{name}-base.qcow2") for name in ("a", "b")] == shown


def test_pulls_from_one_base(tmp_path: Path) -> None:
    golden = create(tmp_path / "golden.qcow2", 8 * MIB)
    qemu_io(golden, "write -q -P 1 0 1M")
    tops = [create(tmp_path / f"{name}.qcow2", backing=golden) for name in ("one", "two")]
    pulled = command("merge", "--direction", "pull", *tops)
    assert pulled.status == ExitCode.DONE, pulled.err
    assert pulled.out.count("itself, from golden.qcow2") == 2
    assert "no longer needed by the disk: golden.qcow2\n" in pulled.out
    assert all("backing-filename" not in info(top) for top in tops)


def test_bases_are_for_all_or_none(machine: Machine) -> None:
    bases = machine.bases[:2]
    refusal(DisksMismatched, machine.directory, lambda: chainmerge.merge_disks(machine.tops, bases))
    assert chainmerge.merge_disks(machine.tops, machine.bases).exit_code == ExitCode.DONE


def test_space_is_counted_for_all_of_them_together(tmp_path: Path) -> None:
    """Each would fit alone. Nothing may be written before it is known that all do."""
    with mounted_file_system(tmp_path, "ext4", 96 * MIB) as mount:
        tops = []
        for name in ("a", "b"):
            base = create(mount / f"{name}-base.qcow2", 64 * MIB)
            top = create(tmp_path / f"{name}-top.qcow2", backing=str(base))
            qemu_io(top, "write -P 4 0 48M")
            tops.append(top)
        access = chainmerge.Access(allow_backing=(str(mount),), sole_user=True)
        for top in tops:
            assert chainmerge.plan(top, access=access).feasible
        plan = chainmerge.plan_disks(tops, access=access)
        assert [disk.feasible for disk in plan.disks] == [True, False]
        with unchanged(mount), pytest.raises(FileSystemFull):
            chainmerge.merge_disks(tops, access=access)


def test_a_single_merge_of_one_of_them_ends_its_part(machine: Machine) -> None:
    stop = False

    def watch(event: ProgressEvent) -> None:
        nonlocal stop
        stop = stop or event.stage is Stage.COPY

    chainmerge.merge_disks(machine.tops, on_progress=watch, should_stop=lambda: stop)
    for top in machine.tops:
        chainmerge.merge(top)
    machine.assert_merged()


def test_where_the_entries_cannot_be_written_nothing_is(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Failed()

    def fail(entry: Any) -> None:
        if entry.base == str(machine.bases[2]):
            raise full
        keep_entry(entry)

    monkeypatch.setattr("chainmerge.records.disks.keep_entry", fail)
    before = [base.read_bytes() for base in machine.bases]
    with pytest.raises(Failed):
        chainmerge.merge_disks(machine.tops)
    assert [base.read_bytes() for base in machine.bases] == before
    assert not any(disk_file(base).exists() for base in machine.bases)


def test_those_of_an_interrupted_run_stay_where_no_more_can_be_written(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them a rerun would not know which disks are done, nor into what."""
    stop = False

    def watch(event: ProgressEvent) -> None:
        nonlocal stop
        stop = stop or event.stage is Stage.COPY

    def fail(_entry: Any) -> None:
        raise Failed

    chainmerge.merge_disks(machine.tops, on_progress=watch, should_stop=lambda: stop)
    assert all(disk_file(base).exists() for base in machine.bases)
    with monkeypatch.context() as full:
        full.setattr("chainmerge.records.disks.keep_entry", fail)
        with pytest.raises(Failed):
            chainmerge.merge_disks(machine.tops)
    assert all(disk_file(base).exists() for base in machine.bases)
    chainmerge.merge_disks(machine.tops)
    machine.assert_merged()


def test_disks_that_are_pulled_from_one_base_are_told_apart(tmp_path: Path) -> None:
    """The base may be that of other machines, too."""
    create(tmp_path / "root", 1 << 20)
    golden = create(tmp_path / "golden", backing="root")
    tops = [create(tmp_path / f"disk{number}", backing="golden") for number in range(2)]
    for image in (golden, *tops):
        qemu_io(image, "write -q -P 7 0 64k")
    pull = MergeOptions(direction="pull")

    stop = False

    def watch(event: ProgressEvent) -> None:
        nonlocal stop
        stop = stop or event.stage is Stage.COPY

    chainmerge.merge_disks(tops, options=pull, on_progress=watch, should_stop=lambda: stop)
    assert {one.top for one in chainmerge.status([tmp_path]).merges} == set(map(str, tops))
    chainmerge.merge(tops[0], options=pull)
    (left,) = chainmerge.status([tmp_path]).merges
    assert left.top == str(tops[1])
    another = create(tmp_path / "another", backing="golden")
    chainmerge.merge(another, options=pull)
    (left,) = chainmerge.status([tmp_path]).merges
    assert left.top == str(tops[1])
    assert chainmerge.cancel(tops[1]).removed == ("its entry among several disks",)
    assert chainmerge.status([tmp_path]).merges == ()
    report = chainmerge.merge_disks(tops, options=pull)
    assert all(one.is_done for one in report.disks)
    assert not any(disk_file(top).exists() for top in tops)


# Kills


def _die_at(survives: int) -> None:
    counted = 0

    def counting(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal counted
            if counted == survives:
                os.kill(os.getpid(), signal.SIGKILL)
            counted += 1
            return method(*arguments)

        return call

    for owner, names in (
        (WritablePort, ("write", "flush", "punch", "truncate_to")),
        (AppendedFile, ("append", "flush")),
    ):
        for name in names:
            setattr(owner, name, counting(getattr(owner, name)))
    carry_out = several_disks._carry_out

    def between(disks: Any, prepared: list[Prepared], entries: Any) -> Any:
        for one in carry_out(disks, prepared, entries):
            counting(lambda: None)()
            yield one

    several_disks._carry_out = between  # type: ignore[assignment]


def _killed(machine: Machine, options: MergeOptions, survives: int) -> bool:
    pid = os.fork()
    if pid == 0:
        _die_at(survives)
        try:
            chainmerge.merge_disks(machine.tops, options=options)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def _kill_in_rounds(template: Machine, directory: Path, rounds: int) -> None:
    """Kill at a random action, look, and do the same again until all is done."""
    chance = random.Random(rounds)
    actions = 1
    while not _has_run(template, directory, actions):
        actions *= 2
    for number in range(rounds):
        machine = template.copy_to(directory / str(number))
        options = MergeOptions(delete=number % 2 == 1)
        killed = _killed(machine, options, chance.randrange(actions))
        for top, base, shown in zip(machine.tops, machine.bases, machine.shown, strict=True):
            assert content(top if top.exists() else base) == shown
        if killed and number % 3 == 0:
            # And again, in what is left.
            _killed(machine, options, chance.randrange(actions))
        report = chainmerge.merge_disks(machine.tops, options=options)
        assert all(disk.outcome in OUTCOMES for disk in report.disks), report
        machine.assert_merged()
        assert all(top.exists() != options.delete for top in machine.tops)
        shutil.rmtree(machine.directory)


def _has_run(template: Machine, directory: Path, survives: int) -> bool:
    machine = template.copy_to(directory / f"timing-{survives}")
    killed = _killed(machine, MergeOptions(), survives)
    shutil.rmtree(machine.directory)
    return not killed


def test_killed_between_and_within_disks(template: Machine, tmp_path: Path) -> None:
    _kill_in_rounds(template, tmp_path, rounds=6)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_between_and_within_disks_many_times(template: Machine, tmp_path: Path) -> None:
    _kill_in_rounds(template, tmp_path, rounds=50)


# The command line


def test_the_command_line(machine: Machine) -> None:
    planned = command("plan", "--json", *machine.tops)
    assert planned.status == ExitCode.DONE
    assert len(planned.json["disks"]) == DISKS
    ran = command("merge", "--json", *machine.tops)
    assert ran.status == ExitCode.DONE
    assert [disk["outcome"] for disk in ran.json["disks"]] == ["merged"] * DISKS
    assert "3 of 3 disks merged" in command("merge", *machine.tops).out
    machine.assert_merged()


def test_wrong_bases_on_the_command_line(machine: Machine) -> None:
    wrong = ("--base", machine.bases[0], "--base", machine.bases[1])
    for name in ("merge", "plan"):
        assert command(name, *wrong, machine.tops[0]).status == ExitCode.USAGE
        assert command(name, *wrong, *machine.tops).status == ExitCode.USAGE


def test_the_process_is_killed(machine: Machine) -> None:
    """A real process, killed when it begins to copy the second disk."""
    argv = [sys.executable, "-m", "chainmerge", "merge", "--json", *map(str, machine.tops)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if '"copy"' in line and str(machine.tops[1]) in line:
                break
        process.kill()
    states = {merge.base for merge in chainmerge.status(machine.directories).merges}
    assert str(machine.bases[2]) in states
    ran = command("merge", "--json", *machine.tops)
    assert ran.status == ExitCode.DONE
    machine.assert_merged()
