# SPDX-License-Identifier: Apache-2.0
"""A merge that is told to stop, or fails: what is said of the images, and what is so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.progress import Stage
from chainmerge.errors import Interrupted
from chainmerge.live.errors import LiveMergeFailed, LiveUnsuited, VmRefused
from chainmerge.options import Access, LiveOptions
from tests.support.domain_vm import running_domain
from tests.support.live_scenario import DISK, assert_closed_safe, build, leftovers
from tests.support.live_vm import running_vm
from tests.support.qemu import content, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from chainmerge.documents.progress import ProgressEvent
    from tests.support.domain_vm import TestDomain
    from tests.support.live_vm import LiveTestVm

    Start = Callable[[Path, Sequence[Path]], AbstractContextManager[LiveTestVm | TestDomain]]

pytestmark = pytest.mark.timeout(120)

KINDS = ("internal", "active")


@pytest.fixture(params=["qmp", "libvirt"])
def start(request: pytest.FixtureRequest) -> Start:
    """Starts a VM of either kind with a chain of images, root first."""
    if request.param == "qmp":
        return running_vm
    uri = request.getfixturevalue("uri")
    return lambda directory, images: running_domain(directory, uri, images)


@dataclass
class StopAtCopy:
    """Says stop once data is being copied."""

    copying: bool = False

    def on_progress(self, event: ProgressEvent) -> None:
        self.copying = self.copying or event.stage is Stage.COPY

    def should_stop(self) -> bool:
        return self.copying


@pytest.mark.parametrize("stale", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_vm_reads_afterwards_is_said_as_it_is(
    tmp_path: Path, start: Start, kind: str, stale: int
) -> None:
    scenario = build(tmp_path / "chain", 5, levels=1, active=kind == "active", stale=stale)
    watch = StopAtCopy()
    with start(tmp_path / "vm", scenario.images) as vm:
        before = vm.chain()
        with vm.disk() as disk, pytest.raises(Interrupted) as stopped:
            live.merge(
                disk,
                scenario.top,
                options=LiveOptions(bandwidth=1 << 20),
                on_progress=watch.on_progress,
                should_stop=watch.should_stop,
            )
        assert vm.chain() == before
    assert f"it reads {scenario.top} as before" in stopped.value.state
    # Guests of internal merges write to another image.
    assert "runs on" not in stopped.value.state
    assert ("stale" in stopped.value.state) == bool(stale)
    assert leftovers(scenario) == []


def test_a_merge_of_libvirt_that_ends_before_it_is_cancelled_is_done(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = build(tmp_path / "chain", 6, levels=1, active=False)
    cancel, watch = live.DomainDisk.cancel, StopAtCopy()

    def too_late(disk: live.DomainDisk) -> None:
        while disk.block_job() is not None:
            disk.wait_for_event(0.1)
        cancel(disk)

    monkeypatch.setattr(live.DomainDisk, "cancel", too_late)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(6) as guest, vm.disk() as disk:
            report = live.merge(
                disk,
                scenario.top,
                options=LiveOptions(delete=True, bandwidth=16 << 20),
                on_progress=watch.on_progress,
                should_stop=watch.should_stop,
            )
        assert watch.copying
        assert report.outcome is MergeOutcome.MERGED
        assert report.deleted == (str(scenario.top),)
        vm.quit()
    assert_closed_safe(scenario, guest)
    assert leftovers(scenario) == []


def stop_an_active_merge(disk: live.LiveDisk, top: Path, access: Access | None = None) -> None:
    watch = StopAtCopy()
    with pytest.raises(Interrupted):
        live.merge(
            disk,
            top,
            access=access,
            options=LiveOptions(bandwidth=1 << 20),
            on_progress=watch.on_progress,
            should_stop=watch.should_stop,
        )


def test_an_active_merge_that_was_undone_costs_no_checkpoint(tmp_path: Path, start: Start) -> None:
    """QEMU leaves base writable, and its bitmaps in-use on disk as long as the VM runs."""
    scenario = build(tmp_path / "chain", 8, levels=1, active=True)
    with start(tmp_path / "vm", scenario.images) as vm:
        with vm.guest(8, DISK) as guest, vm.disk() as disk:
            stop_an_active_merge(disk, scenario.top)
            guest.wait_for(len(guest.journal) + 5)
            report = live.merge(disk, scenario.top, options=LiveOptions(delete=True))
        kept = {one.name for one in report.bitmaps if one.state == "valid"}
        assert kept == {"everywhere", "in-top"}
        vm.quit()
    assert_closed_safe(scenario, guest)


def test_a_data_file_is_written_to_after_an_active_merge_that_was_undone(tmp_path: Path) -> None:
    """Base is read-only again, and the file that has its data is the one that it had."""
    data = tmp_path / "data"
    base = create(tmp_path / "base.qcow2", DISK, data_file=str(data))
    top = create(tmp_path / "top.qcow2", backing=base)
    for image in (base, top):
        chainmerge.bitmaps_add(image, "checkpoint")
    qemu_io(base, "write -q -P 1 0 8M")
    qemu_io(top, "write -q -P 2 4M 40M")
    access, before = Access(allow_data_file=(str(data),)), content(top)
    with running_vm(tmp_path / "vm", [base, top]) as vm:
        with vm.disk() as disk:
            stop_an_active_merge(disk, top, access)
            live.merge(disk, top, access=access)
        vm.quit()
    assert content(base) == before


def test_a_base_that_was_left_writable_is_not_merged_into_beside_the_guest(
    tmp_path: Path, uri: str
) -> None:
    """Nobody could read back what is on disk; and no valid bitmap is called broken for it."""
    scenario = build(tmp_path / "chain", 9, levels=1, active=True)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(9) as guest, vm.disk() as disk:
            stop_an_active_merge(disk, scenario.top)
            leaf = tmp_path / "chain" / "leaf.qcow2"
            vm.snapshot(leaf)
            with pytest.raises(LiveUnsuited, match="open for writing"):
                live.merge(disk, scenario.top)
            live.merge(disk, leaf, options=LiveOptions(delete=True))
            live.merge(disk, scenario.top, options=LiveOptions(delete=True))
        vm.quit()
    assert_closed_safe(scenario, guest)


@pytest.mark.parametrize("happens", [True, False])
def test_a_pivot_of_libvirt_that_answers_with_an_error(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, happens: bool
) -> None:
    """What the guest writes goes to base from then on, or it does not: the chain tells."""
    scenario = build(tmp_path / "chain", 7, levels=1, active=True)
    pivot = live.DomainDisk.pivot

    def unclear(disk: live.DomainDisk) -> None:
        if happens:
            pivot(disk)
        raise VmRefused(disk.name, "virDomainBlockJobAbort", "it timed out")

    monkeypatch.setattr(live.DomainDisk, "pivot", unclear)
    with running_domain(tmp_path / "vm", uri, scenario.images) as vm:
        with vm.guest(7) as guest, vm.disk() as disk:
            if happens:
                live.merge(disk, scenario.top, options=LiveOptions(delete=True))
            else:
                with pytest.raises(LiveMergeFailed, match="timed out"):
                    live.merge(disk, scenario.top, options=LiveOptions(delete=True))
            assert not vm.is_suspended()
            guest.wait_for(len(guest.journal) + 5)
            if not happens:
                monkeypatch.undo()
                live.merge(disk, scenario.top, options=LiveOptions(delete=True))
                guest.wait_for(len(guest.journal) + 5)
        vm.quit()
    assert_closed_safe(scenario, guest)
    assert leftovers(scenario) == []
