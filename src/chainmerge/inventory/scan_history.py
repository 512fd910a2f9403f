# SPDX-License-Identifier: Apache-2.0
"""The line that a scan leaves in this host's history, and what the lines before it tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chainmerge.documents.trends import Limited, TrendPoint
from chainmerge.records.history import Level, ScanLine, scans_of
from chainmerge.storage.storage_names import storage_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.documents.scan import ScanReport
    from chainmerge.inventory.findings.scene import Scene

_MOST_CHAINS: Final = 30
_MOST_STORAGES: Final = 20


def line_of_scan(report: ScanReport, scene: Scene, seconds: float) -> ScanLine:
    """What is kept of a scan.

    Args:
        report: what it has found.
        scene: what that was made from.
        seconds: how long it took.
    """
    return ScanLine(
        at=report.scanned_at,
        places=name_of_scope(report.scope),
        seconds=seconds,
        images=len(report.images),
        chains=len(report.chains),
        longest=max((chain.images or 0 for chain in report.chains), default=0),
        occupied_bytes=report.occupied_bytes,
        freed_bytes=report.freed_bytes,
        levels=(*_chains(scene), *_file_systems(scene), *_devices(scene)),
    )


def trend_of(scope: Sequence[str]) -> tuple[TrendPoint, ...]:
    """What scans of the same places have found, in the order of time."""
    return tuple(
        TrendPoint(line.at, line.longest, line.occupied_bytes, line.freed_bytes)
        for line in scans_of(name_of_scope(scope))
    )


def name_of_scope(scope: Sequence[str]) -> str:
    """By what scans of the same places are known."""
    return "\n".join(scope)


def _chains(scene: Scene) -> tuple[Level, ...]:
    """The longest chains, by their lowest images: with every snapshot they have another leaf."""
    longest: dict[str, Level] = {}
    for leaf in scene.graph.leaves:
        line = list(scene.graph.down_from(leaf))
        root = line[-1].path
        if len(line) > 1 and (root not in longest or longest[root].value < len(line)):
            longest[root] = Level(Limited.CHAIN, root, len(line), 0, leaf.path)
    most_first = sorted(longest.values(), key=lambda level: -level.value)
    return tuple(most_first[:_MOST_CHAINS])


def _file_systems(scene: Scene) -> tuple[Level, ...]:
    found: dict[str, Level] = {}
    seen: set[int] = set()
    for image in scene.graph.images.values():
        device = image.stamp.device
        if image.stamp.is_device or device in seen or device not in scene.rooms:
            continue
        seen.add(device)
        name, room = storage_name(image.path), scene.rooms[device]
        if name is not None:
            found[name] = Level(
                Limited.FILE_SYSTEM, name, room.size - room.free, room.size, image.path
            )
    return tuple(found.values())[:_MOST_STORAGES]


def _devices(scene: Scene) -> tuple[Level, ...]:
    return tuple(_devices_in(scene))[:_MOST_STORAGES]


def _devices_in(scene: Scene) -> Iterator[Level]:
    for leaf in scene.graph.leaves:
        if leaf.stamp.is_device and leaf.content.end is not None:
            size = leaf.stamp.size
            yield Level(Limited.DEVICE, leaf.path, min(leaf.content.end, size), size, leaf.path)
