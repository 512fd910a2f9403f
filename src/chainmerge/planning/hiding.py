# SPDX-License-Identifier: Apache-2.0
"""Whether an overlay has to hide what a raw base shows when its volume is larger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.engines.metadata.allocation import stored_free_space
from chainmerge.engines.metadata.preconditions import require_clean_bits, require_sound_report
from chainmerge.engines.native.hiding import tree_that_hides
from chainmerge.engines.native.survey import NewTree, place_tree
from chainmerge.errors import Refused
from chainmerge.options import Direction
from chainmerge.planning.facts import HidingFacts
from chainmerge.planning.space.errors import OldBytesBehindEnd
from chainmerge.qcow2.check import check
from chainmerge.storage.volume_facts import VolumeFacts, VolumeKind
from chainmerge.storage.volumes import open_volume

if TYPE_CHECKING:
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.qcow2.image import Qcow2Image


def may_need_hiding(target: Target) -> bool:
    """Whether base's volume may have to be extended under an overlay that sees that.

    A file that becomes longer reads as zeros there; so this is about volumes, and a file is
    only told from what is used as one (``--volume lvm``) by its facts.
    """
    base = target.base
    return base.header is None and base.virtual_size < target.overlay.virtual_size


def hiding_needed(
    target: Target, opened: OpenChain, direction: Direction, volume: VolumeFacts
) -> HidingFacts | None:
    """What the overlay directly above base has to hide; None for nothing. Reads tables only.

    Args:
        target: The merge.
        opened: Its images.
        direction: Which way it goes.
        volume: What base lies on.
    """
    size = target.chain.top.virtual_size
    if direction is Direction.PULL or volume.kind is not VolumeKind.LVM or size <= volume.size:
        return None
    if not may_need_hiding(target):
        return None
    overlay = target.overlay
    image = opened.images[target.base_index + 1].image
    assert image is not None
    lies_on = open_volume(overlay.real_path).facts()
    start = target.base.virtual_size
    reason = _unfit(image)
    if reason is not None:
        error = OldBytesBehindEnd(str(target.base.path), size, f"{overlay.path} {reason}")
        return HidingFacts(overlay, lies_on, start, 0, error)
    try:
        require_clean_bits(image)
        require_sound_report(check(image))
        tree = tree_that_hides(image, start)
        if not _changes_mapping(tree):
            return None
        end = place_tree(tree, stored_free_space(image)).allocation.end
    except Refused as error:
        return HidingFacts(overlay, lies_on, start, 0, error)
    return HidingFacts(overlay, lies_on, start, end * image.header.cluster_size, None)


def _unfit(image: Qcow2Image) -> str | None:
    """Why zeros cannot be written into the overlay."""
    if image.header.encrypted:
        return "could hide it, but is encrypted"
    if image.header.external_data_file:
        return "could hide it, but has an external data file"
    return None


def _changes_mapping(tree: NewTree) -> bool:
    return bool(tree.mapping.tables or tree.mapping.data)
