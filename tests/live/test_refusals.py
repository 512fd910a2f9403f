# SPDX-License-Identifier: Apache-2.0
"""What is refused with nothing changed, and what is undone when it is to stop."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.chain.unseen_users import UsersUnknown
from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError, Interrupted, Refused
from chainmerge.live.errors import (
    LiveChainDiffers,
    LiveImageInUse,
    LiveJobRunning,
    LiveMergeDriven,
    LiveMergeFailed,
    LiveMergeStalled,
    LiveNotStarted,
    LiveOtherChildren,
    LiveUnsuited,
    NoSuchDisk,
    NothingUnfinished,
    NotInVm,
    UnfinishedMergeFound,
    VmUnreachable,
)
from chainmerge.live.sole_manager import sole_manager
from chainmerge.merging.errors import MergeUnfinished
from chainmerge.options import Access, LiveOptions
from chainmerge.planning.errors import BaseHasOtherChildren
from chainmerge.records.identity import identify
from chainmerge.records.live_journal import (
    LiveJournal,
    LiveJournalDamaged,
    LiveState,
    enter,
    live_journal_file,
)
from chainmerge.records.saved_bitmaps import SavedBitmaps, save_bitmaps
from chainmerge.storage.errors import WriteFailed
from tests.support.live_scenario import (
    DISK,
    MIB,
    LiveScenario,
    assert_closed_right,
    build,
    leftovers,
    stored_bits,
)
from tests.support.live_vm import (
    DEVICE,
    Guest,
    LiveTestVm,
    one_drive,
    running_qemu,
    running_vm,
    separate_nodes,
)
from tests.support.qemu import content, create, qemu_img

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from chainmerge.documents.progress import ProgressEvent

pytestmark = pytest.mark.timeout(120)
# virtio devices have their block device in a part of them.
QDEV = f"/machine/peripheral/{DEVICE}/virtio-backend"


@pytest.fixture
def scenario(tmp_path: Path) -> LiveScenario:
    return build(tmp_path / "chain", 3, levels=1, active=False)


@pytest.fixture
def vm(tmp_path: Path, scenario: LiveScenario) -> Iterator[LiveTestVm]:
    with running_vm(tmp_path / "vm", scenario.images) as running:
        yield running


@contextlib.contextmanager
def nothing_changes(vm: LiveTestVm, scenario: LiveScenario) -> Iterator[None]:
    before = (vm.chain(), scenario.base.read_bytes(), scenario.top.read_bytes())
    yield
    assert (vm.chain(), scenario.base.read_bytes(), scenario.top.read_bytes()) == before
    assert leftovers(scenario) == []


def refused(vm: LiveTestVm, scenario: LiveScenario, error: type[ChainmergeError]) -> None:
    """The merge is refused by this error, and the plan says so if it comes to one."""
    with nothing_changes(vm, scenario), live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
        with pytest.raises(error) as raised:
            live.merge(disk, scenario.top, scenario.base)
        assert isinstance(raised.value, Refused)
        try:
            plan = live.plan(disk, scenario.top, scenario.base)
        except error:
            return
        assert error.code in [one.code for one in plan.refusals]


def test_a_job_on_the_chain(vm: LiveTestVm, scenario: LiveScenario, tmp_path: Path) -> None:
    create(tmp_path / "copy.qcow2", DISK)
    vm.execute("blockdev-add", driver="file", node_name="cf", filename=str(tmp_path / "copy.qcow2"))
    vm.execute("blockdev-add", driver="qcow2", node_name="copy", file="cf")
    vm.execute("blockdev-mirror", job_id="mirror", device="image2", target="copy", sync="top")
    refused(vm, scenario, LiveJobRunning)


def test_base_is_exported(vm: LiveTestVm, scenario: LiveScenario) -> None:
    vm.execute("block-export-add", id="other", type="nbd", node_name="image0", name="other")
    refused(vm, scenario, LiveImageInUse)


def test_another_chain_of_the_vm_stands_on_base(
    vm: LiveTestVm, scenario: LiveScenario, tmp_path: Path
) -> None:
    other = create(tmp_path / "other.qcow2", DISK)
    vm.execute("blockdev-add", driver="file", node_name="of", filename=str(other))
    vm.execute("blockdev-add", driver="qcow2", node_name="other", file="of", backing="image0")
    refused(vm, scenario, LiveImageInUse)


def test_an_image_on_disk_stands_on_base(vm: LiveTestVm, scenario: LiveScenario) -> None:
    create(scenario.base.with_name("sibling.qcow2"), backing=scenario.base.name)
    refused(vm, scenario, BaseHasOtherChildren)


def test_an_image_on_disk_stands_on_top(vm: LiveTestVm, scenario: LiveScenario) -> None:
    qemu_img(
        "create", "-q", "-u", "-f", "qcow2", "-b", scenario.top.name, "-F", "qcow2",
        scenario.base.with_name("child.qcow2"), str(DISK),
    )  # fmt: skip
    refused(vm, scenario, LiveOtherChildren)


def test_a_header_was_changed_behind_the_vm(
    vm: LiveTestVm, scenario: LiveScenario, tmp_path: Path
) -> None:
    leaf = scenario.images[-1]
    data = leaf.read_bytes()
    other = create(scenario.base.with_name("9.qcow2"), DISK)
    assert data.count(scenario.top.name.encode()) == 1
    with leaf.open("r+b") as file:
        file.write(data.replace(scenario.top.name.encode(), other.name.encode()))
    refused(vm, scenario, LiveChainDiffers)


def test_an_image_that_is_not_of_this_disk(
    vm: LiveTestVm, scenario: LiveScenario, tmp_path: Path
) -> None:
    stranger = create(tmp_path / "stranger.qcow2", DISK)
    with live.QmpVm(str(vm.qmp), device=DEVICE) as disk, pytest.raises(NotInVm):
        live.merge(disk, stranger)


def test_what_a_cold_merge_has_saved_is_not_lost(vm: LiveTestVm, scenario: LiveScenario) -> None:
    identities = identify(scenario.base), identify(scenario.top)
    save_bitmaps(scenario.base, SavedBitmaps(*identities, ()))
    with live.QmpVm(str(vm.qmp), device=DEVICE) as disk, pytest.raises(UnfinishedMergeFound):
        live.merge(disk, scenario.top)
    assert leftovers(scenario) == [".base.qcow2.chainmerge-saved"]


def test_a_journal_that_makes_no_sense(vm: LiveTestVm, scenario: LiveScenario) -> None:
    live_journal_file(scenario.base).write_text("{}", encoding="ascii")
    with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
        with pytest.raises(LiveJournalDamaged):
            live.merge(disk, scenario.top)
        with pytest.raises(LiveJournalDamaged):
            live.resume(disk)


def test_a_disk_that_is_not_there(vm: LiveTestVm, scenario: LiveScenario, tmp_path: Path) -> None:
    with pytest.raises(NoSuchDisk) as caught:
        live.QmpVm(str(vm.qmp), device="disk7")
    assert f"it has: {DEVICE} ({scenario.images[-1]})" in str(caught.value)
    with pytest.raises(NoSuchDisk, match=rf"image0 \({scenario.base}\), image1 \("):
        live.QmpVm(str(vm.qmp), node="image7")
    with pytest.raises(VmUnreachable):
        live.QmpVm(str(tmp_path / "nothing"), device=DEVICE)


def test_a_monitor_that_talks_to_somebody_else(
    vm: LiveTestVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chainmerge.live.qmp.monitor._GREETING_SECONDS", 0.5)
    with (
        live.QmpVm(str(vm.qmp), device=DEVICE),
        pytest.raises(VmUnreachable, match="no answer"),
    ):
        live.QmpVm(str(vm.qmp), device=DEVICE)


def test_two_managers(vm: LiveTestVm, scenario: LiveScenario) -> None:
    with (
        sole_manager(identify(scenario.base)),
        live.QmpVm(str(vm.qmp), device=DEVICE) as disk,
        pytest.raises(LiveMergeDriven),
    ):
        live.merge(disk, scenario.top)
    with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
        live.merge(disk, scenario.top)


def read_only_for_good(images: Sequence[Path]) -> list[str]:
    """Command line: the files of all images but the active one may never be written to."""
    options = separate_nodes(images)
    writable = str(images[-1])
    return [
        option.replace('"auto-read-only": true', '"read-only": true')
        if '"filename"' in option and writable not in option
        else option
        for option in options
    ]


@pytest.mark.parametrize("kind", ["internal", "active"])
def test_a_base_that_qemu_may_not_write_to(tmp_path: Path, kind: str) -> None:
    scenario = build(tmp_path / "chain", 4, levels=1, active=kind == "active")
    with running_vm(tmp_path / "vm", scenario.images, read_only_for_good) as vm:
        before = vm.bitmaps("base.qcow2")
        with (
            live.QmpVm(str(vm.qmp), device=DEVICE) as disk,
            pytest.raises(LiveNotStarted, match="read-only"),
        ):
            live.merge(disk, scenario.top)
        assert vm.bitmaps("base.qcow2") == before
        assert vm.jobs() == []
        assert leftovers(scenario) == []
        vm.quit()


def test_nothing_to_resume(vm: LiveTestVm) -> None:
    with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
        with pytest.raises(NothingUnfinished):
            live.resume(disk)
        assert live.status(disk).merges == ()


def test_a_node_leads_to_the_disk(vm: LiveTestVm) -> None:
    for node in ("image0", "image1", "image2"):
        with live.QmpVm(str(vm.qmp), node=node) as disk:
            assert disk.graph().root == "image2"


def with_raw_base(part: dict[str, int]) -> Callable[[Sequence[Path]], list[str]]:
    """Command line: the root is *part* of a raw file."""

    def command_line(images: Sequence[Path]) -> list[str]:
        options = separate_nodes(images)
        raw = {"driver": "raw", "node-name": "image0", "file": "file0", "read-only": True, **part}
        return [json.dumps(raw) if '"image0", "read-only"' in one else one for one in options]

    return command_line


@pytest.mark.parametrize("part", [{"offset": 1 << 20}, {"offset": 0, "size": 1 << 20}], ids=str)
def test_a_base_in_the_middle_of_its_file(tmp_path: Path, part: dict[str, int]) -> None:
    """Undone, or merged once the VM has ended, it would be read from another place on."""
    base = create(tmp_path / "base", DISK, fmt="raw")
    top = create(tmp_path / "top", DISK, backing=base, backing_format="raw")

    with running_vm(tmp_path / "vm", [base, top], with_raw_base(part)) as vm, vm.disk() as disk:
        with pytest.raises(LiveChainDiffers, match="middle"):
            live.merge(disk, top)
        assert vm.jobs() == []


@pytest.mark.parametrize("part", [{"offset": 0}, {"offset": 0, "size": DISK}], ids=str)
def test_a_base_that_is_said_to_be_all_of_its_file(tmp_path: Path, part: dict[str, int]) -> None:
    base = create(tmp_path / "base", DISK, fmt="raw")
    top = create(tmp_path / "top", DISK, backing=base, backing_format="raw")
    expected = content(top)
    with running_vm(tmp_path / "vm", [base, top], with_raw_base(part)) as vm, vm.disk() as disk:
        live.merge(disk, top)
        vm.quit()
    assert content(base, fmt="raw") == expected


def test_a_raw_node_that_qemu_tells_more_of_than_it_can(tmp_path: Path) -> None:
    """It cuts off at 4096 bytes what no file's name tells, and the rest is no JSON."""
    base = create(tmp_path / "base", DISK)
    top = create(tmp_path / "top", backing=base)
    copies = [{"driver": "null-co", "size": DISK, "read-zeroes": True} for _ in range(128)]
    many = {"driver": "quorum", "vote-threshold": 1, "children": copies}
    with running_vm(tmp_path / "vm", [base, top]) as vm, vm.disk() as disk:
        vm.execute("blockdev-add", **{"driver": "raw", "node-name": "other", "file": many})
        live.merge(disk, top)
        vm.quit()


def test_an_active_image_that_nobody_uses(tmp_path: Path) -> None:
    """The job would have nobody to move over to base."""
    base = create(tmp_path / "base", DISK)
    top = create(tmp_path / "top", backing=base)
    *nodes, _device, _disk = separate_nodes([base, top])
    with running_qemu(tmp_path / "vm", nodes) as vm:
        with live.QmpVm(str(vm.qmp), node="image1") as disk, pytest.raises(LiveUnsuited):
            live.merge(disk, top)
        assert vm.jobs() == []


# Undone


def test_a_disk_that_is_unplugged_meanwhile(tmp_path: Path) -> None:
    """What was begun is no misuse; by the node that is left it is undone."""
    scenario = build(tmp_path / "chain", 5, levels=2, active=True)
    slot = ["-device", "pcie-root-port,id=upper"]
    *nodes, device, disk0 = separate_nodes(scenario.images)
    with running_qemu(tmp_path / "vm", [*slot, *nodes, device, f"{disk0},bus=upper"]) as vm:

        def unplug(event: ProgressEvent) -> None:
            if event.stage is Stage.COPY and vm.execute("query-block"):
                vm.execute("device_del", id=DEVICE)
                # The guest has not to agree any more.
                vm.execute("system_reset")
                vm.execute("cont")
                while vm.execute("query-block"):
                    pass

        with vm.disk() as disk, pytest.raises(MergeUnfinished, match="no disk"):
            live.merge(disk, scenario.top, scenario.base, on_progress=unplug)
        with live.QmpVm(str(vm.qmp), node="image2") as disk, pytest.raises(LiveMergeFailed):
            live.resume(disk)
        assert vm.jobs() == []
        vm.quit()
    assert content(scenario.top) == scenario.before
    assert leftovers(scenario) == []
    assert stored_bits(scenario.base)["everywhere"]


@dataclass
class StopAtCopy:
    """Says stop once data is being copied."""

    copying: bool = False

    def on_progress(self, event: ProgressEvent) -> None:
        self.copying = self.copying or event.stage is Stage.COPY

    def should_stop(self) -> bool:
        return self.copying


@pytest.mark.parametrize("kind", ["internal", "active"])
@pytest.mark.parametrize("command_line", [separate_nodes, one_drive])
def test_a_merge_that_is_to_stop_is_undone(
    tmp_path: Path, command_line: Callable[[Sequence[Path]], list[str]], kind: str
) -> None:
    scenario = build(tmp_path / "chain", 5, levels=2, active=kind == "active")
    watch = StopAtCopy()
    with running_vm(tmp_path / "vm", scenario.images, command_line) as vm:
        with Guest(vm, 5, DISK) as guest, live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
            with pytest.raises(Interrupted):
                live.merge(
                    disk,
                    scenario.top,
                    scenario.base,
                    options=LiveOptions(bandwidth=1 << 20),
                    on_progress=watch.on_progress,
                    should_stop=watch.should_stop,
                )
            guest.wait_for(len(guest.journal) + 5)
        assert vm.jobs() == []
        assert len(vm.chain()) == len(scenario.images)
        assert leftovers(scenario) == []
        # And then it is done after all.
        with Guest(vm, 6, DISK) as again, live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
            live.merge(disk, scenario.top, scenario.base, options=LiveOptions(delete=True))
        guest.journal += again.journal
        vm.quit()
    assert_closed_right(scenario, guest)


@pytest.mark.parametrize("kind", ["internal", "active"])
def test_a_journal_that_cannot_be_written_does_not_keep_the_guest_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    scenario = build(tmp_path / "chain", 8, levels=1, active=kind == "active")

    def full_at_the_switch(journal: LiveJournal, state: LiveState) -> LiveJournal:
        if state is LiveState.SWITCHING:
            raise WriteFailed(str(scenario.base), 0, 0, "No space left on device")
        return enter(journal, state)

    monkeypatch.setattr("chainmerge.live.driver.enter", full_at_the_switch)
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        with Guest(vm, 8, DISK) as guest, live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
            with pytest.raises(WriteFailed):
                live.merge(disk, scenario.top)
            guest.wait_for(len(guest.journal) + 5)
            assert vm.jobs() == []
            monkeypatch.undo()
            live.merge(disk, scenario.top, options=LiveOptions(delete=True))
        vm.quit()
    assert_closed_right(scenario, guest)


def test_a_copy_that_does_not_catch_up_is_undone_if_that_is_asked_for(tmp_path: Path) -> None:
    scenario = build(tmp_path / "chain", 5, levels=1, active=True)
    options = LiveOptions(bandwidth=1 << 20, deadline=0.5, on_stall="abort")
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        with (
            Guest(vm, 5, DISK) as guest,
            live.QmpVm(str(vm.qmp), device=DEVICE) as disk,
            pytest.raises(LiveMergeStalled),
        ):
            live.merge(disk, scenario.top, options=options)
        assert vm.chain() == [path.name for path in reversed(scenario.images)]
        vm.quit()
    assert content(scenario.top) == guest.applied_to(scenario.before)
    assert leftovers(scenario) == []
    assert stored_bits(scenario.base)["everywhere"] <= set(scenario.everywhere)


def test_the_guest_is_slowed_down_and_let_go_again(tmp_path: Path) -> None:
    scenario = build(tmp_path / "chain", 5, levels=1, active=True)
    options = LiveOptions(bandwidth=8 << 20, deadline=0.5, on_stall="throttle")
    limits = {"bps": 0, "bps_rd": 900 << 20, "bps_wr": 800 << 20, "iops": 0, "iops_rd": 0}
    with running_vm(tmp_path / "vm", scenario.images) as vm:
        vm.monitor.execute("block_set_io_throttle", {"id": QDEV, "iops_wr": 0, **limits})
        seen = []
        # Limits are for the guest's device. This one comes in by another way, and keeps to them
        # of its own accord.
        guest = Guest(vm, 5, DISK)

        def look(event: ProgressEvent) -> None:
            if event.stage is Stage.COPY:
                (disk,) = vm.execute("query-block")
                seen.append(disk["inserted"]["bps_wr"])
                guest.interval = 0.002 if seen[-1] == 800 << 20 else 0.2

        with guest, live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
            before = disk.disk_limits()
            live.merge(disk, scenario.top, options=options, on_progress=look)
            assert disk.disk_limits() == before
        assert before.limits["bps_wr"] == 800 << 20
        assert seen[0] == 800 << 20
        assert 0 < min(seen) < 800 << 20
        scenario.top.unlink()
        vm.quit()
    assert_closed_right(scenario, guest)


@pytest.mark.parametrize(
    ("before", "reads", "writes"),
    [
        ({"bps": 0}, 0, 4 * MIB),
        ({"bps": 2 * MIB}, 2 * MIB, 2 * MIB),
        ({"bps": 8 * MIB, "bps_max": 9 * MIB, "bps_max_length": 5}, 8 * MIB, 4 * MIB),
        ({"bps": 0, "bps_rd": 3 * MIB, "bps_wr": MIB}, 3 * MIB, MIB),
        ({"bps_wr": 8 * MIB, "bps_wr_max": 9 * MIB, "bps_wr_max_length": 5}, 0, 4 * MIB),
        ({"bps_rd": 8 * MIB, "bps_rd_max": 9 * MIB, "bps_rd_max_length": 5}, 8 * MIB, 4 * MIB),
    ],
    ids=str,
)
def test_nobody_is_given_more_by_being_slowed_down(
    vm: LiveTestVm, before: dict[str, int], reads: int, writes: int
) -> None:
    unlimited = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    vm.monitor.execute("block_set_io_throttle", {"id": QDEV, **unlimited, **before})
    with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
        limits = disk.disk_limits()
        disk.limit_disk(limits.slowed_to(4 * MIB))
        slower = disk.disk_limits().limits
        assert (slower["bps"], slower["bps_rd"], slower["bps_wr"]) == (0, reads, writes)
        bursts = max(before.get(name, 0) for name in ("bps_max", "bps_rd_max"))
        assert slower.get("bps_rd_max", 0) == bursts
        disk.limit_disk(limits)
        assert disk.disk_limits().limits == limits.limits


@pytest.mark.parametrize("direction", ["commit", "pull"])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_bitmap_in_memory_that_has_the_name_of_a_stored_one(
    tmp_path: Path, levels: int, direction: str
) -> None:
    """The stored one would be united with it and lost; or it would be taken for the stored one."""
    images = [create(tmp_path / "0.qcow2", DISK)]
    for number in range(1, levels + 1):
        images.append(create(tmp_path / f"{number}.qcow2", backing=images[-1]))
    base, top = images[:2]
    result, holder = (base, top) if direction == "commit" else (top, base)
    for image in (holder, *images[2:]):
        chainmerge.bitmaps_add(image, "checkpoint")
    options = LiveOptions(direction=direction)  # type: ignore[arg-type]
    with running_vm(tmp_path / "vm", images) as vm, vm.disk() as disk:
        node = f"image{images.index(result)}"
        vm.execute("block-dirty-bitmap-add", node=node, name="checkpoint", persistent=False)
        with pytest.raises(LiveUnsuited, match="in memory alone"):
            live.merge(disk, top, options=options)
        vm.execute("block-dirty-bitmap-remove", node=node, name="checkpoint")
        live.merge(disk, top, options=options)
        vm.quit()
    if direction == "commit":
        assert stored_bits(base).keys() == {"checkpoint"}


def test_a_base_in_another_directory_that_others_may_use(tmp_path: Path) -> None:
    """The VM knows its own chain. It does not know who else stands on base."""
    (tmp_path / "9000").mkdir()
    (tmp_path / "101").mkdir()
    base = create(tmp_path / "9000" / "base", DISK)
    top = create(tmp_path / "101" / "top", backing=base)
    allowed = (str(base.parent),)
    with (
        running_vm(tmp_path / "vm", (base, top)) as running,
        live.QmpVm(str(running.qmp), device=DEVICE) as disk,
    ):
        plan = live.plan(disk, top, base, access=Access(allow_backing=allowed))
        assert [one.code for one in plan.refusals] == ["users-unknown"]
        assert plan.refusals[0].hint.startswith("pull instead (--direction pull)")
        pulling = LiveOptions(direction="pull")
        planned = live.plan(disk, top, base, Access(allow_backing=allowed), pulling)
        assert planned.refusals == ()
        with pytest.raises(UsersUnknown):
            live.merge(disk, top, base, access=Access(allow_backing=allowed))
        clone = create(tmp_path / "clone", backing=base)
        vouched = Access(allow_backing=allowed, sole_user=True)
        with pytest.raises(BaseHasOtherChildren):
            live.merge(disk, top, base, access=vouched)
        clone.unlink()
        live.merge(disk, top, base, access=vouched)
