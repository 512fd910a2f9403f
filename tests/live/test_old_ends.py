# SPDX-License-Identifier: Apache-2.0
"""What lies behind the end of base's disk does not come to light under a guest that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.errors import Refused
from chainmerge.live.errors import LiveUnsuited
from chainmerge.options import Access
from tests.support.domain_vm import running_domain
from tests.support.live_vm import one_drive, running_vm
from tests.support.loopdev import loop_device
from tests.support.qemu import assert_clean, content, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
pytestmark = pytest.mark.timeout(180)


def chain(directory: Path, *, active: bool, compressed: bool = False) -> tuple[Path, ...]:
    """Base was larger, and ends inside a cluster."""
    directory.mkdir()
    base = create(directory / "base.qcow2", 2 * MIB)
    qemu_io(base, f"write -q -P 0x55 0 {2 * MIB}")
    if compressed:
        packed = directory / "packed.qcow2"
        qemu_img("convert", "-c", "-O", "qcow2", base, packed)
        packed.rename(base)
    qemu_img("resize", "-q", "--shrink", base, str(MIB + 512))
    top = create(directory / "top.qcow2", backing=base)
    qemu_img("resize", "-q", top, str(4 * MIB))
    qemu_io(top, f"write -q -P 2 {3 * MIB} 64k")
    if active:
        return base, top
    return base, top, create(directory / "leaf.qcow2", backing=top)


@pytest.mark.parametrize("manager", ["qmp", "libvirt"])
@pytest.mark.parametrize("active", [True, False], ids=["active", "internal"])
def test_old_bytes_in_the_last_cluster(
    tmp_path: Path, request: pytest.FixtureRequest, manager: str, active: bool
) -> None:
    images = chain(tmp_path / "chain", active=active)
    expected = content(images[-1])
    vm_of = (
        running_vm(tmp_path / "vm", images)
        if manager == "qmp"
        else running_domain(tmp_path / "vm", request.getfixturevalue("uri"), images)
    )
    with vm_of as vm:
        with vm.disk() as disk:
            live.merge(disk, images[1], images[0])
        with vm.client() as client:
            assert client.read(0, 4 * MIB) == expected
        vm.quit()
    assert content(images[0] if active else images[-1]) == expected
    assert_clean(images[0])


def test_compressed_old_bytes_are_refused(tmp_path: Path) -> None:
    images = chain(tmp_path / "chain", active=True, compressed=True)
    before = images[0].read_bytes()
    with running_vm(tmp_path / "vm", images) as vm, vm.disk() as disk:
        with pytest.raises(LiveUnsuited) as refusal:
            live.merge(disk, images[1], images[0])
        assert not live.plan(disk, images[1], images[0]).feasible
    assert "compressed" in refusal.value.sentence
    assert images[0].read_bytes() == before


def test_a_raw_device_is_not_to_become_larger(tmp_path: Path) -> None:
    """The guest would see what the device holds there, before anybody could write zeros."""
    with loop_device(tmp_path / "base", 2 * MIB) as device:
        top = create(tmp_path / "top.qcow2", backing=device, backing_format="raw")
        qemu_img("resize", "-q", top, str(4 * MIB))
        with running_vm(tmp_path / "vm", (device, top), one_drive) as vm, vm.disk() as disk:
            with pytest.raises(Refused) as refusal:
                live.merge(disk, top, device, access=Access(allow_backing=("/dev",)))
            plan = live.plan(disk, top, device, access=Access(allow_backing=("/dev",)))
    assert isinstance(refusal.value, LiveUnsuited)
    assert not plan.feasible
