# SPDX-License-Identifier: Apache-2.0
"""Images that were replaced under their names while a VM has them open."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from chainmerge import live
from chainmerge.live.errors import LiveImageExchanged
from chainmerge.options import LiveOptions
from chainmerge.storage.errors import ImageInUse
from tests.support.cli import chainmerge
from tests.support.domain_vm import TARGET, running_domain
from tests.support.live_vm import DEVICE, one_drive, running_vm, separate_nodes
from tests.support.loopdev import loop_device
from tests.support.qemu import content, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(180)

NAMES = ("root", "base", "top", "leaf")
WAYS = ("qmp", "drive", "libvirt")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """A chain of four, each with some data of its own."""
    found: list[Path] = []
    for number, name in enumerate(NAMES):
        image = tmp_path / f"{name}.qcow2"
        create(image, None if found else 16 << 20, backing=found[-1] if found else None)
        qemu_io(image, f"write -P {number + 1} {number}M 2M")
        found.append(image)
    return found


@contextmanager
def disk(way: str, tmp_path: Path, images: list[Path], uri: str) -> Iterator[Any]:
    with ExitStack() as stack:
        if way == "libvirt":
            domain = stack.enter_context(running_domain(tmp_path / "vm", uri, images))
            yield stack.enter_context(live.DomainDisk(domain.name, TARGET, uri))
            return
        options = one_drive if way == "drive" else separate_nodes
        vm = stack.enter_context(running_vm(tmp_path / "vm", images, options))
        yield stack.enter_context(live.QmpVm(str(vm.qmp), device=DEVICE))


def exchange(image: Path, kind: str) -> None:
    """Put another file in the place of *image*."""
    other = image.with_name("other")
    if kind == "copy":
        shutil.copy2(image, other)
    else:
        backing = next((part for part in _backing_of(image)), None)
        options = ["-B", backing, "-F", "qcow2"] if backing else []
        qemu_img("convert", "-U", "-O", "qcow2", "-o", "cluster_size=128k", *options, image, other)
    other.rename(image)


def _backing_of(image: Path) -> Iterator[str]:
    for line in qemu_img("info", "-U", image).splitlines():
        if line.startswith("backing file: "):
            yield line.split()[2]


@pytest.mark.parametrize(
    ("way", "kind"), [*((way, "copy") for way in WAYS), ("qmp", "other layout")]
)
@pytest.mark.parametrize("victim", NAMES)
def test_refused_with_nothing_changed(
    tmp_path: Path, images: list[Path], uri: str, way: str, kind: str, victim: str
) -> None:
    victims = dict(zip(NAMES, images, strict=True))
    with disk(way, tmp_path, images, uri) as vm:
        exchange(victims[victim], kind)
        before = [image.read_bytes() for image in images]
        for base, top in ((images[1], images[2]), (images[2], images[3])):
            for ask in (live.plan, live.merge):
                with pytest.raises(LiveImageExchanged) as caught:
                    ask(vm, top, base, options=LiveOptions(delete=True))
                assert caught.value.image == str(victims[victim])
        assert [image.read_bytes() for image in images] == before


@pytest.mark.parametrize("way", WAYS)
def test_a_new_name_is_no_new_file(tmp_path: Path, images: list[Path], uri: str, way: str) -> None:
    """Moved away and back, or given another name besides: it is the file that the VM has open."""
    with disk(way, tmp_path, images, uri) as vm:
        for image in images:
            moved = image.rename(image.with_suffix(".moved"))
            image.hardlink_to(moved)
            moved.unlink()
        expected = content(images[3])
        plan = live.plan(vm, images[2], images[1], options=LiveOptions(delete=True))
        assert plan.feasible
        assert not [warning for warning in plan.warnings if "cannot be looked at" in warning]
        live.merge(vm, images[2], images[1], options=LiveOptions(delete=True))
        assert content(images[3]) == expected


def test_a_file_that_was_removed(tmp_path: Path, images: list[Path], uri: str) -> None:
    with disk("qmp", tmp_path, images, uri) as vm:
        images[2].unlink()
        with pytest.raises(LiveImageExchanged, match="removed") as caught:
            live.plan(vm, images[3], images[1])
        assert "keep the VM running" in caught.value.advice


@pytest.mark.parametrize("way", WAYS)
def test_a_user_beside_the_vm(tmp_path: Path, images: list[Path], uri: str, way: str) -> None:
    with disk(way, tmp_path, images, uri) as vm, loop_device(images[1], 3 << 20) as device:
        program = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
        with device.open("r+b") as held:
            shell = ["sh", "-c", 'exec 3<&0; "$@" <&3 & echo $!', "sh", *program]
            other = subprocess.Popen(
                shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[held.fileno()]
            )
        try:
            assert other.stdout is not None
            other.stdout.readline(), other.stdout.readline()
            other.wait()
            plan = live.plan(vm, images[2], images[1])
            assert [refusal.code for refusal in plan.refusals] == ["image-in-use"]
            assert str(device) in plan.refusals[0].sentence
            with pytest.raises(ImageInUse):
                live.merge(vm, images[2], images[1])
        finally:
            other.communicate()


def test_on_the_command_line(tmp_path: Path, images: list[Path]) -> None:
    with running_vm(tmp_path / "vm", images) as vm:
        exchange(images[2], "copy")
        for command in ("plan", "merge"):
            ran = chainmerge("live", command, images[2], *vm.arguments)
            assert ran.status == 3
            assert "is not the file that" in ran.err
