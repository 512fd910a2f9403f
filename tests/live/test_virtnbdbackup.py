# SPDX-License-Identifier: Apache-2.0
"""Backups by virtnbdbackup before and after a merge: what is restored is what the guest had."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.options import LiveOptions, MergeOptions
from tests.support.domain_vm import TestDomain, defined_domain
from tests.support.qemu import content, create, qemu_io
from tests.support.virtnbdbackup import back_up, restore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
DISK = 16 * MIB


def write(vm: TestDomain, random_: random.Random) -> None:
    """Have the guest write, all over the disk."""
    with vm.exported() as guest:
        for _ in range(20):
            length = random_.randrange(1, 128) * 512
            offset = random_.randrange(0, (DISK - length) // 512) * 512
            guest.write(offset, bytes([random_.randrange(1, 256)]) * length)
        guest.flush()


def merge_live(vm: TestDomain, top: Path) -> None:
    with vm.disk() as disk:
        live.merge(disk, top, options=LiveOptions(delete=True))


def merge_cold(vm: TestDomain, top: Path) -> None:
    """With the name kept that the domain's configuration has."""
    vm.quit()
    chainmerge.merge(top, options=MergeOptions(delete=True, keep_name=True))
    vm.forget_backing_store()
    vm.domain.create()


@pytest.mark.parametrize("merge", [merge_cold, merge_live], ids=["cold", "live"])
def test_an_increment_after_a_merge(
    tmp_path: Path, uri: str, merge: Callable[[TestDomain, Path], None]
) -> None:
    random_ = random.Random(14)
    images, backup = tmp_path / "images", tmp_path / "backup"
    images.mkdir()
    base = create(images / "base.qcow2", DISK)
    qemu_io(base, "write -q -P 1 0 4M", "write -q -P 2 9M 3M")
    top = images / "top.qcow2"
    with defined_domain(tmp_path / "vm", uri, [base]) as vm:
        back_up(uri, vm.name, "full", backup)
        write(vm, random_)
        vm.snapshot(top)
        write(vm, random_)
        merge(vm, top)
        write(vm, random_)
        assert vm.checkpoints() == {"virtnbdbackup.0"}
        back_up(uri, vm.name, "inc", backup)
        assert vm.checkpoints() == {"virtnbdbackup.0", "virtnbdbackup.1"}
        (left,) = vm.chain()
        vm.quit()
    expected = content(images / left)
    (restored,) = restore(uri, backup, tmp_path / "restored")
    assert content(restored) == expected
    full = next(backup.glob("vda.full.data")).stat().st_size
    increment = next(backup.glob("vda.inc.*.data")).stat().st_size
    assert 0 < increment < full
