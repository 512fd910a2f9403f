# SPDX-License-Identifier: Apache-2.0
"""Merges in domains of a real libvirt, with a guest that writes all the time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import libvirt
import pytest

from chainmerge import live
from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError, ExitCode
from chainmerge.live.errors import (
    LiveMergeFailed,
    LiveMergeStalled,
    NothingUnfinished,
    VmRefused,
)
from chainmerge.options import LiveOptions
from chainmerge.records.live_journal import LiveJournal, LiveState, enter, load_live_journal
from chainmerge.storage.errors import FlushFailed, WriteFailed
from tests.conftest import SOAK
from tests.live.test_deaths import Killed, assert_merged_cold
from tests.support.cli import chainmerge, environment
from tests.support.domain_vm import TARGET, TestDomain, let_die, running_domain
from tests.support.dying import random_moments
from tests.support.live_scenario import (
    DISK,
    LiveScenario,
    assert_closed_safe,
    assert_same_clusters,
    build,
    leftovers,
    stored_bits,
)
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from chainmerge.documents.progress import ProgressEvent
    from chainmerge.live.port import DiskLimits
    from tests.support.dying import Moment

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[2]
SEEDS = range(50 if SOAK else 1)
KINDS = ("internal", "active")
LATEST_CALL = 60
MOMENTS = random_moments(50 if SOAK else 2, 3, LATEST_CALL)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_while_the_guest_writes(
    tmp_path: Path, uri: str, kind: str, levels: int, seed: int
) -> None:
    scenario = build(tmp_path / "chain", seed, levels=levels, active=kind == "active")
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(seed) as guest:
            with vm.disk() as disk:
                plan = live.plan(disk, scenario.top, scenario.base)
                assert not plan.refusals
                # Slow enough for the guest to write in between.
                options = LiveOptions(delete=True, bandwidth=64 << 20)
                report = live.merge(disk, scenario.top, scenario.base, options=options)
            during = len(guest.journal)
            guest.wait_for(during + 10)
        assert during > 1
        assert set(report.deleted) == {str(path) for path in scenario.merged}
        vm.quit()
    assert_closed_safe(scenario, guest)
    assert leftovers(scenario) == []


def run_and_die(vm: TestDomain, scenario: LiveScenario, call: int, moment: Moment) -> None:
    """Run a manager that dies at a call, if it comes to that."""
    command = (
        sys.executable, "-m", "tests.support.domain_vm", str(vm.directory), vm.uri, vm.name,
        str(scenario.top), str(scenario.base), str(call), moment, "commit",
    )  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode in (0, -9), result.stderr


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_manager_that_was_killed_is_run_again(
    tmp_path: Path, uri: str, kind: str, call: int, moment: Moment
) -> None:
    seed = call * 2 + (moment == "after")
    scenario = build(tmp_path / "chain", seed, levels=1 + seed % 2, active=kind == "active")
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(seed) as guest:
            run_and_die(vm, scenario, call, moment)
            assert vm.alive
            with vm.disk() as disk:
                try:
                    live.resume(disk)
                except NothingUnfinished:
                    if scenario.top.exists():
                        options = LiveOptions(delete=True)
                        live.merge(disk, scenario.top, scenario.base, options=options)
            assert not vm.is_suspended()
            guest.wait_for(len(guest.journal) + 5)
        assert not any(path.exists() for path in scenario.merged)
        vm.quit()
    assert_closed_safe(scenario, guest)
    assert leftovers(scenario) == []


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_domain_that_died_is_merged_cold(
    tmp_path: Path, uri: str, kind: str, call: int, moment: Moment
) -> None:
    seed = call * 2 + (moment == "after")
    scenario = build(tmp_path / "chain", seed, levels=1 + seed % 2, active=kind == "active")
    with (
        running_domain(tmp_path / "vm", uri, scenario.images) as vm,
        vm.guest(seed, flushes=True) as guest,
    ):
        died = merge_until_it_dies(vm, scenario, call, moment)
        # It says that it does not know, unless nothing had been begun.
        if died is not None:
            assert died.exit_code in (ExitCode.UNKNOWN, ExitCode.REFUSED), died
        if vm.alive:
            vm.kill()
    assert_merged_cold(scenario, guest, in_order=False, assert_same=assert_same_clusters)


def merge_until_it_dies(
    vm: TestDomain, scenario: LiveScenario, call: int, moment: Moment
) -> ChainmergeError | None:
    with vm.disk() as disk:
        let_die(disk, call, moment, vm.kill)
        options = LiveOptions(bandwidth=64 << 20)
        try:
            live.merge(disk, scenario.top, scenario.base, options=options)
        except ChainmergeError as error:
            return error
    return None


def test_a_checkpoint_that_libvirt_was_not_told_of_is_kept(tmp_path: Path, uri: str) -> None:
    """Managers redefine checkpoints when they make a backup, and not before."""
    scenario = build(tmp_path / "chain", 5, levels=1, active=True)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        assert vm.checkpoints() == set()
        with vm.disk() as disk:
            live.merge(disk, scenario.top, scenario.base)
        assert vm.checkpoints() == set()
        vm.quit()
    assert set(stored_bits(scenario.base)) == {"everywhere", "in-top"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_made_since_the_domain_began(tmp_path: Path, uri: str, kind: str) -> None:
    """Its bitmaps are in memory alone, and libvirt was not told of their checkpoints."""
    scenario = build(tmp_path / "chain", 6, levels=1, active=True)
    leaf = tmp_path / "chain" / "leaf.qcow2"
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        vm.snapshot(leaf)
        top = scenario.top if kind == "internal" else leaf
        with vm.disk() as disk:
            report = live.merge(disk, top, options=LiveOptions(delete=True))
        assert {one.name for one in report.bitmaps if one.state == "valid"} >= {
            "everywhere",
            "in-top",
        }
        vm.quit()
    left = (scenario.base, leaf if kind == "internal" else scenario.top)
    bits = [stored_bits(image) for image in left]
    assert set(bits[-1]) == {"everywhere", "in-top"}
    assert set().union(*(one["everywhere"] for one in bits)) >= scenario.everywhere
    assert set().union(*(one.get("in-top", set()) for one in bits)) >= scenario.in_top


@pytest.mark.parametrize("kind", KINDS)
def test_an_incremental_backup_by_libvirt_after_a_merge(
    tmp_path: Path, uri: str, kind: str
) -> None:
    """Full backup, snapshot, merge, incremental backup: restored, it is the disk."""
    base = create(tmp_path / "base.qcow2", 64 << 20)
    with running_domain(tmp_path / "vm", uri, [base]) as vm:
        with vm.guest(7) as guest:
            guest.wait_for(20)
            vm.backup(tmp_path / "full.qcow2", checkpoint="first")
            guest.wait_for(len(guest.journal) + 20)
            vm.snapshot(tmp_path / "s1.qcow2")
            guest.wait_for(len(guest.journal) + 20)
            if kind == "internal":
                vm.snapshot(tmp_path / "s2.qcow2")
                guest.wait_for(len(guest.journal) + 20)
            with vm.disk() as disk:
                live.merge(disk, tmp_path / "s1.qcow2", options=LiveOptions(delete=True))
            guest.wait_for(len(guest.journal) + 20)
        assert vm.checkpoints() == {"first"}
        vm.backup(tmp_path / "increment.qcow2", checkpoint="second", since="first")
        vm.quit()
    restored = vm.restored(tmp_path / "full.qcow2", tmp_path / "increment.qcow2")
    assert restored == guest.applied_to(bytes(64 << 20))


def test_the_guest_is_slowed_down_and_let_go_again(tmp_path: Path, uri: str) -> None:
    scenario = build(tmp_path / "chain", 5, levels=1, active=True)
    options = LiveOptions(delete=True, bandwidth=8 << 20, deadline=0.5, on_stall="throttle")
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        limits = {"write_bytes_sec": 800 << 20, "read_bytes_sec": 900 << 20}
        vm.domain.setBlockIoTune(TARGET, limits, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        seen = []
        # Limits are for the guest's device. This one comes in by another way, and keeps to them
        # of its own accord.
        guest = vm.guest(5)

        def look(event: ProgressEvent) -> None:
            if event.stage is Stage.COPY:
                seen.append(vm.domain.blockIoTune(TARGET)["write_bytes_sec"])
                guest.interval = 0.002 if seen[-1] == 800 << 20 else 0.2

        with guest, vm.disk() as disk:
            before = disk.disk_limits()
            live.merge(disk, scenario.top, options=options, on_progress=look)
            assert disk.disk_limits() == before
        assert before.limits["bps_wr"] == 800 << 20
        assert seen[0] == 800 << 20
        assert 0 < min(seen) < 800 << 20
        vm.quit()
    assert_closed_safe(scenario, guest)


def test_a_guest_that_cannot_be_slowed_down(tmp_path: Path, uri: str) -> None:
    scenario = build(tmp_path / "chain", 6, levels=1, active=True)
    options = LiveOptions(bandwidth=1 << 20, deadline=0.5, on_stall="throttle")

    class Unlimited(live.DomainDisk):
        def limit_disk(self, limits: DiskLimits) -> None:
            raise VmRefused(self.name, "virDomainSetBlockIoTune", "not on this host")

    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with (
            vm.guest(6),
            Unlimited(vm.name, TARGET, uri) as disk,
            pytest.raises(LiveMergeFailed, match="cannot be slowed down: not on this host"),
        ):
            live.merge(disk, scenario.top, options=options)
        assert vm.chain() == [path.name for path in reversed(scenario.images)]
        assert vm.jobs() == []
        vm.quit()
    assert leftovers(scenario) == []


def test_a_pivot_waits_until_libvirt_takes_the_job_for_ready(tmp_path: Path, uri: str) -> None:
    base = create(tmp_path / "base.qcow2", DISK)
    top = create(tmp_path / "top.qcow2", backing=base)
    qemu_io(top, f"write -q -P 1 0 {DISK}")
    with running_domain(tmp_path / "vm", uri, [base, top]) as vm, vm.disk() as disk:
        active, below = disk.layout().chain()
        disk.start_commit(active, below, DISK // 3)
        disk.pivot()
        assert vm.chain() == [base.name]


def test_a_journal_that_cannot_be_written_does_not_keep_the_guest_waiting(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = build(tmp_path / "chain", 8, levels=1, active=True)

    def full_at_the_switch(journal: LiveJournal, state: LiveState) -> LiveJournal:
        if state is LiveState.SWITCHING:
            raise WriteFailed(str(scenario.base), 0, 0, "No space left on device")
        return enter(journal, state)

    monkeypatch.setattr("chainmerge.live.driver.enter", full_at_the_switch)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(8) as guest, vm.disk() as disk:
            with pytest.raises(WriteFailed):
                live.merge(disk, scenario.top)
            assert not vm.is_suspended()
            guest.wait_for(len(guest.journal) + 5)
            monkeypatch.undo()
            live.resume(disk)
        vm.quit()
    assert_closed_safe(scenario, guest)
    assert leftovers(scenario) == []


def test_the_guest_does_not_go_on_with_top_while_the_journal_says_that_base_is_right(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal has its name already, and may not last. Should the VM die then, base is advised."""
    scenario = build(tmp_path / "chain", 8, levels=1, active=True)

    def not_made_durable(journal: LiveJournal, state: LiveState) -> LiveJournal:
        entered = enter(journal, state)
        if state is LiveState.SWITCHING:
            raise FlushFailed(str(scenario.base), "Input/output error")
        return entered

    monkeypatch.setattr("chainmerge.live.driver.enter", not_made_durable)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(8) as guest, vm.disk() as disk:
            with pytest.raises(FlushFailed):
                live.merge(disk, scenario.top)
            journal = load_live_journal(scenario.base)
            assert journal is not None
            assert not journal.took_effect
            assert not vm.is_suspended()
            monkeypatch.undo()
            live.resume(disk)
            guest.wait_for(len(guest.journal) + 5)
        vm.quit()
    assert_closed_safe(scenario, guest)
    assert leftovers(scenario) == []


def test_a_job_goes_on_as_fast_as_it_is_told_then(tmp_path: Path, uri: str) -> None:
    base = create(tmp_path / "base", DISK)
    top = create(tmp_path / "top", backing=base)
    qemu_io(top, f"write -q -P 2 0 {DISK // 2}")
    images = [base, top, create(tmp_path / "leaf", backing=top)]
    speeds: list[int] = []
    with running_domain(tmp_path / "vm", uri, images) as vm:

        def killed_at_copy(event: ProgressEvent) -> None:
            if event.stage is Stage.COPY and event.total:
                raise Killed

        def look(event: ProgressEvent) -> None:
            flag = libvirt.VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES
            if event.stage is Stage.COPY and event.total:
                found = vm.domain.blockJobInfo(TARGET, flag)
                speeds.extend([found["bandwidth"]] if found else [])

        with vm.disk() as disk:
            with pytest.raises(Killed):
                live.merge(
                    disk, top, options=LiveOptions(bandwidth=1 << 20), on_progress=killed_at_copy
                )
            live.resume(disk, LiveOptions(bandwidth=8 << 20), on_progress=look)
        vm.quit()
    assert set(speeds) == {8 << 20}


def test_a_copy_that_does_not_catch_up_is_undone_if_that_is_asked_for(
    tmp_path: Path, uri: str
) -> None:
    scenario = build(tmp_path / "chain", 5, levels=1, active=True)
    options = LiveOptions(bandwidth=1 << 20, deadline=0.5, on_stall="abort")
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(5), vm.disk() as disk, pytest.raises(LiveMergeStalled):
            live.merge(disk, scenario.top, options=options)
        assert vm.chain() == [path.name for path in reversed(scenario.images)]
        assert vm.jobs() == []
        vm.quit()
    assert leftovers(scenario) == []


def test_the_commands(tmp_path: Path, uri: str) -> None:
    scenario = build(tmp_path / "chain", 9, levels=1, active=True)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        # This libvirt is not the machine's own, which alone can be asked for the target.
        cold = chainmerge("merge", scenario.top)
        assert (
            f"`chainmerge live merge --domain {vm.name} --disk TARGET {scenario.top}`" in cold.err
        )
        planned = chainmerge("live", "plan", *vm.arguments, scenario.top)
        assert planned.status == ExitCode.DONE, planned
        assert "stale-0" in planned.out
        merged = chainmerge("live", "merge", "-v", "--delete", *vm.arguments, scenario.top)
        assert merged.status == ExitCode.DONE, merged
        assert f"the guest reads and writes {scenario.base}, as libvirt says" in merged.out
        assert "2 kept, 3 stale ones removed from the chain" in merged.out
        assert chainmerge("live", "status", *vm.arguments).status == ExitCode.DONE
        nothing = chainmerge("live", "resume", *vm.arguments)
        assert nothing.status == ExitCode.REFUSED, nothing
        absent = chainmerge(
            "live", "status", "--domain", vm.name, "--disk", "vdz", *vm.arguments[4:]
        )
        assert f"it has: {TARGET} ({scenario.base})" in absent.err
        other = chainmerge("live", "status", "--domain", "none", *vm.arguments[2:])
        assert other.status == ExitCode.USAGE
        assert vm.name in other.err
        vm.quit()
