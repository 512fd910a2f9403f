# SPDX-License-Identifier: Apache-2.0
"""Pulls in domains of a real libvirt, with a guest that writes all the time."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.errors import ChainmergeError, ExitCode
from chainmerge.live.errors import LiveUnsuited, NothingUnfinished
from chainmerge.options import LiveOptions
from tests.conftest import SOAK
from tests.live.test_pull_deaths import assert_finished_cold
from tests.support.cli import environment
from tests.support.domain_vm import TestDomain, let_die, running_domain
from tests.support.dying import random_moments
from tests.support.live_scenario import leftovers_in
from tests.support.pull_scenario import PullScenario, assert_pulled_right, build_pull
from tests.support.qemu import create

if TYPE_CHECKING:
    from tests.support.dying import Moment

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[2]
SEEDS = range(50 if SOAK else 1)
LATEST_CALL = 40
OPTIONS = LiveOptions(delete=True, direction="pull", bandwidth=64 << 20)


MOMENTS = random_moments(50 if SOAK else 2, 5, LATEST_CALL)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [1, 5])
def test_nothing_is_lost_while_the_guest_writes(
    tmp_path: Path, uri: str, levels: int, seed: int
) -> None:
    scenario = build_pull(tmp_path / "chain", seed, levels=levels, active=True)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(seed) as guest:
            with vm.disk() as disk:
                plan = live.plan(disk, scenario.top, scenario.base, options=OPTIONS)
                assert not plan.refusals
                report = live.merge(disk, scenario.top, scenario.base, options=OPTIONS)
            during = len(guest.journal)
            guest.wait_for(during + 10)
        assert during > 1
        assert vm.chain() == scenario.chain_after
        assert vm.jobs() == []
        assert set(report.deleted) == {str(path) for path in scenario.pulled}
        vm.quit()
    assert_pulled_right(scenario, guest, deleted=True)
    assert leftovers_in(scenario.top.parent) == []


def test_down_to_the_root_nothing_is_left_below(tmp_path: Path, uri: str) -> None:
    scenario = build_pull(tmp_path / "chain", 4, levels=2, active=True, onto=False)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(4) as guest, vm.disk() as disk:
            live.merge(disk, scenario.top, scenario.base, options=OPTIONS)
        vm.quit()
    assert_pulled_right(scenario, guest, deleted=True)


def test_libvirt_pulls_into_no_image_below(tmp_path: Path, uri: str) -> None:
    scenario = build_pull(tmp_path / "chain", 6, levels=1, active=False)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.disk() as disk, pytest.raises(LiveUnsuited, match="into the active image alone"):
            live.merge(disk, scenario.top, scenario.base, options=OPTIONS)
        vm.quit()


def test_what_others_need_is_not_taken_out_of_images_below(tmp_path: Path, uri: str) -> None:
    """libvirt removes a bitmap from all images of a chain, or from none."""
    scenario = build_pull(tmp_path / "chain", 7, levels=2, active=True)
    create(scenario.base.with_name("sibling.qcow2"), backing=scenario.base.name)
    options = LiveOptions(direction="pull")
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.disk() as disk, pytest.raises(LiveUnsuited, match=r"'gap' .*sibling\.qcow2 uses"):
            live.merge(disk, scenario.top, scenario.base, options=options)
        vm.quit()


def run_and_die(vm: TestDomain, scenario: PullScenario, call: int, moment: Moment) -> None:
    """Run a manager that dies at a call, if it comes to that."""
    command = (
        sys.executable, "-m", "tests.support.domain_vm", str(vm.directory), vm.uri, vm.name,
        str(scenario.top), str(scenario.base), str(call), moment, "pull",
    )  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode in (0, -9), result.stderr


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
def test_a_manager_that_was_killed_is_run_again(
    tmp_path: Path, uri: str, call: int, moment: Moment
) -> None:
    scenario = build_pull(tmp_path / "chain", call, levels=1 + call % 3, active=True)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(call) as guest:
            run_and_die(vm, scenario, call, moment)
            assert vm.alive
            with vm.disk() as disk, contextlib.suppress(NothingUnfinished):
                live.resume(disk)
            with vm.disk() as disk:
                again = live.merge(disk, scenario.top, scenario.base, options=OPTIONS)
            assert again.outcome in ("merged", "already-merged")
            guest.wait_for(len(guest.journal) + 5)
        assert vm.chain() == scenario.chain_after
        vm.quit()
    assert_pulled_right(scenario, guest, deleted=True)
    assert leftovers_in(scenario.top.parent) == []


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
def test_a_domain_that_died_is_finished_cold(
    tmp_path: Path, uri: str, call: int, moment: Moment
) -> None:
    scenario = build_pull(tmp_path / "chain", call, levels=1 + call % 3, active=True)
    with (
        running_domain(tmp_path / "vm", uri, scenario.images) as vm,
        vm.guest(call, flushes=True) as guest,
    ):
        died = pull_until_it_dies(vm, scenario, call, moment)
        # It says that it does not know, unless nothing had been begun.
        if died is not None:
            assert died.exit_code in (ExitCode.UNKNOWN, ExitCode.REFUSED), died
        if vm.alive:
            vm.kill()
    assert_finished_cold(scenario, guest, in_order=False)


def pull_until_it_dies(
    vm: TestDomain, scenario: PullScenario, call: int, moment: Moment
) -> ChainmergeError | None:
    with vm.disk() as disk:
        let_die(disk, call, moment, vm.kill)
        try:
            live.merge(disk, scenario.top, scenario.base, options=OPTIONS)
        except ChainmergeError as error:
            return error
    return None
