# SPDX-License-Identifier: Apache-2.0
"""Volumes that are nearly full, that grow while the guest writes, and that cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import pytest

import chainmerge
from chainmerge import live
from chainmerge.documents.progress import Stage
from chainmerge.live import headroom
from chainmerge.live.errors import LiveMergeFailed, VmLost, VmUnreachable
from chainmerge.options import Access, LiveOptions
from tests.support.domain_vm import TestDomain, running_domain
from tests.support.fake_lvm import FakeLvm
from tests.support.live_scenario import stored_bits
from tests.support.live_vm import LiveTestVm, running_vm
from tests.support.loopdev import loop_device
from tests.support.qemu import assert_clean, content, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from chainmerge.documents.progress import ProgressEvent

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


Vm = LiveTestVm | TestDomain
Start = Callable[[Path, Sequence[Path]], AbstractContextManager[Vm]]


@pytest.fixture(params=["qmp", "libvirt"])
def start(request: pytest.FixtureRequest) -> Start:
    """Starts a VM of either kind with a chain of images, root first."""
    if request.param == "qmp":
        return running_vm
    uri: str = request.getfixturevalue("uri")
    return lambda directory, images: running_domain(directory, uri, images)


@pytest.mark.parametrize("kind", ["internal", "active"])
def test_a_volume_on_which_block_commit_alone_fails(
    tmp_path: Path, start: Start, kind: str
) -> None:
    with loop_device(tmp_path / "volume", 128 * MIB) as device:
        images = full_volume(tmp_path, device, active=kind == "active")
        with running_vm(tmp_path / "vm-1", images) as alone:
            commit_without_us(alone)
            alone.quit()
    with loop_device(tmp_path / "other", 128 * MIB) as device:
        for leftover in tmp_path.glob("*.qcow2"):
            leftover.unlink()
        images = full_volume(tmp_path, device, active=kind == "active")
        # The guest writes where top, or base in the end, has clusters already.
        with (
            start(tmp_path / "vm-2", images) as vm,
            vm.guest(1, 100 * MIB) as guest,
            vm.disk() as disk,
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


class BusyGuest:
    """Writes to fresh places each time that progress is reported, up to *limit* bytes.

    In a thread of its own and all on one connection. While it goes over from one image to
    another, QEMU holds back the requests of guests, and of the connections that there are. Not
    so those of one that comes in at that moment: what it wrote was found to be lost (7.2).
    """

    PIECE: Final = 4 * MIB

    def __init__(self, vm: Vm, start: int, limit: int) -> None:
        self._vm = vm
        self._writer = ThreadPoolExecutor(1)
        self._writes: list[Future[None]] = []
        self._limit = limit
        self.start = start

    def __enter__(self) -> Self:
        self._client = self._vm.client()
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()
        self._client.close()

    def on_progress(self, event: ProgressEvent) -> None:
        at = len(self._writes) * self.PIECE
        if event.stage is Stage.COPY and at < self._limit:
            data = b"\5" * self.PIECE
            write = self._writer.submit(self._vm.write_on, self._client, self.start + at, data)
            self._writes.append(write)

    def written(self) -> int:
        """Bytes that were written, all of them successfully."""
        for write in self._writes:
            write.result()
        return len(self._writes) * self.PIECE


def test_a_volume_grows_ahead_of_a_guest_that_writes(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
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
        with start(tmp_path / "vm", (device, top)) as vm:
            with BusyGuest(vm, 64 * MIB, 80 * MIB) as guest, vm.disk() as disk:
                options = LiveOptions(volume="lvm", bandwidth=16 * MIB)
                report = live.merge(
                    disk, top, access=DEVICES, options=options, on_progress=guest.on_progress
                )
            vm.quit()
        # Once for what the plan knows of, and then for what the guest writes.
        assert len(lvm.calls("lvextend")) >= 1 + 3
        written = guest.written()
        assert written >= 24 * MIB
        assert_clean(device)
        end = guest.start + written
        data = content(device)
        assert data[: 40 * MIB] == b"\7" * (40 * MIB)
        assert data[guest.start : end] == b"\5" * written
        wanted = {*range(40 * MIB // 65536), *range(guest.start // 65536, end // 65536)}
        assert stored_bits(device) == {"good": wanted}
        for bitmap in report.bitmaps:
            if bitmap.dirty_bytes is None:
                # libvirt does not tell what is dirty.
                assert isinstance(vm, TestDomain)
                continue
            assert 40 * MIB < bitmap.dirty_bytes <= 40 * MIB + written


def test_a_vm_that_does_not_answer_while_its_volume_is_watched_goes_on_with_the_merge(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows that it is to be undone, so it is carried on, wherever the connection broke."""
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    physical = tmp_path / "physical-volume"
    physical.touch()
    lvm.add_group("vg", extents=200, devices=[physical])

    def unreachable(disk: live.LiveDisk, _node: str) -> int:
        raise VmUnreachable(disk.name, "no answer")

    with loop_device(tmp_path / "volume", 128 * MIB) as device:
        lvm.add_volume("vg", "base", device)
        create(device, 256 * MIB)
        top = create(tmp_path / "top.qcow2", backing=device)
        qemu_io(top, "write -q -P 7 0 20M")
        with start(tmp_path / "vm", (device, top)) as vm:
            options = LiveOptions(volume="lvm", bandwidth=4 * MIB)
            with vm.disk() as disk, monkeypatch.context() as patched:
                patched.setattr(type(disk), "highest_write", unreachable)
                with pytest.raises(VmLost, match="no answer"):
                    live.merge(disk, top, access=DEVICES, options=options)
            with vm.disk() as disk:
                (unfinished,) = live.status(disk).merges
                assert unfinished.state == "copying"
                live.resume(disk, options=LiveOptions(volume="lvm"))
                assert vm.chain() == [device.name]
            vm.quit()
        assert content(device)[: 20 * MIB] == b"\7" * (20 * MIB)


def test_a_full_volume_undoes_the_merge_and_the_guest_goes_on(tmp_path: Path, start: Start) -> None:
    with loop_device(tmp_path / "volume", 48 * MIB) as device:
        create(device, 256 * MIB)
        chainmerge.bitmaps_add(device, "good")
        qemu_io(device, "write -q -P 1 0 1M")
        top = create(tmp_path / "top.qcow2", backing=device)
        chainmerge.bitmaps_add(top, "good", access=DEVICES)
        qemu_io(top, "write -q -P 7 0 20M")
        with start(tmp_path / "vm", (device, top)) as vm:
            with BusyGuest(vm, 64 * MIB, 48 * MIB) as guest, vm.disk() as disk:
                options = LiveOptions(bandwidth=8 * MIB)
                with pytest.raises(LiveMergeFailed, match=r"50331648 bytes is full|48"):
                    live.merge(
                        disk, top, access=DEVICES, options=options, on_progress=guest.on_progress
                    )
            assert vm.chain() == [top.name, device.name]
            assert vm.jobs() == []
            with vm.client() as client:
                vm.write_on(client, 0, b"\4" * MIB)
            vm.quit()
        bits = stored_bits(device)["good"]
        # With libvirt, base records what a commit copies that does not come to its end.
        assert bits >= set(range(16)) if isinstance(vm, TestDomain) else bits == set(range(16))
        written = guest.written()
        fresh = range(guest.start // 65536, (guest.start + written) // 65536)
        assert stored_bits(top) == {"good": {*range(320), *fresh}}
        data = content(top)
        assert data[:MIB] == b"\4" * MIB
        assert data[MIB : 20 * MIB] == b"\7" * (19 * MIB)
        assert data[guest.start :][:written] == b"\5" * written
