# SPDX-License-Identifier: Apache-2.0
"""All findings, in the order in which they matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chainmerge.inventory.findings.checkpoints import bitmap_troubles
from chainmerge.inventory.findings.damage import damaged_images, other_troubles
from chainmerge.inventory.findings.lengths import chains_to_merge
from chainmerge.inventory.findings.links import broken_links
from chainmerge.inventory.findings.room import storage_running_full
from chainmerge.inventory.findings.users import unfinished_merges, unused_images

if TYPE_CHECKING:
    from chainmerge.documents.scan import ScanFinding
    from chainmerge.inventory.findings.scene import Scene

_NO_OBSTACLES: Final = frozenset(
    {
        "base-created-later", "base-larger", "base-written-later", "broken-bitmap", "corrupt-bit",
        "dirty-bit", "format-not-declared", "leaked-clusters", "qcow-read-as-raw",
        "unusable-bitmap", "unusable-checkpoint",
    }
)  # fmt: skip
"""With these, a chain can be read all the same."""


def find_all(scene: Scene) -> tuple[ScanFinding, ...]:
    """What is wrong with what was found, the most severe first."""
    found = [*damaged_images(scene), *broken_links(scene), *bitmap_troubles(scene)]
    told = {finding.image for finding in found if finding.code not in _NO_OBSTACLES}
    found += other_troubles(scene, told)
    for family in (
        storage_running_full,
        unfinished_merges,
        chains_to_merge,
        unused_images,
    ):
        found += family(scene)
    return tuple(sorted(found, key=_order))


def _order(finding: ScanFinding) -> tuple[int, str, str]:
    return -finding.severity.rank, finding.code, finding.image
