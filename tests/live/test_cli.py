# SPDX-License-Identifier: Apache-2.0
"""``chainmerge live`` as a user and as a program meet it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from chainmerge.errors import ExitCode
from chainmerge.records.identity import identify
from chainmerge.records.live_journal import VERSION, LiveJournal, save_live_journal
from tests.support.cli import chainmerge
from tests.support.live_scenario import LiveScenario, build
from tests.support.live_vm import LiveTestVm, running_vm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def scenario(tmp_path: Path) -> LiveScenario:
    return build(tmp_path / "chain", 3, levels=1, active=False)


@pytest.fixture
def vm(tmp_path: Path, scenario: LiveScenario) -> Iterator[LiveTestVm]:
    with running_vm(tmp_path / "vm", scenario.images) as running:
        yield running


def test_the_way_of_a_merge(vm: LiveTestVm, scenario: LiveScenario) -> None:
    plan = chainmerge("live", "plan", scenario.top, *vm.arguments, "--json")
    assert plan.status == ExitCode.DONE, plan.err
    assert plan.json["refusals"] == []
    assert plan.json["engine"] == "qemu"

    merge = chainmerge("live", "merge", scenario.top, *vm.arguments, "--delete", "--json")
    assert merge.status == ExitCode.DONE, merge.err
    events = [json.loads(line) for line in merge.out.splitlines()]
    assert {event["event"] for event in events} == {"progress", "report"}
    assert events[-1]["outcome"] == "merged"
    assert events[-1]["deleted"] == [str(scenario.top)]
    assert vm.chain() == ["1.qcow2", "base.qcow2"]

    again = chainmerge("live", "merge", scenario.top, *vm.arguments, "--delete", "--json")
    assert again.status == ExitCode.DONE, again.err
    assert again.json["outcome"] == "already-merged"

    status = chainmerge("live", "status", *vm.arguments, "--json")
    assert status.status == ExitCode.DONE
    assert status.json["merges"] == []
    assert status.json["chain"] == [str(scenario.images[-1]), str(scenario.base)]

    resume = chainmerge("live", "resume", *vm.arguments, "--json")
    assert resume.status == ExitCode.REFUSED
    assert resume.json["code"] == "live-nothing-unfinished"


def test_a_merge_for_people(vm: LiveTestVm, scenario: LiveScenario) -> None:
    merge = chainmerge("live", "merge", "--verbose", scenario.top, *vm.arguments)
    assert merge.status == ExitCode.DONE, merge.err
    assert f"{scenario.top.name} is merged into {scenario.base.name}" in merge.out
    assert (
        "bitmaps of base, as the VM says: 2 kept and recording, 3 stale ones removed" in merge.out
    )
    assert "copying data" in merge.err or "storing bitmaps" in merge.err


def test_what_is_unfinished_is_told_to_whoever_asks(vm: LiveTestVm, scenario: LiveScenario) -> None:
    journal = LiveJournal(
        version=VERSION,
        address=[],
        job="nothing",
        base=identify(scenario.base),
        overlays=[identify(scenario.top)],
        above=identify(scenario.images[-1]),
        backing_name="base.qcow2",
        kept=[],
        stale=[],
        tombstones=[],
        delete=False,
        full_verify=True,
    )
    save_live_journal(journal)
    live = chainmerge("live", "status", *vm.arguments, "--json")
    (merge,) = live.json["merges"]
    assert merge["state"] == "preparing"
    assert merge["command"].startswith("chainmerge live resume --qmp ")
    assert "preparing" in chainmerge("live", "status", *vm.arguments).out
    # As long as the VM has base open, only the VM can carry it on.
    found = unfinished_in(scenario.base.parent)
    assert (found["base"], found["top"]) == (str(scenario.base), str(scenario.top))
    assert found["command"].startswith("chainmerge live resume")
    assert "`chainmerge merge " in found["warnings"][0]
    vm.quit()
    found = unfinished_in(scenario.base.parent)
    assert found["command"].startswith("chainmerge merge ")
    assert "`chainmerge live resume" in found["warnings"][0]


def unfinished_in(directory: Path) -> Any:
    (found,) = chainmerge("status", directory, "--json").json["merges"]
    return found


def test_wrong_usage(tmp_path: Path, vm: LiveTestVm, scenario: LiveScenario) -> None:
    for options in ((), ("--qmp", vm.qmp), (*vm.arguments, "--node", "image2")):
        ran = chainmerge("live", "merge", scenario.top, *options)
        assert ran.status == ExitCode.USAGE
        assert "--qmp" in ran.err
    gone = chainmerge("live", "merge", scenario.top, "--qmp", tmp_path / "no", "--device", "x")
    assert gone.status == ExitCode.REFUSED
    missing = chainmerge("live", "merge", tmp_path / "none.qcow2", *vm.arguments)
    assert missing.status == ExitCode.REFUSED
    assert "none.qcow2" in missing.err
