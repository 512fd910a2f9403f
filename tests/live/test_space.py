# SPDX-License-Identifier: Apache-2.0
"""Volumes that are nearly full, that grow while the guest writes, and that cannot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.live import headroom
from chainmerge.live.errors import LiveMergeFailed
from chainmerge.options import Access, LiveOptions
from chainmerge.types import Stage
from tests.support.fake_lvm import FakeLvm
from tests.support.live_scenario import stored_bits
from tests.support.live_vm import DEVICE, Guest, LiveTestVm, running_vm
from tests.support.loopdev import loop_device
from tests.support.qemu import assert_clean, content, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.types import ProgressEvent

MIB = 1 << 20
DEVICES = Access(allow_backing=("/dev",))
pytestmark = pytest.mark.timeout(180)


def full_volume(directory: Path, device: Path, *, active: bool) -> tuple[Path, ...]:
    """Base with 14 stale bitmaps on a device of 128 MiB, and 126 MiB above it."""
    template = create(directory / "template.qcow2", 1 << 30)
    for number in range(14):
        # One at a time, as the years bring them.
        qemu_img("bitmap", "--add", template, f"stale-{number}")
    device.write_bytes(template.read_bytes())
    top = create(directory / "top.qcow2", backing=device)
    qemu_img("bitmap", "--add", top, "good")
    qemu_io(top, "write -q -P 7 0 126M")
    if active:
        return device, top
    leaf = create(directory / "leaf.qcow2", backing=top)
    qemu_img("bitmap", "--add", leaf, "good")
    return device, top, leaf


@pytest.mark.parametrize("kind", ["internal", "active"])
def test_a_volume_on_which_block_commit_alone_fails(tmp_path: Path, kind: str) -> None:
    with loop_device(tmp_path / "volume", 128 * MIB) as device:
        images = full_volume(tmp_path, device, active=kind == "active")
        with running_vm(tmp_path / "vm-1", images) as vm:
            commit_without_us(vm)
            vm.quit()
    with loop_device(tmp_path / "other", 128 * MIB) as device:
        for leftover in tmp_path.glob("*.qcow2"):
            leftover.unlink()
        images = full_volume(tmp_path, device, active=kind == "active")
        # The guest writes where top, or base in the end, has clusters already.
        with (
            running_vm(tmp_path / "vm-2", images) as vm,
            Guest(vm, 1, 100 * MIB) as guest,
            live.QmpVm(str(vm.qmp), device=DEVICE) as disk,
        ):
            report = live.merge(disk, images[1], images[0], access=DEVICES)
            during = len(guest.journal)
            guest.wait_for(during + 5)
            guest.stop()
            expected = guest.applied_to(b"\7" * (126 * MIB))
            with vm.client() as client:
                found = b"".join(client.read(at, MIB) for at in range(0, 126 * MIB, MIB))
            assert found == expected
            vm.quit()
        assert report.plan is not None
        assert report.plan.space.required <= 128 * MIB
        assert_clean(device)
        wanted = set(range(126 * MIB // 65536))
        assert stored_bits(device) == {"good": wanted}


def commit_without_us(vm: LiveTestVm) -> None:
    """What a management layer does that knows nothing of stale bitmaps."""
    nodes = vm.execute("query-named-block-nodes", flat=True)
    names = [node["node-name"] for node in nodes]
    above = {"top_node": "image1"} if "image2" in names else {}
    root = "image2" if "image2" in names else "image1"
    vm.execute(
        "block-commit",
        job_id="alone",
        device=root,
        base_node="image0",
        auto_dismiss=False,
        **above,
    )
    while (status := vm.jobs()) not in (["concluded"], ["ready"]):
        vm.monitor.wait_for_event(0.2)
    (job,) = vm.execute("query-jobs")
    assert status == ["concluded"]
    assert "No space left on device" in job["error"]
    vm.execute("job-dismiss", id="alone")


@dataclass
class BusyGuest:
    """Writes to fresh places each time that progress is reported, up to *limit* bytes."""

    vm: LiveTestVm
    start: int
    limit: int
    piece: int = 4 * MIB
    written: int = 0
    stages: list[Stage] = field(default_factory=list)

    def on_progress(self, event: ProgressEvent) -> None:
        self.stages.append(event.stage)
        if event.stage is Stage.COPY and self.written < self.limit:
            with self.vm.client() as disk:
                disk.write(self.start + self.written, b"\5" * self.piece)
            self.written += self.piece


def test_a_volume_grows_ahead_of_a_guest_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headroom, "LEAST_MARGIN", 8 * MIB)
    monkeypatch.setattr(headroom, "LEAD_SECONDS", 0.5)
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    physical = tmp_path / "physical-volume"
    physical.touch()
    lvm.add_group("vg", extents=200, devices=[physical])
    with loop_device(tmp_path / "volume", 8 * MIB) as device:
        lvm.add_volume("vg", "base", device)
        create(device, 512 * MIB)
        top = create(tmp_path / "top.qcow2", backing=device)
        chainmerge.bitmaps_add(top, "good", access=DEVICES)
        qemu_io(top, "write -q -P 7 0 40M")
        with running_vm(tmp_path / "vm", (device, top)) as vm:
            guest = BusyGuest(vm, 64 * MIB, 80 * MIB)
            with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
                options = LiveOptions(volume="lvm", bandwidth=16 * MIB)
                report = live.merge(
                    disk, top, access=DEVICES, options=options, on_progress=guest.on_progress
                )
            vm.quit()
        # Once for what the plan knows of, and then for what the guest writes.
        assert len(lvm.calls("lvextend")) >= 1 + 3
        assert guest.written >= 24 * MIB
        assert_clean(device)
        end = guest.start + guest.written
        data = content(device)
        assert data[: 40 * MIB] == b"\7" * (40 * MIB)
        assert data[guest.start : end] == b"\5" * guest.written
        wanted = {*range(40 * MIB // 65536), *range(guest.start // 65536, end // 65536)}
        assert stored_bits(device) == {"good": wanted}
        assert report.bitmaps[0].dirty_bytes == 40 * MIB + guest.written


def test_a_full_volume_undoes_the_merge_and_the_guest_goes_on(tmp_path: Path) -> None:
    with loop_device(tmp_path / "volume", 48 * MIB) as device:
        create(device, 256 * MIB)
        chainmerge.bitmaps_add(device, "good")
        qemu_io(device, "write -q -P 1 0 1M")
        top = create(tmp_path / "top.qcow2", backing=device)
        chainmerge.bitmaps_add(top, "good", access=DEVICES)
        qemu_io(top, "write -q -P 7 0 20M")
        with running_vm(tmp_path / "vm", (device, top)) as vm:
            guest = BusyGuest(vm, 64 * MIB, 48 * MIB)
            with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
                options = LiveOptions(bandwidth=8 * MIB)
                with pytest.raises(LiveMergeFailed, match="48"):
                    live.merge(
                        disk, top, access=DEVICES, options=options, on_progress=guest.on_progress
                    )
                assert disk.graph().chain()[0].name == "image1"
            assert vm.jobs() == []
            with vm.client() as client:
                client.write(0, b"\4" * MIB)
            vm.quit()
        assert stored_bits(device) == {"good": set(range(16))}
        written = range(guest.start // 65536, (guest.start + guest.written) // 65536)
        assert stored_bits(top) == {"good": {*range(320), *written}}
        data = content(top)
        assert data[:MIB] == b"\4" * MIB
        assert data[MIB : 20 * MIB] == b"\7" * (19 * MIB)
        assert data[guest.start :][: guest.written] == b"\5" * guest.written
