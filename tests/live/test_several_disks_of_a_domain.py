# SPDX-License-Identifier: Apache-2.0
"""The disks of a domain of a real libvirt, merged as one operation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.documents.disks import DiskOutcome
from chainmerge.errors import ChainmergeError, ExitCode
from chainmerge.options import MergeOptions
from tests.conftest import SOAK
from tests.live.test_several_disks import (
    OF_A_DEAD_VM,
    assert_done,
    assert_nothing_left,
    bases_of,
    tops_of,
)
from tests.support.cli import chainmerge as command
from tests.support.cli import environment
from tests.support.disks_domain import (
    let_one_die,
    opened_disks,
    running_domain_of,
    target_of,
    writing_domain_guests,
)
from tests.support.disks_vm import DISKS, OPTIONS, build_disks
from tests.support.domain_vm import disk_described
from tests.support.dying import random_moments
from tests.support.live_scenario import assert_closed_safe
from tests.support.qemu import check, content, create

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.documents.disks import DisksReport
    from tests.support.domain_vm import DiskOfGuest, TestDomain
    from tests.support.dying import Moment
    from tests.support.live_scenario import LiveScenario

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
LATEST_CALL = 150
MOMENTS = random_moments(20 if SOAK else 1, 4, LATEST_CALL)


def run_and_die(
    domain: TestDomain, scenarios: Sequence[LiveScenario], call: int, moment: Moment
) -> None:
    """Run a manager that dies at a call, if it comes to that."""
    pairs = [f"{scenario.top}={scenario.base}" for scenario in scenarios]
    place = (str(domain.directory), domain.uri, domain.name)
    words = ("-m", "tests.support.disks_domain", *place, str(call), moment, *pairs)
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
def test_a_manager_that_was_killed_is_run_again(
    tmp_path: Path, uri: str, call: int, moment: Moment
) -> None:
    scenarios = build_disks(tmp_path / "chains", call)
    with running_domain_of(tmp_path / "vm", uri, scenarios) as (domain, disks):
        with writing_domain_guests(disks, call) as guests:
            run_and_die(domain, scenarios, call, moment)
            assert domain.alive
            with opened_disks(domain.directory, uri, domain.name, DISKS) as opened:
                report = live.merge_disks(
                    opened, tops_of(scenarios), bases_of(scenarios), options=OPTIONS
                )
            assert_done(report)
            assert not domain.is_suspended()
            for guest in guests:
                guest.wait_for(len(guest.journal) + 5)
        domain.quit()
    for scenario, guest in zip(scenarios, guests, strict=True):
        assert_closed_safe(scenario, guest)
    assert_nothing_left(scenarios)


def merge_until_it_dies(
    disks: Sequence[DiskOfGuest], tops: Sequence[Path], bases: Sequence[Path]
) -> ExitCode:
    try:
        report: DisksReport = live.merge_disks(disks, tops, bases, options=OPTIONS)
    except ChainmergeError as error:
        return error.exit_code
    return report.exit_code


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
def test_a_domain_that_was_killed_is_merged_cold(
    tmp_path: Path, uri: str, call: int, moment: Moment
) -> None:
    scenarios = build_disks(tmp_path / "chains", call)
    tops, bases = tops_of(scenarios), bases_of(scenarios)
    with (
        running_domain_of(tmp_path / "vm", uri, scenarios) as (domain, disks),
        writing_domain_guests(disks, call, flushes=True) as guests,
        opened_disks(domain.directory, uri, domain.name, DISKS) as opened,
    ):
        let_one_die(opened, call, moment, domain.kill)
        status = merge_until_it_dies(opened, tops, bases)
        assert domain.alive or status in OF_A_DEAD_VM
        if domain.alive:
            domain.kill()
    cold = chainmerge.merge_disks(tops, bases, options=MergeOptions(delete=True))
    assert_done(cold)
    assert_nothing_left(scenarios)
    for scenario, guest in zip(scenarios, guests, strict=True):
        assert guest.may_be(scenario.before, content(scenario.result))
        assert check(scenario.base)["corruptions"] == 0


def test_all_disks_of_a_domain(tmp_path: Path, uri: str) -> None:
    scenarios = build_disks(tmp_path / "chains", 11, kinds=(True, True))
    alone = create(tmp_path / "alone.qcow2", 16 << 20)
    more = [
        disk_described("vdx", alone),
        "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>",
    ]
    with running_domain_of(tmp_path / "vm", uri, scenarios, more) as (domain, _):
        place = ("--domain", domain.name, "--connect", uri)
        plan = command("live", "plan", *place, "--all-disks", "--json")
        assert plan.status == ExitCode.DONE, plan.err
        assert [one["top"] for one in plan.json["disks"]] == [str(one.top) for one in scenarios]
        # Each is found by the image that is named; the other disks have nothing to do with that.
        second = ("--base", scenarios[1].base, scenarios[1].top)
        one = command("live", "merge", *place, "--all-disks", "--delete", "--json", *second)
        assert one.status == ExitCode.DONE, one.err
        left_out = {each["disk"] for each in one.json["left_out"]}
        assert left_out == {target_of(0), "vdx", "sda"}
        named = ("--disk", target_of(0), "--disk", target_of(1), "--base", scenarios[0].base)
        both = command(
            "live", "merge", *place, *named, "--delete", "--json", *second, scenarios[0].top
        )
        assert both.status == ExitCode.REFUSED, both.err
        tops = (scenarios[0].top, *second)
        both = command("live", "merge", *place, *named, "--delete", "--json", *tops)
        assert both.status == ExitCode.DONE, both.err
        outcomes = [each["outcome"] for each in both.json["disks"]]
        assert outcomes == [DiskOutcome.MERGED, DiskOutcome.ALREADY_MERGED]
        domain.quit()
    assert_nothing_left(scenarios)
    for scenario in scenarios:
        assert content(scenario.result) == scenario.before
