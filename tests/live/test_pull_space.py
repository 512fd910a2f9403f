# SPDX-License-Identifier: Apache-2.0
"""What top takes for a pull in a running VM: known beforehand, and extended while it runs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

import pytest

import chainmerge
from chainmerge import live
from chainmerge.live import headroom
from chainmerge.live.errors import LiveUnsuited
from chainmerge.options import Access, LiveOptions
from chainmerge.storage.volume_errors import CannotGrow
from tests.live.test_space import BusyGuest
from tests.support.fake_lvm import FakeLvm
from tests.support.live_scenario import stored_bits
from tests.support.live_vm import one_drive, running_vm
from tests.support.loopdev import loop_device
from tests.support.qemu import assert_clean, content, create, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
DEVICES = Access(allow_backing=("/dev",), sole_user=True)
pytestmark = pytest.mark.timeout(180)


def test_a_volume_grows_ahead_of_the_copy_and_of_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headroom, "LEAD_SECONDS", 0.5)
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    physical = tmp_path / "physical-volume"
    physical.touch()
    lvm.add_group("vg", extents=200, devices=[physical])
    base = create(tmp_path / "base.qcow2", 512 * MIB)
    chainmerge.bitmaps_add(base, "good")
    qemu_io(base, "write -q -P 7 0 40M")
    with loop_device(tmp_path / "volume", 8 * MIB) as device:
        lvm.add_volume("vg", "top", device)
        create(device, backing=base)
        access = Access(allow_backing=(str(tmp_path),), sole_user=True)
        chainmerge.bitmaps_add(device, "good", access=access)
        options = LiveOptions(volume="lvm", bandwidth=16 * MIB, direction="pull")
        with running_vm(tmp_path / "vm", (base, device)) as vm:
            with BusyGuest(vm, 64 * MIB, 80 * MIB) as guest, vm.disk() as disk:
                live.merge(
                    disk, device, access=access, options=options, on_progress=guest.on_progress
                )
                written = guest.written()
            vm.quit()
        # Once for what the plan knows of, and then for what the guest writes.
        assert len(lvm.calls("lvextend")) > 1
        assert_clean(device)
        data = content(device)
        assert data[: 40 * MIB] == b"\7" * (40 * MIB)
        assert data[guest.start :][:written] == b"\5" * written
        end = guest.start + written
        wanted = {*range(40 * MIB // 65536), *range(guest.start // 65536, end // 65536)}
        assert stored_bits(device) == {"good": wanted}


@pytest.mark.parametrize("kind", ["middle", "active"])
def test_a_device_that_is_too_small_is_refused(tmp_path: Path, kind: str) -> None:
    base = create(tmp_path / "base.qcow2", 64 * MIB)
    qemu_io(base, "write -q -P 7 0 40M")
    with loop_device(tmp_path / "volume", 32 * MIB) as device:
        create(device, backing=base)
        images = [base, device]
        if kind == "middle":
            images.append(create(tmp_path / "leaf.qcow2", backing=device))
        access = Access(allow_backing=("/dev", str(tmp_path)), sole_user=True)
        with running_vm(tmp_path / "vm", images) as vm:
            with vm.disk() as disk, pytest.raises(CannotGrow) as refused:
                live.merge(disk, device, access=access, options=LiveOptions(direction="pull"))
            assert vm.chain() == [image.name for image in reversed(images)]
            vm.quit()
    assert refused.value.facts["required"] > 40 * MIB


CLUSTERS: Final[dict[str, dict[str, Any]]] = {
    "small clusters": {"cluster_size": 4096},
    "large clusters": {"cluster_size": 2 * MIB},
    "version 2": {"compat": "0.10"},
}


@pytest.mark.parametrize("case", CLUSTERS)
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_the_plan_is_never_too_small(tmp_path: Path, fmt: str, case: str) -> None:
    """Zeros beside data become data; what is far from any does not."""
    base = create(tmp_path / f"base.{fmt}", 64 * MIB, fmt=fmt)
    writes = [
        f"write -q -P {1 + n % 200} {n * 1300 * 1024 + n * 512} {(n % 7 + 1) * 4096}"
        for n in range(40)
    ]
    qemu_io(base, *writes, "write -q -z 20M 12M", fmt=fmt)
    top = create(tmp_path / "top.qcow2", backing=base, backing_format=fmt, **CLUSTERS[case])
    qemu_io(top, "write -q -P 9 1M 700k", "write -q -z 40M 1M")
    leaf = create(tmp_path / "leaf.qcow2", backing=top)
    before = content(leaf)
    options = LiveOptions(direction="pull", delete=True)
    with running_vm(tmp_path / "vm", (base, top, leaf), one_drive) as vm:
        with vm.disk() as disk:
            plan = live.plan(disk, top, base, options=options)
            live.merge(disk, top, base, options=options)
        vm.quit()
    assert content(leaf) == before
    assert_clean(top)
    size = top.stat().st_size
    assert size <= plan.space.required <= 3 * size + 8 * MIB
    assert not base.exists()


@pytest.mark.parametrize("kind", ["middle", "active"])
def test_an_old_qemu_is_not_made_to_copy_into_subclusters(tmp_path: Path, kind: str) -> None:
    """It ends with a failed assertion where one cluster is partly top's (7.2)."""
    base = create(tmp_path / "base.qcow2", 64 * MIB)
    qemu_io(base, "write -q -P 7 0 40M")
    top = create(tmp_path / "top.qcow2", backing=base, cluster_size=128 << 10, extended_l2="on")
    qemu_io(top, "write -q -P 9 1M 4k")
    images = [base, top]
    if kind == "middle":
        images.append(create(tmp_path / "leaf.qcow2", backing=top))
    before = content(images[-1])
    options = LiveOptions(direction="pull")
    with running_vm(tmp_path / "vm", images) as vm:
        with vm.disk() as disk, contextlib.ExitStack() as stack:
            if disk.qemu_version < (8, 2, 0):
                stack.enter_context(pytest.raises(LiveUnsuited, match="can crash"))
            live.merge(disk, top, options=options)
        assert vm.alive
        vm.quit()
    assert content(images[-1]) == before
