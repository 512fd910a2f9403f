# SPDX-License-Identifier: Apache-2.0
"""The manager of a pull dies at any moment and is run again; the VM dies; both do."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.errors import ChainmergeError, ExitCode
from chainmerge.live.errors import NothingUnfinished
from chainmerge.options import LiveOptions, MergeOptions
from tests.conftest import SOAK
from tests.support.cli import environment
from tests.support.dying import DyingVm, Moment, random_moments
from tests.support.live_scenario import DISK, leftovers_in
from tests.support.live_vm import DEVICE, Guest, LiveTestVm, running_vm
from tests.support.pull_scenario import (
    PullScenario,
    assert_pulled_right,
    assert_valid_ones_right,
    bits_of_top,
    build_pull,
    digest_of,
)
from tests.support.qemu import check, content, info

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.documents.merge import MergeReport

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]
KINDS = ("middle", "active")
# A pull is about 40 calls, more where it takes longer.
LATEST_CALL = 46
OPTIONS = LiveOptions(delete=True, direction="pull", bandwidth=64 << 20)


MOMENTS = random_moments(50 if SOAK else 3, 23, LATEST_CALL)


def scenario_of(directory: Path, kind: str, call: int, moment: Moment) -> PullScenario:
    seed = call * 2 + (moment == "after")
    return build_pull(
        directory / "chain", seed, levels=1 + seed % 3, active=kind == "active", onto=seed % 5 > 0
    )


def run_and_die(vm: LiveTestVm, scenario: PullScenario, call: int, moment: Moment) -> None:
    """Run a manager that dies at a call, if it comes to that."""
    command = (
        sys.executable, "-m", "tests.support.dying", str(vm.qmp), DEVICE, str(scenario.top),
        str(scenario.base), str(call), moment, str(vm.directory / "calls"), "pull",
    )  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode in (0, -9), result.stderr


def carry_on(vm: LiveTestVm, scenario: PullScenario) -> None:
    """What an operator does: resume, or where there is nothing to resume, the same again."""
    with vm.disk() as disk:
        with contextlib.suppress(NothingUnfinished):
            live.resume(disk)
            return
        live.merge(disk, scenario.top, scenario.base, options=OPTIONS)


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_manager_that_was_killed_is_run_again(
    tmp_path: Path, kind: str, call: int, moment: Moment
) -> None:
    scenario = scenario_of(tmp_path, kind, call, moment)
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        with Guest(vm, call, DISK) as guest:
            run_and_die(vm, scenario, call, moment)
            assert vm.alive
            carry_on(vm, scenario)
            guest.wait_for(len(guest.journal) + 5)
        assert vm.jobs() == []
        assert vm.chain() == scenario.chain_after
        vm.quit()
    assert_pulled_right(scenario, guest, deleted=True)
    assert leftovers_in(scenario.top.parent) == []


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["killed", "ended in order"])
def test_a_vm_that_died_is_finished_cold(
    tmp_path: Path, end: str, kind: str, call: int, moment: Moment
) -> None:
    scenario = scenario_of(tmp_path, kind, call, moment)
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        guest = Guest(vm, call, DISK, flushes=end == "killed")
        with guest:
            die = vm.kill if end == "killed" else lambda: quit_with_guest(vm, guest)
            pull_until_it_dies(vm, scenario, call, moment, die)
            if vm.alive:
                die()
    assert_finished_cold(scenario, guest, in_order=end != "killed")


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_manager_and_vm_die_one_after_the_other(
    tmp_path: Path, kind: str, call: int, moment: Moment
) -> None:
    scenario = scenario_of(tmp_path, kind, call, moment)
    with (
        running_vm(tmp_path / "vm", scenario.images) as vm,
        Guest(vm, call, DISK, flushes=True) as guest,
    ):
        run_and_die(vm, scenario, call, moment)
        guest.wait_for(len(guest.journal) + 3)
        vm.kill()
    assert_finished_cold(scenario, guest, in_order=False)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", ["start_pull", "change_bitmaps", "finalize", "forget_node"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_vm_dies_at_the_turning_points(
    tmp_path: Path, kind: str, name: str, moment: Moment
) -> None:
    scenario = build_pull(tmp_path / "chain", 8, levels=2, active=kind == "active")
    with (
        running_vm(tmp_path / "vm", scenario.images) as vm,
        Guest(vm, 8, DISK, flushes=True) as guest,
    ):
        pull_until_it_dies(vm, scenario, 0, moment, vm.kill, name)
        assert not vm.alive
    assert_finished_cold(scenario, guest, in_order=False)


def quit_with_guest(vm: LiveTestVm, guest: Guest) -> None:
    """End the VM in order, after the guest's last write."""
    guest.stop()
    vm.quit()


def pull_until_it_dies(
    vm: LiveTestVm,
    scenario: PullScenario,
    call: int,
    moment: Moment,
    die: Callable[[], None],
    name_of_call: str = "",
) -> None:
    """Pull; what dies is told that it does not know, unless nothing had been begun."""
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(vm.disk())
        dying = DyingVm(disk, call, moment, die, name_of_call)
        try:
            live.merge(dying, scenario.top, scenario.base, options=OPTIONS)
        except ChainmergeError as error:
            died = error
        else:
            return
    assert died.exit_code in (ExitCode.UNKNOWN, ExitCode.REFUSED), died
    assert not vm.alive


def finish_cold(scenario: PullScenario) -> MergeReport:
    options = MergeOptions(delete=True, direction="pull")
    return chainmerge.merge(scenario.top, scenario.base, options=options)


def assert_finished_cold(scenario: PullScenario, guest: Guest, *, in_order: bool) -> None:
    """Finish what the VM has left; then nothing that was flushed is missing."""
    finish_cold(scenario)
    again = finish_cold(scenario)
    assert again.outcome == "already-merged"
    assert leftovers_in(scenario.top.parent) == []
    if in_order:
        assert_pulled_right(scenario, guest, deleted=True)
        return
    leaf = scenario.images[-1]
    assert guest.may_be(scenario.before, content(leaf))
    assert check(scenario.top)["corruptions"] == 0
    assert ("backing-filename" in info(scenario.top)) == (scenario.onto is not None)
    assert not any(path.exists() for path in scenario.pulled)
    if scenario.onto is not None:
        assert digest_of(scenario.onto) == scenario.digests[scenario.onto]
    if scenario.is_active:
        # What was being recorded when the machine died is lost, but for what it had time to store.
        assert_valid_ones_right(scenario, guest)
    else:
        assert bits_of_top(scenario) == {
            name: set(granules) for name, granules in scenario.expected.items()
        }
