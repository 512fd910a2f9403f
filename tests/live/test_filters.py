# SPDX-License-Identifier: Apache-2.0
"""Disks with filters in their block graph, as managers of VMs build them: merged, and kept."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from chainmerge import live
from chainmerge.chain.discovery import discover
from chainmerge.chain.model import ChainPolicy
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.live.errors import LiveUnsuited, LiveVerificationFailed, VmRefused
from chainmerge.options import LiveOptions
from tests.conftest import SOAK
from tests.support.live_scenario import (
    DISK,
    assert_closed_right,
    build,
    leftovers,
    merge_into_raw_base,
)
from tests.support.live_vm import DEVICE, Guest, running_vm
from tests.support.pull_scenario import assert_pulled_right, build_pull
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.support.live_vm import LiveTestVm

pytestmark = pytest.mark.timeout(120)

SEEDS = range(20 if SOAK else 1)
KINDS = ("internal", "active")
THROTTLE = {"driver": "throttle", "throttle-group": "limits"}
COPY_ON_READ = {"driver": "copy-on-read"}
PREALLOCATE = {"driver": "preallocate"}


def filtered(
    over_the_disk: Sequence[dict[str, str]] = (),
    over_each_image: Sequence[dict[str, str]] = (),
    under_each_image: Sequence[dict[str, str]] = (),
) -> Callable[[Sequence[Path]], list[str]]:
    """Command line: a node for each image and file, with filters where they are wanted."""

    def command_line(images: Sequence[Path]) -> list[str]:
        options = ["-object", "throttle-group,id=limits"]

        def add(node: dict[str, Any], name: str) -> str:
            options.extend(("-blockdev", json.dumps({**node, "node-name": name})))
            return name

        def stack(filters: Sequence[dict[str, str]], upon: str, *, read_only: bool) -> str:
            for number, one in enumerate(filters):
                changing = {} if one["driver"] == "preallocate" else {"read-only": read_only}
                node = {**one, **changing, "file": upon}
                upon = add(node, f"{upon}-{one['driver']}{number}"[-31:])
            return upon

        below: str | None = None
        for index, image in enumerate(images):
            is_active = image == images[-1]
            protocol = {"driver": "file", "filename": str(image), "auto-read-only": True}
            file = stack(under_each_image, add(protocol, f"f{index}"), read_only=False)
            node = {"driver": "qcow2", "file": file, "backing": below, "read-only": not is_active}
            below = add(node, f"i{index}")
            if not is_active:
                below = stack(over_each_image, below, read_only=True)
        assert below is not None
        disk = stack(over_the_disk, below, read_only=False)
        return [*options, "-device", f"virtio-blk-pci,id={DEVICE},drive={disk},share-rw=on"]

    return command_line


def drivers(vm: LiveTestVm) -> list[str]:
    """The drivers of the nodes that lead from the disk to its active image, that included."""
    (disk,) = vm.execute("query-block")
    return drivers_from(vm, disk["inserted"]["node-name"])


def drivers_below(vm: LiveTestVm, image: str) -> list[str]:
    """The drivers of the nodes that lead from an image's node to its backing file, included."""
    graph = vm.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    (below,) = [
        names[edge["child"]]
        for edge in graph["edges"]
        if edge["name"] == "backing" and names[edge["parent"]] == image
    ]
    return drivers_from(vm, below)


def drivers_from(vm: LiveTestVm, name: str | None) -> list[str]:
    """The drivers of a node and those below it, as far as an image."""
    graph = vm.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    below = {
        names[edge["parent"]]: names[edge["child"]]
        for edge in graph["edges"]
        if edge["name"] in {"file", "backing", "root"}
    }
    nodes = {one["node-name"]: one for one in vm.execute("query-named-block-nodes", flat=True)}
    found: list[str] = []
    while name in nodes:
        found.append(nodes[name]["drv"])
        if found[-1] == "qcow2":
            break
        name = below.get(name)
    return found


CASES = {
    "throttle": filtered([THROTTLE]),
    "copy-on-read": filtered([COPY_ON_READ]),
    "two": filtered([COPY_ON_READ, THROTTLE]),
    # Copy-on-read is the lowest: over another filter QEMU itself marks what it copies as dirty.
    "three": filtered([COPY_ON_READ, THROTTLE, THROTTLE]),
    "inside": filtered((), [THROTTLE]),
    "everywhere": filtered([COPY_ON_READ], [THROTTLE, THROTTLE]),
    "below": filtered((), (), [THROTTLE]),
    "preallocate": filtered((), (), [PREALLOCATE]),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_the_guest_keeps_its_filters(tmp_path: Path, case: str, kind: str, seed: int) -> None:
    scenario = build(tmp_path / "chain", seed, levels=2, active=kind == "active")
    with running_vm(tmp_path / "vm", scenario.images, CASES[case]) as vm:
        before = drivers(vm)
        with Guest(vm, seed, DISK) as guest:
            with live.QmpVm(str(vm.qmp), device=DEVICE) as disk:
                plan = live.plan(disk, scenario.top, scenario.base)
                assert not plan.refusals
                options = LiveOptions(delete=True, bandwidth=64 << 20)
                report = live.merge(disk, scenario.top, scenario.base, options=options)
            during = len(guest.journal)
            guest.wait_for(during + 10)
        assert drivers(vm) == before or case == "inside"
        assert vm.jobs() == []
        assert set(report.deleted) == {str(path) for path in scenario.merged}
        vm.quit()
    assert_closed_right(scenario, guest)
    assert leftovers(scenario) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["middle", "active"])
@pytest.mark.parametrize("case", CASES)
def test_a_pull_leaves_all_filters_that_it_can(
    tmp_path: Path, case: str, kind: str, seed: int
) -> None:
    scenario = build_pull(tmp_path / "chain", seed, levels=2, active=kind == "active")
    # The root is the image 0, and base is on it.
    top = f"i{scenario.images.index(scenario.top)}"
    with running_vm(tmp_path / "vm", scenario.images, CASES[case]) as vm:
        over_disk, over_root = drivers(vm), drivers_below(vm, "i1")
        with Guest(vm, seed, DISK) as guest:
            with vm.disk() as disk:
                options = LiveOptions(delete=True, direction="pull", bandwidth=64 << 20)
                report = live.merge(disk, scenario.top, scenario.base, options=options)
            during = len(guest.journal)
            guest.wait_for(during + 10)
        assert drivers(vm) == over_disk
        assert drivers_below(vm, top) == over_root
        assert vm.jobs() == []
        assert set(report.deleted) == {str(path) for path in scenario.pulled}
        vm.quit()
    assert_pulled_right(scenario, guest, deleted=True)


class StubbornVm(live.QmpVm):
    """A VM whose QEMU does not write the header of the image above."""

    def name_backing_file(self, root: str, image: str, name: str) -> None:
        raise VmRefused(self.name, "change-backing-file", f"{image} is busy")


def test_nothing_is_deleted_that_a_header_names(tmp_path: Path) -> None:
    scenario = build(tmp_path / "chain", 1, levels=2, active=False)
    with running_vm(tmp_path / "vm", scenario.images, CASES["inside"]) as vm:
        with (
            Guest(vm, 1, DISK) as guest,
            StubbornVm(str(vm.qmp), device=DEVICE) as disk,
            pytest.raises(LiveVerificationFailed, match=r"the header of .* does not name it"),
        ):
            live.merge(disk, scenario.top, scenario.base, options=LiveOptions(delete=True))
        assert all(image.exists() for image in scenario.images)
        # The next run has it written.
        with vm.disk() as disk:
            report = live.resume(disk)
        assert set(report.deleted) == {str(path) for path in scenario.merged}
        vm.quit()
    assert_closed_right(scenario, guest)


def test_a_filter_that_keeps_the_header_from_being_right(tmp_path: Path) -> None:
    """QEMU would declare the raw base as qcow2 there."""
    base = create(tmp_path / "base.raw", DISK, fmt="raw")
    top = create(tmp_path / "top.qcow2", backing=base, backing_format="raw")
    leaf = create(tmp_path / "leaf.qcow2", backing=top)
    qemu_io(top, "write -q -P 2 4M 8M")

    def command_line(images: Sequence[Path]) -> list[str]:
        options = CASES["inside"](images)
        (at,) = [number for number, one in enumerate(options) if '"i0"' in one and "qcow2" in one]
        options[at] = options[at].replace('"qcow2"', '"raw"').replace('"backing": null, ', "")
        return options

    with running_vm(tmp_path / "vm", [base, top, leaf], command_line) as vm:
        with vm.disk() as disk, pytest.raises(LiveUnsuited, match=r"declare the format .* wrongly"):
            live.merge(disk, top)
        vm.quit()


@pytest.mark.parametrize("kind", KINDS)
def test_by_the_node_under_a_filter(tmp_path: Path, kind: str) -> None:
    scenario = build(tmp_path / "chain", 1, levels=1, active=kind == "active")
    with running_vm(tmp_path / "vm", scenario.images, CASES["two"]) as vm:
        node = f"i{len(scenario.images) - 1}"
        with Guest(vm, 1, DISK) as guest, live.QmpVm(str(vm.qmp), node=node) as disk:
            live.merge(disk, scenario.top, scenario.base, options=LiveOptions(delete=True))
        vm.quit()
    assert_closed_right(scenario, guest)


def copied_before_write(images: Sequence[Path]) -> list[str]:
    """Command line: a backup reads the disk by a filter that copies what is overwritten."""
    target = create(images[0].parent / "fleecing.qcow2", DISK)
    options = filtered()(images)
    copy = {"driver": "file", "filename": str(target)}
    fleecing = {"driver": "qcow2", "node-name": "fleecing", "file": copy}
    over = {
        "driver": "copy-before-write",
        "node-name": "cbw",
        "file": f"i{len(images) - 1}",
        "target": "fleecing",
    }
    device = options.index("-device")
    return [
        *options[:device],
        *("-blockdev", json.dumps(fleecing), "-blockdev", json.dumps(over)),
        *("-device", f"virtio-blk-pci,id={DEVICE},drive=cbw,share-rw=on"),
    ]


def test_a_backup_that_copies_before_writes_goes_first(tmp_path: Path) -> None:
    """QEMU ends with a failed assertion when it closes an image that is watched like this."""
    scenario = build(tmp_path / "chain", 1, levels=1, active=True)
    with running_vm(tmp_path / "vm", scenario.images, copied_before_write) as vm:
        with vm.disk() as disk:
            with pytest.raises(LiveUnsuited, match=r"the filter cbw .* backup has ended"):
                live.merge(disk, scenario.top, scenario.base)
            (refusal, *_) = live.plan(disk, scenario.top, scenario.base).refusals
            assert refusal.code == LiveUnsuited.code
        assert vm.alive
        vm.quit()
    assert leftovers(scenario) == []


def test_below_such_a_filter_images_are_merged(tmp_path: Path) -> None:
    scenario = build(tmp_path / "chain", 1, levels=1, active=False)
    with running_vm(tmp_path / "vm", scenario.images, copied_before_write) as vm:
        with Guest(vm, 1, DISK) as guest, vm.disk() as disk:
            live.merge(disk, scenario.top, scenario.base, options=LiveOptions(delete=True))
        assert drivers(vm) == ["copy-before-write", "qcow2"]
        vm.quit()
    assert_closed_right(scenario, guest)


def raw_base_without_a_format_node(images: Sequence[Path]) -> list[str]:
    """Command line: the lowest image is a protocol node."""
    base, *upper = images
    file = {"driver": "file", "node-name": "i0", "filename": str(base), "auto-read-only": True}
    options = ["-blockdev", json.dumps({**file, "read-only": True})]
    for index, image in enumerate(upper, 1):
        node = {
            "driver": "qcow2",
            "node-name": f"i{index}",
            "read-only": image != images[-1],
            "file": {"driver": "file", "filename": str(image), "auto-read-only": True},
            "backing": f"i{index - 1}",
        }
        options += ["-blockdev", json.dumps(node)]
    device = f"virtio-blk-pci,id={DEVICE},drive=i{len(upper)},share-rw=on"
    return [*options, "-device", device]


def chain_on_disk(leaf: Path) -> list[str]:
    """The files of a chain on disk, leaf first, and as what each is read."""
    chain = discover(leaf, ChainPolicy())
    return [f"{image.path.name}: {image.format}" for image in reversed(chain.images)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_raw_base_without_a_format_node(tmp_path: Path, kind: str) -> None:
    is_active = kind == "active"
    images = merge_into_raw_base(tmp_path, is_active, raw_base_without_a_format_node)
    if kind == "internal":
        # QEMU before 9.0 declares the protocol; the next command reads it as what it is.
        chain = chain_on_disk(images[-1])
        assert chain == ["leaf.qcow2: qcow2", "base.raw: raw"]


def test_the_guest_is_slowed_down_beside_a_throttle_group(tmp_path: Path) -> None:
    """The manager's limits stay what they are; ours are on the device, and go again."""
    scenario = build(tmp_path / "chain", 5, levels=1, active=True)
    options = LiveOptions(delete=True, bandwidth=8 << 20, deadline=0.5, on_stall="throttle")
    group = {"path": "/objects/limits", "property": "limits"}
    with running_vm(tmp_path / "vm", scenario.images, CASES["throttle"]) as vm:
        vm.execute("qom-set", **group, value={"bps-write": 700 << 20})
        theirs = vm.execute("qom-get", **group)
        seen: list[int] = []
        # Limits are for the guest's device. This one comes in by another way, and keeps to them
        # of its own accord.
        guest = Guest(vm, 5, DISK)

        def look(event: ProgressEvent) -> None:
            if event.stage is Stage.COPY:
                (disk,) = vm.execute("query-block")
                seen.append(disk["inserted"]["bps_wr"])
                guest.interval = 0.2 if seen[-1] else 0.002

        with guest, vm.disk() as disk:
            live.merge(disk, scenario.top, options=options, on_progress=look)
            assert disk.disk_limits().limits["bps_wr"] == 0
        assert max(seen) > 0
        assert vm.execute("qom-get", **group) == theirs
        assert drivers(vm) == ["throttle", "qcow2"]
        vm.quit()
    assert_closed_right(scenario, guest)
