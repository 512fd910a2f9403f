# SPDX-License-Identifier: Apache-2.0
"""File systems and volumes that will run full."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from chainmerge.documents.scan import ScanFinding, Severity
from chainmerge.inventory.scanning import largest_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.inventory.findings.scene import Scene
    from chainmerge.inventory.found import FoundImage
    from chainmerge.options import ScanOptions


def storage_running_full(scene: Scene) -> Iterator[ScanFinding]:
    """Findings about what images that guests write to may grow into."""
    by_device: dict[int, list[FoundImage]] = defaultdict(list)
    for leaf in scene.graph.leaves:
        if leaf.content.problem is not None:
            continue
        if leaf.stamp.is_device:
            yield from _volume(scene, leaf)
        else:
            by_device[leaf.stamp.device].append(leaf)
    for device, leaves in by_device.items():
        yield from _file_system(scene, device, leaves)


def _file_system(scene: Scene, device: int, leaves: list[FoundImage]) -> Iterator[ScanFinding]:
    room = scene.rooms.get(device)
    if room is None:
        return
    growth = {leaf.path: _growth(leaf) for leaf in leaves}
    may_grow = sum(growth.values())
    severity = _severity(room.free, room.size, may_grow, scene.options)
    if severity is None:
        return
    most = max(leaves, key=_growth)
    yield ScanFinding(
        code="file-system-filling",
        severity=severity,
        image=most.path,
        sentence=(
            f"the file system of {most.path} has little free, and images on it may grow beyond "
            "that: their guests stop when it is full"
        ),
        evidence={"free_bytes": room.free, "size_bytes": room.size, "may_grow_bytes": may_grow},
        command=scene.plan_command(most),
    )


def _volume(scene: Scene, leaf: FoundImage) -> Iterator[ScanFinding]:
    end, size = leaf.content.end, leaf.stamp.size
    if end is None:
        return
    free, may_grow = max(0, size - end), max(0, largest_size(leaf.content) - end)
    severity = _severity(free, size, may_grow, scene.options)
    if severity is None:
        return
    yield ScanFinding(
        code="device-filling",
        severity=severity,
        image=leaf.path,
        sentence=(
            f"{leaf.path} has little room left behind the image's end, which may grow beyond "
            "that: the guest stops when it is full"
        ),
        evidence={"free_bytes": free, "size_bytes": size, "may_grow_bytes": may_grow},
        command=scene.plan_command(leaf),
    )


def _growth(leaf: FoundImage) -> int:
    return max(0, largest_size(leaf.content) - leaf.stamp.occupied)


def _severity(free: int, size: int, may_grow: int, options: ScanOptions) -> Severity | None:
    if may_grow <= free:
        return None
    if free * 100 < size * options.free_critical:
        return Severity.CRITICAL
    return Severity.WARNING if free * 100 < size * options.free_warning else None
