# SPDX-License-Identifier: Apache-2.0
"""Merges in a running VM whose guest writes all the time: content and bitmaps to the bit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import live
from chainmerge.options import LiveOptions
from tests.conftest import SOAK
from tests.support.live_scenario import (
    COARSE,
    DISK,
    MIB,
    assert_closed_right,
    build,
    leftovers,
    merge_into_raw_base,
    stored_bits,
)
from tests.support.live_vm import DEVICE, Guest, one_drive, running_vm, separate_nodes
from tests.support.qemu import content, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SEEDS = range(50 if SOAK else 1)
KINDS = ("internal", "active")
LINES = {"nodes": separate_nodes, "drive": one_drive}


def merge_while_writing(
    directory: Path,
    seed: int,
    kind: str,
    levels: int,
    command_line: Callable[[Sequence[Path]], list[str]] = separate_nodes,
) -> None:
    scenario = build(directory / "chain", seed, levels=levels, active=kind == "active")
    with running_vm(directory / "vm", scenario.images, command_line) as vm:
        with Guest(vm, seed, DISK) as guest:
            with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
                plan = live.plan(disk, scenario.top, scenario.base)
                assert not plan.refusals
                # Slow enough for the guest to write in between.
                options = LiveOptions(delete=True, bandwidth=64 << 20)
                report = live.merge(disk, scenario.top, scenario.base, options=options)
            during = len(guest.journal)
            guest.wait_for(during + 10)
        assert during > 1
        assert vm.chain() == [scenario.result.name, "base.qcow2"][: 1 if kind == "active" else 2]
        assert vm.jobs() == []
        assert set(report.deleted) == {str(path) for path in scenario.merged}
        assert not any(path.exists() for path in scenario.merged)
        vm.quit()
    assert_closed_right(scenario, guest)
    assert leftovers(scenario) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_while_the_guest_writes(
    tmp_path: Path, kind: str, levels: int, seed: int
) -> None:
    merge_while_writing(tmp_path, seed, kind, levels)


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_whose_names_qemu_made_up(tmp_path: Path, kind: str) -> None:
    merge_while_writing(tmp_path, 7, kind, 2, one_drive)


def one_node(images: Sequence[Path]) -> list[str]:
    """Command line: a node for the active image; QEMU opens the others by its header."""
    file = {"driver": "file", "filename": str(images[-1]), "discard": "unmap"}
    node = {"driver": "qcow2", "node-name": "active", "file": file, "discard": "unmap"}
    device = f"virtio-blk-pci,id={DEVICE},drive=active,share-rw=on"
    return ["-blockdev", json.dumps(node), "-device", device]


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_are_open_only_for_the_one_above(tmp_path: Path, kind: str) -> None:
    merge_while_writing(tmp_path, 7, kind, 2, one_node)


@pytest.mark.parametrize("kind", KINDS)
def test_a_raw_base(tmp_path: Path, kind: str) -> None:
    merge_into_raw_base(tmp_path, is_active=kind == "active", command_line=one_drive)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_has_grown(tmp_path: Path, kind: str) -> None:
    small = DISK // 2
    base = create(tmp_path / "base.qcow2", small)
    for name in ("everywhere", "stale"):
        chainmerge.bitmaps_add(base, name, granularity=COARSE)
    qemu_io(base, "write -q -P 1 0 1M")
    top = create(tmp_path / "top.qcow2", DISK, backing=base)
    images = [base, top]
    if kind == "internal":
        images.append(create(tmp_path / "leaf.qcow2", backing=top))
    for image in images[1:]:
        chainmerge.bitmaps_add(image, "everywhere", granularity=COARSE)
    qemu_io(top, f"write -q -P 2 {small} 1M")
    before = content(images[-1])
    with running_vm(tmp_path / "vm", images) as vm:
        with Guest(vm, 1, DISK) as guest, live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
            live.merge(disk, top, options=LiveOptions(delete=True))
        vm.quit()
    assert content(images[-1] if kind == "internal" else base) == guest.applied_to(before)
    first = small // COARSE
    wanted = {*range(MIB // COARSE), *range(first, first + MIB // COARSE)}
    if kind == "active":
        wanted |= guest.dirty(COARSE)
    assert stored_bits(base) == {"everywhere": wanted}


def test_images_with_nothing_in_them(tmp_path: Path) -> None:
    """The job has often come to its end before it is told anything."""
    images = [create(tmp_path / "base.qcow2", DISK)]
    qemu_io(images[0], "write -q -P 1 0 1M")
    before = content(images[0])
    for number in range(8):
        images.append(create(tmp_path / f"{number}.qcow2", backing=images[-1].name))
    with running_vm(tmp_path / "vm", images) as vm:
        with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
            for top in images[1:]:
                live.merge(disk, top, images[0], options=LiveOptions(delete=True))
        assert vm.chain() == ["base.qcow2"]
        vm.quit()
    assert content(images[0]) == before
