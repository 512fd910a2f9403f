# SPDX-License-Identifier: Apache-2.0
"""The manager dies at any moment and is run again; the VM dies, and the cold path goes on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError, ExitCode
from chainmerge.live.errors import NothingUnfinished, VmLost
from chainmerge.merging.errors import LeftoverInUse
from chainmerge.options import Access, LiveOptions, MergeOptions
from chainmerge.planning.pivot import LivePivotUnclear
from chainmerge.storage.errors import ImageLocked
from chainmerge.storage.locks import LockMode, lock_image
from tests.conftest import SOAK
from tests.support.cli import environment
from tests.support.dying import DyingVm, Moment, random_moments
from tests.support.live_scenario import (
    DISK,
    LiveScenario,
    assert_closed_right,
    assert_same_bits,
    build,
    leftovers,
    stored_bits,
)
from tests.support.live_vm import DEVICE, Guest, LiveTestVm, running_vm
from tests.support.loopdev import loop_device
from tests.support.qemu import assert_clean, check, content, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.documents.merge import MergeReport
    from chainmerge.documents.progress import ProgressEvent

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]
KINDS = ("internal", "active")
# A merge is about 40 calls, more where it takes longer.
LATEST_CALL = 44
MOMENTS = random_moments(50 if SOAK else 3, 11, LATEST_CALL)


def run_and_die(vm: LiveTestVm, scenario: LiveScenario, call: int, moment: Moment) -> bool:
    """Run a manager that dies at a call; whether it came to that."""
    done = vm.directory / "calls"
    command = (
        sys.executable, "-m", "tests.support.dying", str(vm.qmp), DEVICE, str(scenario.top),
        str(scenario.base), str(call), moment, str(done), "commit",
    )  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode in (0, -9), result.stderr
    return result.returncode != 0


def carry_on(vm: LiveTestVm, scenario: LiveScenario) -> None:
    """What an operator does: resume; where there is nothing to resume, see whether it is done."""
    with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
        with contextlib.suppress(NothingUnfinished):
            live.resume(disk)
            return
        if len(vm.chain()) != (1 if scenario.is_active else 2):
            live.merge(disk, scenario.top, scenario.base, options=LiveOptions(delete=True))


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_manager_that_was_killed_is_run_again(
    tmp_path: Path, kind: str, call: int, moment: Moment
) -> None:
    seed = call * 2 + (moment == "after")
    scenario = build(tmp_path / "chain", seed, levels=1 + seed % 2, active=kind == "active")
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        with Guest(vm, seed, DISK) as guest:
            run_and_die(vm, scenario, call, moment)
            assert vm.alive
            carry_on(vm, scenario)
            guest.wait_for(len(guest.journal) + 5)
        assert vm.jobs() == []
        assert vm.chain() == [scenario.result.name, "base.qcow2"][: 1 if scenario.is_active else 2]
        assert not any(path.exists() for path in scenario.merged)
        vm.quit()
    assert_closed_right(scenario, guest)
    assert leftovers(scenario) == []


class Killed(BaseException):
    """Nothing is done about it, as about a signal that ends the process."""


def be_killed() -> None:
    raise Killed


@pytest.mark.parametrize(("told", "speed"), [(8 << 20, 8 << 20), (None, 2 << 20)])
@pytest.mark.parametrize("direction", ["commit", "pull"])
def test_a_merge_goes_on_as_fast_as_it_is_told_then(
    tmp_path: Path, direction: str, told: int | None, speed: int
) -> None:
    base = create(tmp_path / "base", DISK)
    top = create(tmp_path / "top", backing=base)
    qemu_io(base, f"write -q -P 1 0 {DISK}")
    qemu_io(top, f"write -q -P 2 0 {DISK // 2}")
    slow = LiveOptions(direction=direction, bandwidth=2 << 20)  # type: ignore[arg-type]
    speeds: list[int] = []
    with running_vm(tmp_path / "vm", [base, top, create(tmp_path / "leaf", backing=top)]) as vm:

        def killed_at_copy(event: ProgressEvent) -> None:
            if event.stage is Stage.COPY and event.total:
                raise Killed

        def look(event: ProgressEvent) -> None:
            if event.stage is Stage.COPY and event.total:
                speeds.extend(job["speed"] for job in vm.execute("query-block-jobs"))

        with vm.disk() as disk:
            with pytest.raises(Killed):
                live.merge(disk, top, options=slow, on_progress=killed_at_copy)
            live.resume(disk, LiveOptions(bandwidth=told), on_progress=look)
        vm.quit()
    assert set(speeds) == {speed}


@pytest.mark.parametrize("command", ["resume", "merge"])
def test_a_node_that_was_closed_by_then_leads_to_the_disk_still(
    tmp_path: Path, command: str
) -> None:
    scenario = build(tmp_path / "chain", 5, levels=2, active=True)
    options = LiveOptions(delete=True)
    with running_vm(tmp_path / "vm", scenario.images) as vm:

        def disk() -> live.QmpVm:
            return live.QmpVm(str(vm.qmp), node="image2")

        with Guest(vm, 5, DISK) as guest:
            with disk() as first:
                dying = DyingVm(first, 0, "after", be_killed, name_of_call="forget_node")
                with pytest.raises(Killed):
                    live.merge(dying, scenario.top, scenario.base, options=options)
            with disk() as again:
                (unfinished,) = live.status(again).merges
                assert unfinished.merged
                if command == "resume":
                    live.resume(again)
                else:
                    live.merge(again, scenario.top, scenario.base, options=options)
        vm.quit()
    assert_closed_right(scenario, guest)
    assert leftovers(scenario) == []


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["killed", "ended in order"])
def test_a_vm_that_died_is_merged_cold(
    tmp_path: Path, end: str, kind: str, call: int, moment: Moment
) -> None:
    seed = call * 2 + (moment == "after")
    scenario = build(tmp_path / "chain", seed, levels=1 + seed % 2, active=kind == "active")
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        guest = Guest(vm, seed, DISK, flushes=end == "killed")
        with guest:
            die = vm.kill if end == "killed" else lambda: quit_with_guest(vm, guest)
            merge_until_it_dies(vm, scenario, call, moment, die)
            if vm.alive:
                die()
    assert_merged_cold(scenario, guest, in_order=end != "killed")


def quit_with_guest(vm: LiveTestVm, guest: Guest) -> None:
    """End the VM in order, after the guest's last write unless that is what a job holds up."""
    while not guest.has_stopped(within=0.2) and "pending" not in vm.jobs():
        pass
    vm.quit()
    guest.stop()


def merge_until_it_dies(
    vm: LiveTestVm,
    scenario: LiveScenario,
    call: int,
    moment: Moment,
    die: Callable[[], None],
) -> None:
    try:
        with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
            dying = DyingVm(disk, call, moment, die)
            options = LiveOptions(bandwidth=64 << 20)
            live.merge(dying, scenario.top, scenario.base, options=options)
    except ChainmergeError as error:
        died = error
    else:
        return
    # It says that it does not know, unless nothing had been begun.
    assert died.exit_code in (ExitCode.UNKNOWN, ExitCode.REFUSED), died
    assert not vm.alive


def merge_cold(scenario: LiveScenario) -> MergeReport:
    """What an operator does, who knows that the VM has not been started again."""
    options = MergeOptions(delete=True)
    try:
        return chainmerge.merge(scenario.top, scenario.base, options=options)
    except LivePivotUnclear:
        # The VM ended in order right after the pivot, which changed top when that was closed.
        access = Access(active=str(scenario.base))
        return chainmerge.merge(scenario.top, scenario.base, access=access, options=options)


def assert_merged_cold(
    scenario: LiveScenario,
    guest: Guest,
    *,
    in_order: bool,
    assert_same: Callable[[dict[str, set[int]], dict[str, set[int]]], None] = assert_same_bits,
) -> None:
    """Merge what the VM has left, if it is not merged; then nothing that was flushed is missing."""
    report = merge_cold(scenario)
    assert not any(path.exists() for path in scenario.merged)
    assert leftovers(scenario) == []
    now = content(scenario.result)
    assert guest.may_be(scenario.before, now)
    if not in_order and report.outcome == "already-merged":
        # Base was what the VM wrote to when it was killed, which leaks clusters.
        assert check(scenario.base)["corruptions"] == 0
    else:
        assert_clean(scenario.base)
    if in_order:
        if now != guest.applied_to(scenario.before):
            guest.count_what_is_under_way()
        assert_closed_right(scenario, guest)
    elif not scenario.is_active:
        # The guest's image lost its own; base has what it is to have.
        expected = {"everywhere": set(scenario.everywhere), "in-top": set(scenario.in_top)}
        assert_same(stored_bits(scenario.base), expected)


def left_by_a_live_merge(directory: Path, kind: str) -> tuple[LiveScenario, Guest]:
    """A merge that came to its end with top left in place, and a guest that wrote on."""
    scenario = build(directory / "chain", 21, levels=2, active=kind == "active")
    with running_vm(directory / "vm", scenario.images) as vm:
        with Guest(vm, 21, DISK) as guest:
            with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
                live.merge(disk, scenario.top, scenario.base)
            guest.wait_for(len(guest.journal) + 20)
        vm.quit()
    return scenario, guest


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_merged_again_from_what_a_live_merge_has_left(tmp_path: Path, kind: str) -> None:
    scenario, guest = left_by_a_live_merge(tmp_path, kind)
    report = chainmerge.merge(scenario.top, scenario.base)
    assert report.outcome == "already-merged"
    assert_closed_right(scenario, guest)
    report = chainmerge.merge(scenario.top, scenario.base, options=MergeOptions(delete=True))
    assert set(report.deleted) == {str(path) for path in scenario.merged}
    assert_closed_right(scenario, guest)


def test_of_a_device_nothing_tells_whether_it_was_written_to_since(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", DISK)
    qemu_io(base, "write -q -P 1 0 1M")
    (tmp_path / "elsewhere").mkdir()
    with loop_device(tmp_path / "elsewhere" / "volume", 64 << 20) as device:
        create(device, backing=base)
        qemu_io(device, "write -q -P 2 1M 1M")
        devices = Access(allow_backing=(str(tmp_path),), sole_user=True)
        with running_vm(tmp_path / "vm", (base, device)) as vm:
            with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
                for _ in range(2):
                    live.merge(disk, device, base, access=devices)
            vm.quit()
        with pytest.raises(LivePivotUnclear):
            chainmerge.merge(device, base, access=devices)
        told = Access(allow_backing=(str(tmp_path),), sole_user=True, active=str(base))
        report = chainmerge.merge(device, base, access=told)
        assert report.outcome == "already-merged"
        # The volume is used again, for the next snapshot of the same disk.
        create(device, backing=base)
        qemu_io(device, "write -q -P 3 1M 1M")
        wanted = content(device)
        with pytest.raises(LivePivotUnclear):
            chainmerge.merge(device, base, access=devices)
        told = Access(allow_backing=(str(tmp_path),), sole_user=True, active=str(device))
        report = chainmerge.merge(device, base, access=told)
        assert report.outcome == "merged"
        assert content(base) == wanted


def test_what_is_left_stays_where_it_is_needed_by_now(tmp_path: Path) -> None:
    scenario, guest = left_by_a_live_merge(tmp_path, "active")
    clone = create(scenario.top.with_name("clone.qcow2"), backing=scenario.top.name)
    wanted = content(clone)
    with pytest.raises(LeftoverInUse, match="clone"):
        chainmerge.merge(scenario.top, scenario.base, options=MergeOptions(delete=True))
    assert content(clone) == wanted
    clone.unlink()
    with lock_image(scenario.top, LockMode.READER, 0), pytest.raises(ImageLocked):
        chainmerge.merge(scenario.top, scenario.base, options=MergeOptions(delete=True))
    report = chainmerge.merge(scenario.top, scenario.base, options=MergeOptions(delete=True))
    assert set(report.deleted) == {str(path) for path in scenario.merged}
    assert_closed_right(scenario, guest)


def test_what_is_left_is_not_needed_by_who_stands_on_base(tmp_path: Path) -> None:
    scenario, _guest = left_by_a_live_merge(tmp_path, "active")
    clone = create(scenario.base.with_name("clone.qcow2"), backing=scenario.base.name)
    chainmerge.merge(scenario.top, scenario.base, options=MergeOptions(delete=True))
    assert not scenario.top.exists()
    assert content(clone) == content(scenario.base)


def test_what_was_written_to_since_is_not_merged_unasked(tmp_path: Path) -> None:
    scenario, guest = left_by_a_live_merge(tmp_path, "active")
    qemu_io(scenario.top, "write -q -P 9 0 64k")
    with pytest.raises(LivePivotUnclear):
        chainmerge.merge(scenario.top, scenario.base)
    assert content(scenario.base) == guest.applied_to(scenario.before)
    # Somebody who has started the VM from top again knows better.
    wanted = content(scenario.top)
    chainmerge.merge(scenario.top, scenario.base, access=Access(active=str(scenario.top)))
    assert content(scenario.base) == wanted


@dataclass
class DiesOnceMerged:
    """Ends the VM when the merge has taken effect and the guest has written on."""

    vm: LiveTestVm
    guest: Guest

    def __call__(self) -> None:
        self.guest.wait_for(len(self.guest.journal) + 10)
        self.vm.kill()


def test_after_the_pivot_base_is_right_even_where_top_was_touched(tmp_path: Path) -> None:
    scenario = build(tmp_path / "chain", 22, levels=1, active=True)
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        guest = Guest(vm, 22, DISK, flushes=True)
        with guest, live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
            dying = DyingVm(disk, 0, "before", DiesOnceMerged(vm, guest), name_of_call="dismiss")
            with pytest.raises(VmLost):
                live.merge(dying, scenario.top)
    # As a VM that is started from top once more and ended at once does.
    qemu_img("bitmap", "--add", scenario.top, "touched")
    with pytest.raises(LivePivotUnclear):
        chainmerge.merge(scenario.top)
    report = chainmerge.merge(scenario.top, access=Access(active=str(scenario.base)))
    assert report.outcome == "already-merged"
    assert guest.may_be(scenario.before, content(scenario.base))
    assert leftovers(scenario) == []
