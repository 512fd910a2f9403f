# SPDX-License-Identifier: Apache-2.0
"""A full backup, a live merge in between, an incremental backup: what is restored is right."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from chainmerge import live
from chainmerge.options import LiveOptions
from tests.conftest import SOAK
from tests.support.live_vm import DEVICE, Guest, LiveTestVm, running_vm
from tests.support.qemu import content, create, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
DISK = 32 * MIB
CHECKPOINT = "checkpoint"
pytestmark = pytest.mark.timeout(120)


def node_of(vm: LiveTestVm) -> str:
    (disk,) = vm.execute("query-block")
    return str(disk["inserted"]["node-name"])


def add_image(vm: LiveTestVm, path: Path, node: str) -> None:
    """Open an image in the VM without what its header says is below it."""
    protocol = {"driver": "file", "node_name": f"{node}-file", "filename": str(path)}
    vm.execute("blockdev-add", **protocol)
    vm.execute("blockdev-add", driver="qcow2", node_name=node, file=f"{node}-file", backing=None)


def transaction(vm: LiveTestVm, *actions: tuple[str, dict[str, object]]) -> None:
    vm.execute("transaction", actions=[{"type": kind, "data": data} for kind, data in actions])


def back_up(
    vm: LiveTestVm, target: Path, *actions: tuple[str, dict[str, object]], **how: str
) -> None:
    """One backup of the disk into a new image, begun together with *actions*."""
    create(target, DISK)
    add_image(vm, target, target.stem)
    job = {
        "job-id": "backup",
        "device": node_of(vm),
        "target": target.stem,
        "auto-dismiss": False,
        **how,
    }
    transaction(vm, *actions, ("blockdev-backup", job))
    while vm.jobs() != ["concluded"]:
        vm.monitor.wait_for_event(0.2)
    (done,) = vm.execute("query-jobs")
    assert "error" not in done
    vm.execute("job-dismiss", id="backup")
    vm.execute("blockdev-del", node_name=target.stem)
    vm.execute("blockdev-del", node_name=f"{target.stem}-file")


def snapshot(vm: LiveTestVm, path: Path, backing: Path, node: str) -> None:
    """A new active image that carries the checkpoint on, as libvirt makes one."""
    create(path, backing=backing)
    below = node_of(vm)
    add_image(vm, path, node)
    transaction(
        vm,
        ("blockdev-snapshot", {"node": below, "overlay": node}),
        (
            "block-dirty-bitmap-add",
            {"node": node, "name": CHECKPOINT, "persistent": True, "granularity": 65536},
        ),
    )


def write(vm: LiveTestVm, random_: random.Random, disk: bytearray) -> None:
    with vm.client() as client:
        for _ in range(20):
            length = random_.randrange(1, 400) * 512
            offset = random_.randrange(0, (DISK - length) // 512) * 512
            data = bytes([random_.randrange(256)]) * length
            client.write(offset, data)
            disk[offset : offset + length] = data


@pytest.mark.parametrize("seed", range(50 if SOAK else 1))
@pytest.mark.parametrize("kind", ["internal", "active"])
def test_an_incremental_backup_across_a_merge(tmp_path: Path, kind: str, seed: int) -> None:
    random_ = random.Random(seed)
    base = create(tmp_path / "base.qcow2", DISK)
    qemu_io(base, "write -q -P 1 0 8M")
    disk = bytearray(content(base))
    with running_vm(tmp_path / "vm", [base]) as vm:
        node = {"node": node_of(vm), "name": CHECKPOINT, "persistent": True}
        full = tmp_path / "full.qcow2"
        back_up(vm, full, ("block-dirty-bitmap-add", node), sync="full")
        write(vm, random_, disk)
        images = [base]
        for number in range(1 if kind == "active" else 2):
            images.append(tmp_path / f"snapshot{number}.qcow2")
            snapshot(vm, images[-1], images[-2], f"snapshot{number}")
            write(vm, random_, disk)
        with Guest(vm, seed, DISK) as guest, live.QmpVm(str(vm.qmp), device=DEVICE) as reached:
            live.merge(reached, images[1], options=LiveOptions(delete=True))
        disk = bytearray(guest.applied_to(bytes(disk)))
        write(vm, random_, disk)
        # A consumer unites what stands in the chain, and backs that up.
        active = node_of(vm)
        sources = [active] if kind == "active" else [active, "image0"]
        union = {"node": active, "name": "union", "granularity": 65536, "disabled": True}
        merged = [{"node": one, "name": CHECKPOINT} for one in sources]
        transaction(
            vm,
            ("block-dirty-bitmap-add", union),
            (
                "block-dirty-bitmap-merge",
                {"node": active, "target": "union", "bitmaps": merged},
            ),
        )
        increment = tmp_path / "increment.qcow2"
        back_up(vm, increment, sync="bitmap", bitmap="union", **{"bitmap-mode": "never"})
        vm.quit()
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", full, increment)
    assert content(increment) == bytes(disk)
    assert content(images[-1] if kind == "internal" else base) == bytes(disk)
