# SPDX-License-Identifier: Apache-2.0
"""A running VM's volumes are written to only if no other host can use them."""

from __future__ import annotations

import os
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.options import Access, LiveOptions
from chainmerge.storage.volume_errors import VolumeNotGranted, VolumeShared
from tests.support.fake_lvm import FakeLvm
from tests.support.live_vm import LiveTestVm, running_vm
from tests.support.loopdev import loop_device
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.progress import ProgressEvent

MIB = 1 << 20
EXTENT = 4 * MIB
DEVICES = Access(allow_backing=("/dev",))
pytestmark = pytest.mark.timeout(120)


@dataclass(frozen=True)
class Scene:
    """A VM with an overlay on a logical volume, and a command that locks such volumes."""

    vm: LiveTestVm
    base: Path
    top: Path
    lvm: FakeLvm
    log: Path
    program: Path

    def answer(self, status: int) -> None:
        log = shlex.quote(str(self.log))
        script = f'#!/bin/sh\necho "$@" >> {log}\nexit {status}\n'
        self.program.write_text(script, encoding="utf-8")
        self.program.chmod(0o755)

    @property
    def access(self) -> Access:
        return Access(allow_backing=("/dev",), lock_command=str(self.program))

    @property
    def asked(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    lvm = FakeLvm(tmp_path / "lvm")
    lvm.install(monkeypatch)
    physical = tmp_path / "physical-volume"
    physical.touch()
    lvm.add_group("vg", extents=40, devices=[physical], extent_size=EXTENT)
    with loop_device(tmp_path / "volume", 16 * EXTENT) as base:
        lvm.add_volume("vg", "base", base)
        lvm.show_in_sysfs(monkeypatch)
        create(base, 48 * MIB)
        top = create(tmp_path / "top.qcow2", backing=base)
        # More than QEMU has under way before it can be told to be slow.
        qemu_io(top, "write -q -P 7 0 40M")
        with running_vm(tmp_path / "vm", (base, top)) as vm:
            made = Scene(vm, base, top, lvm, tmp_path / "asked", tmp_path / "lock-volumes")
            made.answer(0)
            yield made
            vm.quit()


def test_a_shared_volume_is_refused(scene: Scene) -> None:
    scene.lvm.share_group("vg", lock_type="sanlock")
    scene.lvm.activate_as("base", "shared")
    with scene.vm.disk() as disk:
        plan = live.plan(disk, scene.top, access=DEVICES)
        assert [one.code for one in plan.refusals] == ["volume-shared"]
        with pytest.raises(VolumeShared):
            live.merge(disk, scene.top, access=DEVICES)
    assert scene.vm.chain() == [scene.top.name, scene.base.name]
    scene.lvm.activate_as("base", "exclusive")
    with scene.vm.disk() as disk:
        live.merge(disk, scene.top, access=DEVICES)
    assert scene.vm.chain() == [scene.base.name]


def test_the_sites_command_decides(scene: Scene) -> None:
    scene.lvm.share_group("vg", system_id="other")
    scene.answer(1)
    with scene.vm.disk() as disk:
        assert not live.plan(disk, scene.top, access=scene.access).refusals
        with pytest.raises(VolumeNotGranted):
            live.merge(disk, scene.top, access=scene.access)
        scene.answer(0)
        live.merge(disk, scene.top, access=scene.access)
    volume = "/dev/mapper/vg-base"
    assert scene.asked == [f"lock {volume}", f"lock {volume}", f"unlock {volume}"]
    assert scene.vm.chain() == [scene.base.name]


@pytest.mark.parametrize("again", ["resume", "merge"])
def test_a_killed_merge_is_carried_on_under_the_lock(scene: Scene, again: str) -> None:
    def die(event: ProgressEvent) -> None:
        if event.stage == "copy":
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            with scene.vm.disk() as disk:
                slow = LiveOptions(bandwidth=MIB)
                live.merge(disk, scene.top, None, scene.access, slow, on_progress=die)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    with scene.vm.disk() as disk:
        (unfinished,) = live.status(disk).merges
        words = shlex.split(unfinished.command)
        assert words[words.index("--lock-command") + 1] == str(scene.program)
        if again == "resume":
            # No file names a program that is run.
            live.resume(disk, lock_command=str(scene.program))
        else:
            live.merge(disk, scene.top, access=scene.access)
    assert [line.split()[0] for line in scene.asked] == ["lock", "lock", "unlock"]
    assert scene.vm.chain() == [scene.base.name]


def test_what_goes_on_in_the_vm_stays_locked_whatever_went_wrong(scene: Scene) -> None:
    def fail(event: ProgressEvent) -> None:
        if event.stage == "copy":
            raise RuntimeError

    with scene.vm.disk() as disk:
        with pytest.raises(RuntimeError):
            live.merge(
                disk, scene.top, None, scene.access, LiveOptions(bandwidth=MIB), on_progress=fail
            )
        assert scene.vm.jobs() == ["running"]
        assert [line.split()[0] for line in scene.asked] == ["lock"]
        live.resume(disk, lock_command=str(scene.program))
    assert [line.split()[0] for line in scene.asked] == ["lock", "lock", "unlock"]
