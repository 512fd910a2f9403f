# SPDX-License-Identifier: Apache-2.0
"""Chains that should be merged: long ones, old ones, and those that hide data."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from chainmerge.documents.scan import ScanFinding, Severity
from chainmerge.inventory.findings.scene import NANOSECONDS_OF_A_DAY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.inventory.findings.scene import Scene
    from chainmerge.inventory.found import FoundImage
    from chainmerge.options import ScanOptions

NOT_STARTED_BY_OLD_LIBVIRT: Final = 25
"""Images of a chain with which libvirt before 12.0 does not start a domain."""
MOST_FOR_LIBVIRT: Final = 200
"""Images of a chain, of which libvirt takes no more (VIR_STORAGE_MAX_CHAIN_DEPTH)."""


def chains_to_merge(scene: Scene) -> Iterator[ScanFinding]:
    """Findings about chains as a whole."""
    old: set[tuple[int, int]] = set()
    for leaf in scene.graph.leaves:
        line = list(scene.graph.down_from(leaf))
        yield from _long(scene, leaf, len(line))
        yield from _old(scene, leaf, line, old)
        yield from _hidden(scene, leaf)


def _long(scene: Scene, leaf: FoundImage, images: int) -> Iterator[ScanFinding]:
    severity = _severity_of_length(images, scene.options)
    if severity is None:
        return
    yield ScanFinding(
        code="long-chain",
        severity=severity,
        image=leaf.path,
        sentence=f"{leaf.path} stands on a chain of {images} images{_consequence(images)}",
        evidence={"images": images},
        command=scene.plan_command(leaf),
    )


def _severity_of_length(images: int, options: ScanOptions) -> Severity | None:
    if images >= min(options.length_critical, options.length_limit):
        return Severity.CRITICAL
    if images >= options.length_warning:
        return Severity.WARNING
    return Severity.INFO if images >= options.length_info else None


def _consequence(images: int) -> str:
    if images >= MOST_FOR_LIBVIRT:
        return f": libvirt takes no more than {MOST_FOR_LIBVIRT}"
    if images >= NOT_STARTED_BY_OLD_LIBVIRT:
        return ": libvirt before 12.0 does not start a VM with it"
    return ""


def _old(
    scene: Scene, leaf: FoundImage, line: list[FoundImage], told: set[tuple[int, int]]
) -> Iterator[ScanFinding]:
    """The oldest overlay of a chain, which is as old as its base has not been written.

    A base with several overlays is there to stay, with all that is below it.
    """
    oldest: tuple[int, FoundImage] | None = None
    for overlay, base in itertools.pairwise(line):
        if len(scene.graph.children_of(base)) > 1:
            break
        if base.stamp.is_device:
            continue
        age = scene.now_ns - base.stamp.written_ns
        if oldest is None or age > oldest[0]:
            oldest = age, overlay
    if oldest is None or oldest[1].identity in told:
        return
    days = oldest[0] // NANOSECONDS_OF_A_DAY
    if days < scene.options.old_days:
        return
    overlay = oldest[1]
    told.add(overlay.identity)
    yield ScanFinding(
        code="old-overlay",
        severity=Severity.INFO,
        image=overlay.path,
        sentence=f"{overlay.path} has been there for {days} days: its base was written last then",
        evidence={"days": days},
        command=scene.plan_command(leaf),
    )


def _hidden(scene: Scene, leaf: FoundImage) -> Iterator[ScanFinding]:
    facts = scene.chains.get(leaf.identity)
    if facts is None or (facts.freed_bytes or 0) < scene.options.hidden:
        return
    hidden, copied = facts.freed_bytes or 0, facts.bytes_to_copy or 0
    yield ScanFinding(
        code="hidden-bytes",
        severity=Severity.INFO,
        image=leaf.path,
        sentence=(
            f"merging the images below {leaf.path} gives volumes back to their volume group"
            if facts.gives_volumes_back
            else f"images below {leaf.path} hold data that images above hide: merging them gives "
            "that back"
        ),
        evidence={"hidden_bytes": hidden, "bytes_to_copy": copied},
        command=scene.plan_command(leaf),
    )
