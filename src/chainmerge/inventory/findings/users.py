# SPDX-License-Identifier: Apache-2.0
"""Merges that were not finished, and images that nobody uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.documents.scan import ScanFinding, Severity
from chainmerge.inventory.findings.scene import NANOSECONDS_OF_A_DAY
from chainmerge.records.request import shell_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.inventory.findings.scene import Scene


def unfinished_merges(scene: Scene) -> Iterator[ScanFinding]:
    """Findings about what earlier runs have left."""
    for merge in scene.usage.merges:
        runs = merge.process is not None and merge.process.running
        how = "is running" if runs else "was interrupted"
        yield ScanFinding(
            code="interrupted-merge",
            severity=Severity.INFO if runs else Severity.WARNING,
            image=merge.base,
            sentence=(
                f"a merge of {merge.top or 'an overlay'} into {merge.base} {how}: {merge.progress}"
            ),
            evidence={},
            command=shell_line(["chainmerge", "status", merge.base]),
        )


def unused_images(scene: Scene) -> Iterator[ScanFinding]:
    """Findings about images that no domain has, no process and no other image."""
    if scene.usage.domains is None:
        return
    for leaf in scene.graph.leaves:
        if leaf.identity in scene.usage.of_domains or not scene.is_idle(leaf):
            continue
        evidence = {"occupied_bytes": leaf.stamp.occupied}
        if not leaf.stamp.is_device:
            evidence["days"] = (scene.now_ns - leaf.stamp.written_ns) // NANOSECONDS_OF_A_DAY
        yield ScanFinding(
            code="unused-image",
            severity=Severity.INFO,
            image=leaf.path,
            sentence=(
                f"{leaf.path} is used by nobody: it is not a disk of a domain, no process has it "
                "open, and no image stands on it"
            ),
            evidence=evidence,
            command=scene.command_for(leaf, "info"),
        )
