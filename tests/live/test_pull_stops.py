# SPDX-License-Identifier: Apache-2.0
"""A pull that is told to stop, that is left unfinished, or that somebody else's files forbid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.documents.progress import Stage
from chainmerge.errors import ExitCode, Interrupted
from chainmerge.live.errors import LiveVerificationFailed, UnfinishedMergeFound
from chainmerge.options import LiveOptions, MergeOptions
from tests.live.test_pull_deaths import pull_until_it_dies
from tests.support.cli import chainmerge as command
from tests.support.domain_vm import running_domain
from tests.support.live_scenario import DISK, leftovers_in
from tests.support.live_vm import Guest, running_vm
from tests.support.pull_scenario import assert_pulled_right, build_pull
from tests.support.qemu import content, create, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.documents.progress import ProgressEvent
    from tests.support.live_vm import LiveTestVm
    from tests.support.pull_scenario import PullScenario

pytestmark = pytest.mark.timeout(120)

KINDS = ("middle", "active")
OPTIONS = LiveOptions(delete=True, direction="pull", bandwidth=8 << 20)


class StopAtCopy:
    """Says stop once data is being copied."""

    copying = False

    def on_progress(self, event: ProgressEvent) -> None:
        self.copying = self.copying or (event.stage is Stage.COPY and event.done > 0)

    def should_stop(self) -> bool:
        return self.copying


def stop_while_copying(disk: live.LiveDisk, scenario: PullScenario) -> None:
    stop = StopAtCopy()
    with pytest.raises(Interrupted, match=r"reads .* as before"):
        live.merge(
            disk,
            scenario.top,
            scenario.base,
            options=OPTIONS,
            on_progress=stop.on_progress,
            should_stop=stop.should_stop,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_it_is_undone_and_the_next_run_begins_again(tmp_path: Path, kind: str) -> None:
    scenario = build_pull(tmp_path / "chain", 2, levels=2, active=kind == "active")
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        with Guest(vm, 2, DISK) as guest, vm.disk() as disk:
            stop_while_copying(disk, scenario)
            assert vm.jobs() == []
            assert vm.chain() == [image.name for image in reversed(scenario.images)]
            assert leftovers_in(scenario.top.parent) == []
            assert chainmerge.status([tmp_path / "chain"]).merges == ()
            live.merge(disk, scenario.top, scenario.base, options=LiveOptions(direction="pull"))
        vm.quit()
    assert_pulled_right(scenario, guest, deleted=False)


def test_stopped_in_a_domain_it_is_undone(tmp_path: Path, uri: str) -> None:
    scenario = build_pull(tmp_path / "chain", 2, levels=1, active=True)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(2) as guest, vm.disk() as disk:
            stop_while_copying(disk, scenario)
            assert vm.jobs() == []
            assert vm.chain() == [image.name for image in reversed(scenario.images)]
            assert leftovers_in(scenario.top.parent) == []
            live.merge(disk, scenario.top, scenario.base, options=LiveOptions(direction="pull"))
        vm.quit()
    assert_pulled_right(scenario, guest, deleted=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_unfinished_is_shown_and_stands_in_the_way(tmp_path: Path, kind: str) -> None:
    scenario = build_pull(tmp_path / "chain", 4, levels=2, active=kind == "active")
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        with Guest(vm, 4, DISK) as guest:
            with vm.disk() as disk:
                pull_and_die(disk, scenario.top, scenario.base)
            shown = command("live", "status", *vm.arguments)
            assert f"{scenario.base} up into {scenario.top}" in shown.out
            (cold,) = chainmerge.status([tmp_path / "chain"]).merges
            assert (cold.base, cold.top) == (str(scenario.base), str(scenario.top))
            assert cold.base_is_locked
            assert cold.command is not None
            assert cold.command.startswith("chainmerge live resume")
            with vm.disk() as disk, pytest.raises(UnfinishedMergeFound):
                live.merge(disk, scenario.top, scenario.pulled[-1])
            resumed = command("live", "resume", *vm.arguments)
            assert resumed.status == ExitCode.DONE, resumed.err
        vm.quit()
    assert_pulled_right(scenario, guest, deleted=True)


def pull_and_die(disk: live.QmpVm, top: Path, base: Path, options: LiveOptions = OPTIONS) -> None:
    """What a manager does that is killed while data is copied."""

    class Lost(Exception):
        """The process of the manager is gone."""

    def look(event: ProgressEvent) -> None:
        if event.stage is Stage.COPY and event.done > 0:
            raise Lost

    with pytest.raises(Lost):
        live.merge(disk, top, base, options=options, on_progress=look)


def test_somebody_else_lets_the_job_take_effect(tmp_path: Path) -> None:
    """No checkpoint may look complete without what the images below had of it."""
    scenario = build_pull(tmp_path / "chain", 8, levels=3, active=True)
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        with Guest(vm, 8, DISK) as guest:
            with vm.disk() as disk:
                pull_and_die(disk, scenario.top, scenario.base)
            finalize(vm)
            guest.wait_for(len(guest.journal) + 5)
            with vm.disk() as disk:
                live.resume(disk)
        vm.quit()
    assert_pulled_right(scenario, guest, deleted=True)


def test_and_what_cannot_be_united_is_switched_off(tmp_path: Path) -> None:
    scenario = build_pull(tmp_path / "chain", 9, levels=2, active=False)
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        with vm.disk() as disk:
            pull_and_die(disk, scenario.top, scenario.base)
        finalize(vm)
        with vm.disk() as disk, pytest.raises(LiveVerificationFailed, match="switched off"):
            live.resume(disk)
        found = vm.bitmaps(scenario.top.name)
        assert {name for name, one in found.items() if one["recording"]} == {"in-top"}
        vm.quit()
    assert all(image.exists() for image in scenario.images)
    assert content(scenario.images[-1]) == scenario.before


def finalize(vm: LiveTestVm) -> None:
    """What an operator does who finds a job that waits."""
    (job,) = vm.execute("query-jobs")
    vm.execute("block-job-set-speed", device=job["id"], speed=0)
    while vm.jobs() != ["pending"]:
        vm.monitor.wait_for_event(0.2)
    vm.execute("job-finalize", id=job["id"])
    assert vm.jobs() == []


def test_a_commit_instead_goes_past_a_pull_of_the_active_image_that_died(tmp_path: Path) -> None:
    """Top shows the same all the time, so there is nothing to finish first."""
    scenario = build_pull(tmp_path / "chain", 6, levels=1, active=True)
    with (
        running_vm(tmp_path / "vm", scenario.images) as vm,
        Guest(vm, 6, DISK, flushes=True) as guest,
    ):
        pull_until_it_dies(vm, scenario, 0, "after", vm.kill, "resume")
    (unfinished,) = chainmerge.status([tmp_path / "chain"]).merges
    assert unfinished.vm_may_start
    assert unfinished.vm_image == str(scenario.top)
    wanted = content(scenario.top)
    assert guest.may_be(scenario.before, wanted)
    chainmerge.merge(scenario.top, scenario.base, options=MergeOptions(delete=True))
    assert content(scenario.base) == wanted
    assert chainmerge.status([tmp_path / "chain"]).merges == ()


def test_pulls_from_one_base_are_told_apart(tmp_path: Path) -> None:
    """A template has many clones, and each may be pulled up at the same time."""
    first = build_pull(tmp_path / "chain", 3, levels=1, active=True)
    other = create(first.top.with_name("other.qcow2"), backing=first.base.name)
    qemu_io(other, "write -q -P 5 0 1M")
    wanted = content(other)
    options = LiveOptions(direction="pull", bandwidth=8 << 20)
    with (
        running_vm(tmp_path / "vm-1", first.images) as vm,
        running_vm(tmp_path / "vm-2", (*first.images[:-1], other)) as beside,
    ):
        for one, top in ((vm, first.top), (beside, other)):
            with one.disk() as disk:
                pull_and_die(disk, top, first.base, options)
        found = chainmerge.status([tmp_path / "chain"]).merges
        assert {merge.top for merge in found} == {str(first.top), str(other)}
        for one in (vm, beside):
            with one.disk() as disk:
                live.resume(disk)
            one.quit()
    assert content(first.top) == first.before
    assert content(other) == wanted
    assert chainmerge.status([tmp_path / "chain"]).merges == ()
