# SPDX-License-Identifier: Apache-2.0
"""Images that the merge would write to and the VM cannot: in the plan, with nothing changed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import chainmerge
from chainmerge import live
from chainmerge.errors import ExitCode
from chainmerge.live.errors import LiveNotWritable, LiveUnsuited
from chainmerge.options import Access, LiveOptions
from tests.support.cli import chainmerge as command
from tests.support.domain_vm import TestDomain, running_domain
from tests.support.live_scenario import DISK
from tests.support.live_vm import LiveTestVm, running_vm
from tests.support.loopdev import loop_device
from tests.support.qemu import content, create, info, qemu_img, qemu_io

pytestmark = pytest.mark.timeout(120)

Vm = LiveTestVm | TestDomain
Start = Callable[[Path, Sequence[Path]], AbstractContextManager[Vm]]


@pytest.fixture(params=["qmp", "libvirt"])
def start(request: pytest.FixtureRequest) -> Start:
    """Starts a VM of either kind with a chain of images, root first."""
    if request.param == "qmp":
        return running_vm
    uri = request.getfixturevalue("uri")
    return lambda directory, images: running_domain(directory, uri, images)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Root, base, top, and the one that the guest writes to; stale bitmaps in the lower two."""
    found: list[Path] = []
    for name in ("root", "base", "top", "leaf"):
        below = found[-1].name if found else None
        image = create(tmp_path / f"{name}.qcow2", None if below else DISK, backing=below)
        found.append(image)
        chainmerge.bitmaps_add(image, "good")
        qemu_io(image, "write -q -P 1 0 1M")
    for image in found[:2]:
        chainmerge.bitmaps_add(image, "stale")
    return found


@contextlib.contextmanager
def immutable(image: Path) -> Iterator[None]:
    subprocess.run(["chattr", "+i", image], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", image], check=True)


@contextlib.contextmanager
def read_only(device: Path) -> Iterator[None]:
    subprocess.run(["blockdev", "--setro", device], check=True)
    try:
        yield
    finally:
        subprocess.run(["blockdev", "--setrw", device], check=True)


def assert_refused(vm: Vm, top: Path, named: Path, access: Access | None = None) -> None:
    """The plan says it, and the merge leaves everything as it is."""
    files = [path for path in top.parent.iterdir() if path.is_file()]
    before = (vm.chain(), {path: path.read_bytes() for path in files})
    with vm.disk() as disk:
        plan = live.plan(disk, top, access=access)
        assert [one.code for one in plan.refusals] == ["live-not-writable"]
        with pytest.raises(LiveNotWritable, match=named.name):
            live.merge(disk, top, access=access)
        assert "chainmerge-probe" not in disk.graph().nodes
    files = [path for path in top.parent.iterdir() if path.is_file()]
    assert (vm.chain(), {path: path.read_bytes() for path in files}) == before
    assert vm.jobs() == []


@pytest.mark.parametrize("which", ["base", "leaf"])
def test_an_immutable_image(tmp_path: Path, start: Start, images: list[Path], which: str) -> None:
    """The leaf is below another one: its header gets another name, and nobody has it open so."""
    top, leaf = images[2:]
    active = create(tmp_path / "active.qcow2", backing=leaf.name)
    image = tmp_path / f"{which}.qcow2"
    with start(tmp_path / "vm", [*images, active]) as vm:
        with immutable(image):
            assert_refused(vm, top, image)
        with vm.disk() as disk:
            live.merge(disk, top, options=LiveOptions(delete=True))
        assert vm.chain() == ["active.qcow2", "leaf.qcow2", "base.qcow2", "root.qcow2"]


def test_base_takes_what_the_guest_writes(tmp_path: Path, start: Start, images: list[Path]) -> None:
    with start(tmp_path / "vm", images) as vm, immutable(images[-2]):
        assert_refused(vm, images[-1], images[-2])


def test_a_root_that_a_stale_bitmap_is_to_be_removed_from(
    tmp_path: Path, uri: str, images: list[Path]
) -> None:
    """libvirt removes a bitmap from all images of the chain."""
    with running_domain(tmp_path / "vm", uri, images) as vm, immutable(images[0]):
        assert_refused(vm, images[2], images[0])


def test_a_root_that_nothing_is_changed_of(tmp_path: Path, images: list[Path]) -> None:
    with running_vm(tmp_path / "vm", images) as vm, immutable(images[0]), vm.disk() as disk:
        live.merge(disk, images[2])


def test_a_device_that_is_read_only(tmp_path: Path, start: Start) -> None:
    with loop_device(tmp_path / "volume", DISK) as device:
        qemu_img("create", "-q", "-f", "qcow2", device, str(DISK))
        directory = tmp_path / "chain"
        directory.mkdir()
        top = create(directory / "top.qcow2", backing=device)
        leaf = create(directory / "leaf.qcow2", backing=top)
        access = Access(allow_backing=(str(device),))
        with start(tmp_path / "vm", [device, top, leaf]) as vm, read_only(device):
            assert_refused(vm, top, device, access)


@pytest.fixture
def with_data_file(tmp_path: Path) -> list[Path]:
    data = tmp_path / "data.img"
    data.touch()
    base = create(tmp_path / "base.qcow2", DISK, data_file=str(data))
    qemu_io(base, "write -q -P 1 0 1M")
    top = create(tmp_path / "top.qcow2", backing=base)
    qemu_io(top, "write -q -P 2 1M 1M")
    return [data, base, top, create(tmp_path / "leaf.qcow2", backing=top)]


def test_an_immutable_data_file(tmp_path: Path, with_data_file: list[Path]) -> None:
    data, *images = with_data_file
    access = Access(allow_data_file=(str(data),))
    with running_vm(tmp_path / "vm", images) as vm, immutable(data):
        assert_refused(vm, images[1], images[0], access)


def test_libvirt_changes_no_bitmaps_where_there_is_a_data_file(
    tmp_path: Path, uri: str, with_data_file: list[Path]
) -> None:
    data, *images = with_data_file
    access = Access(allow_data_file=(str(data),))
    before = content(images[-1])
    with running_domain(tmp_path / "vm", uri, images) as vm, vm.disk() as disk:
        live.merge(disk, images[1], access=access)
    assert info(images[-1])["full-backing-filename"] == str(images[0])
    assert content(images[-1]) == before
    for image in images[::2]:
        qemu_img("bitmap", "--add", image, "checkpoint")
    upper = create(tmp_path / "upper.qcow2", backing=images[-1])
    qemu_img("bitmap", "--add", upper, "checkpoint")
    with running_domain(tmp_path / "vm", uri, [images[0], images[-1], upper]) as vm:
        with vm.disk() as disk, pytest.raises(LiveUnsuited, match="in another file"):
            live.merge(disk, images[-1], access=access)
        assert vm.jobs() == []


def test_a_probe_that_a_killed_process_has_left(tmp_path: Path, images: list[Path]) -> None:
    with running_vm(tmp_path / "vm", images) as vm:
        vm.execute(
            "blockdev-add", driver="file", node_name="chainmerge-probe", filename=str(images[1])
        )
        with vm.disk() as disk:
            assert live.plan(disk, images[2]).feasible
            assert "chainmerge-probe" not in disk.graph().nodes


def test_the_command(tmp_path: Path, images: list[Path]) -> None:
    with running_vm(tmp_path / "vm", images) as vm, immutable(images[1]):
        for verb in ("plan", "merge"):
            ran = command("live", verb, *vm.arguments, images[2])
            assert ran.status == ExitCode.REFUSED, ran
            assert f"cannot write to {images[1]}" in ran.out + ran.err
