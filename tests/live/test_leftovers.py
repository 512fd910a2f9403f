# SPDX-License-Identifier: Apache-2.0
"""What interrupted backups leave in a running VM: named, and removed as far as nobody uses it."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

import chainmerge
from chainmerge import live
from chainmerge.errors import ExitCode
from chainmerge.live.errors import LiveJobRunning, LiveUnsuited, NoSuchLeftover
from tests.support.cli import chainmerge as command
from tests.support.live_scenario import DISK
from tests.support.live_vm import running_qemu, running_vm
from tests.support.qemu import bitmap_names, create, qemu_io
from tests.support.surgery import mark_bitmap_in_use

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chainmerge.documents.repair import VmRepairReport
    from chainmerge.live.nodes import BlockGraph
    from tests.support.live_vm import LiveTestVm

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """A base and what the guest writes to; both have a checkpoint, and one that is broken."""
    base = create(tmp_path / "base.qcow2", DISK)
    leaf = create(tmp_path / "leaf.qcow2", backing=base.name)
    for image in (base, leaf):
        for name in ("checkpoint", "broken"):
            chainmerge.bitmaps_add(image, name)
        qemu_io(image, "write -q -P 1 0 1M")
        mark_bitmap_in_use(image, "broken")
    return [base, leaf]


@pytest.fixture
def vm(tmp_path: Path, images: list[Path]) -> Iterator[LiveTestVm]:
    with running_vm(tmp_path / "vm", images) as running, running.client():
        yield running


def found(report: VmRepairReport) -> dict[tuple[str, str], str | None]:
    """What is done about what was found, but for base."""
    return {
        (one.kind, one.name): one.action
        for one in report.leftovers
        if not str(one.image).endswith("base.qcow2")
    }


def repaired(vm: LiveTestVm, **named: Any) -> VmRepairReport:
    with live.QmpMachine(str(vm.qmp)) as machine:
        report: VmRepairReport = live.repair(machine, **named)
    return report


def add_bitmap(vm: LiveTestVm, name: str, **more: Any) -> None:
    vm.execute("block-dirty-bitmap-add", node="image1", name=name, **more)


def failing_target(vm: LiveTestVm, directory: Path) -> None:
    """A node that no write to reaches its file, as of a server that is gone."""
    create(directory / "target.raw", DISK, fmt="raw")
    vm.execute(
        "blockdev-add",
        driver="blkdebug",
        node_name="target",
        image={"driver": "file", "filename": str(directory / "target.raw")},
        inject_error=[{"event": "none", "iotype": "write", "errno": 5}],
    )


def wait_for_job(vm: LiveTestVm, status: str) -> None:
    nap = threading.Event()
    while status not in vm.jobs():
        nap.wait(0.02)


def test_what_nobody_uses_goes_and_checkpoints_stay(
    vm: LiveTestVm, images: list[Path], tmp_path: Path
) -> None:
    options = {"driver": "file", "filename": str(tmp_path / "new"), "size": 1 << 20}
    vm.execute("blockdev-create", job_id="ended", options=options)
    wait_for_job(vm, "concluded")
    vm.execute("block-export-add", id="idle", type="nbd", node_name="image1", name="idle")
    add_bitmap(vm, "for-a-backup", disabled=True)
    add_bitmap(vm, "of-a-server")
    with live.QmpMachine(str(vm.qmp)) as machine:
        planned = live.plan_repair(machine)
    assert planned.dry_run
    assert found(planned) == {
        ("job", "ended"): "dismiss",
        ("export", "guest"): "remove",
        ("export", "idle"): "remove",
        ("bitmap", "broken"): "remove",
        ("bitmap", "for-a-backup"): "remove",
        ("bitmap", "of-a-server"): None,
    }
    assert vm.jobs() == ["concluded"]
    done = repaired(vm)
    assert not done.has_failed
    # Of the guest's, whoever is connected to it is not thrown out.
    assert found(done)["export", "guest"] is None
    assert vm.jobs() == []
    assert [one["id"] for one in vm.execute("query-block-exports")] == ["guest"]
    assert set(vm.bitmaps("leaf.qcow2")) == {"checkpoint", "of-a-server"}
    # QEMU does not change what it only reads.
    assert set(vm.bitmaps("base.qcow2")) == {"checkpoint", "broken"}
    (broken,) = (one for one in repaired(vm).leftovers if one.name == "broken")
    assert broken.action is None
    assert "bitmaps repair" in broken.advice
    assert found(repaired(vm, bitmaps=["of-a-server"]))["bitmap", "of-a-server"] == "remove"
    for name in ("checkpoint", "of-a-server"):
        with pytest.raises(NoSuchLeftover):
            repaired(vm, bitmaps=[name])
    vm.quit()
    assert set(bitmap_names(images[1])) == {"checkpoint"}


def test_what_tells_that_a_checkpoint_is_broken_stays(tmp_path: Path, images: list[Path]) -> None:
    """Base is open for writing, as QEMU opens nodes, and leaves base after a cancelled merge."""
    base, leaf = images
    leaf = create(tmp_path / "above.qcow2", backing=leaf.name)
    chainmerge.bitmaps_add(leaf, "broken")
    words = []
    for number, image in enumerate((base, images[1], leaf)):
        below = f",backing=image{number - 1}" if number else ""
        file = f"file.driver=file,file.filename={image}"
        words += ["-blockdev", f"driver=qcow2,node-name=image{number},{file}{below}"]
    words += ["-device", "virtio-blk-pci,id=disk0,drive=image2"]
    with running_qemu(tmp_path / "vm", words) as running:
        done = [one for one in repaired(running).leftovers if one.name == "broken"]
        assert [one.action for one in done] == [None, None]
        assert "would pass for all of it" in done[0].reason
        running.quit()
    (verdict,) = (one for one in chainmerge.bitmaps_list(leaf).verdicts if one.name == "broken")
    assert not verdict.passes


def test_a_stream_that_nobody_dismissed_does_not_end_the_vm(
    vm: LiveTestVm, images: list[Path]
) -> None:
    """QEMU (7.2) ends by a segmentation fault when it is asked for its nodes then."""
    add_bitmap(vm, "for-a-backup", disabled=True)
    vm.execute("block-stream", job_id="ended", device="image1", auto_dismiss=False)
    wait_for_job(vm, "concluded")
    for words in (["status"], ["plan", str(images[1])]):
        refused = command("live", words[0], "--qmp", vm.qmp, "--device", "disk0", *words[1:])
        assert refused.status == ExitCode.REFUSED
        assert "ended (stream, ended and not dismissed" in refused.err
    with live.QmpMachine(str(vm.qmp)) as machine:
        planned = live.plan_repair(machine, bitmaps=["for-a-backup"])
    assert found(planned)["job", "ended"] == "dismiss"
    assert vm.jobs() == ["concluded"]
    done = found(repaired(vm, bitmaps=["for-a-backup"]))
    assert done["job", "ended"] == "dismiss"
    assert done["bitmap", "for-a-backup"] == "remove"
    assert vm.jobs() == []
    assert vm.alive


def test_a_backup_whose_target_is_gone(vm: LiveTestVm, images: list[Path], tmp_path: Path) -> None:
    failing_target(vm, tmp_path)
    arguments = {"device": "image1", "target": "target", "sync": "full"}
    vm.execute(
        "blockdev-backup", job_id="backup", on_target_error="stop", auto_dismiss=False, **arguments
    )
    wait_for_job(vm, "paused")
    before = repaired(vm)
    job = next(one for one in before.leftovers if one.kind == "job")
    assert job.action is None
    assert "stopped by an error" in job.state
    assert "--cancel-job backup" in job.advice
    assert ("bitmap", "") in found(before)
    assert vm.jobs() == ["paused"]
    with vm.disk() as disk, pytest.raises(LiveJobRunning) as raised:
        live.plan(disk, images[1])
    assert "backup (backup, stopped by an error)" in raised.value.sentence
    assert "`chainmerge live repair`" in raised.value.advice
    with live.QmpMachine(str(vm.qmp)) as machine, pytest.raises(NoSuchLeftover):
        live.repair(machine, jobs=["another"])
    done = repaired(vm, jobs=["backup"])
    assert found(done)["job", "backup"] == "cancel"
    assert not done.has_failed
    assert vm.jobs() == []
    assert ("bitmap", "") not in found(done)


def test_what_a_backup_uses_stays(vm: LiveTestVm) -> None:
    add_bitmap(vm, "used", disabled=True)
    vm.execute(
        "block-export-add",
        id="pull",
        type="nbd",
        node_name="image1",
        name="pull",
        bitmaps=["used"],
    )
    with live.QmpMachine(str(vm.qmp)) as machine:
        planned = {one.name: one for one in live.plan_repair(machine).leftovers}
        assert planned["used"].state == "busy"
        assert planned["used"].action is None
    # Nobody is connected: the export goes, and with it what keeps the bitmap.
    done = repaired(vm)
    assert found(done)["bitmap", "used"] == "remove"
    assert "used" not in vm.bitmaps("leaf.qcow2")


def test_merges_of_ours_are_left_to_resume(vm: LiveTestVm, tmp_path: Path) -> None:
    options = {"driver": "file", "filename": str(tmp_path / "new"), "size": 1 << 20}
    vm.execute("blockdev-create", job_id="chainmerge-1", options=options)
    wait_for_job(vm, "concluded")
    with pytest.raises(NoSuchLeftover):
        repaired(vm, jobs=["chainmerge-1"])
    assert found(repaired(vm))["job", "chainmerge-1"] is None
    assert vm.jobs() == ["concluded"]


def test_a_bitmap_without_a_name_on_a_merged_image_is_named(
    vm: LiveTestVm, images: list[Path], tmp_path: Path
) -> None:
    """QEMU would abort when it closes that image. Who made the bitmap is not known to it."""
    target = create(tmp_path / "copied.qcow2", DISK)
    vm.execute(
        "blockdev-add",
        driver="copy-before-write",
        node_name="cbw",
        file="image1",
        target={"driver": "qcow2", "file": {"driver": "file", "filename": str(target)}},
    )
    with live.QmpMachine(str(vm.qmp)) as machine:
        assert ("bitmap", "") in found(live.plan_repair(machine))
        with pytest.raises(LiveUnsuited):
            live.merge(machine.disk("disk0"), images[1])
    assert vm.alive


class WithNamelessBitmap(live.QmpVm):
    """A disk on whose active image somebody has made a bitmap, and no filter tells who."""

    def graph(self) -> BlockGraph:
        found = super().graph()
        marked = replace(found.chain()[0], nameless_bitmaps=1)
        return replace(found, nodes={**found.nodes, marked.name: marked})


def test_a_bitmap_without_a_name_that_nobody_explains(vm: LiveTestVm, images: list[Path]) -> None:
    with WithNamelessBitmap(str(vm.qmp), device="disk0") as disk:
        (refusal,) = live.plan(disk, images[1]).refusals
    assert refusal.code == LiveUnsuited.code
    assert "1 bitmap without a name" in refusal.sentence


def test_the_command(vm: LiveTestVm) -> None:
    add_bitmap(vm, "for-a-backup", disabled=True)
    shown = command("live", "repair", "--qmp", vm.qmp, "--dry-run")
    assert shown.status == ExitCode.DONE, shown.err
    assert "for-a-backup" in shown.out
    assert "to remove" in shown.out
    asked = command("live", "repair", "--qmp", vm.qmp)
    assert asked.status == ExitCode.USAGE
    assert "--yes" in asked.err
    assert "for-a-backup" in vm.bitmaps("leaf.qcow2")
    done = command("live", "repair", "--qmp", vm.qmp, "--yes", "--json")
    assert done.status == ExitCode.DONE, done.err
    names = [one["name"] for one in json.loads(done.out)["leftovers"] if one["done"]]
    assert sorted(names) == ["broken", "for-a-backup"]
    assert "for-a-backup" not in vm.bitmaps("leaf.qcow2")
