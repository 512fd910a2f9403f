# SPDX-License-Identifier: Apache-2.0
"""Before a raw base's volume is extended: what that would show to the guest is hidden.

A logical volume gets extents that others have used. They show through the overlay directly above
base at once, wherever that says nothing, as its disk goes on behind base's. To write zeros there
once the volume is larger is too late: the process can be killed in between, and whoever starts
the VM then does not know. So the overlay gets zeros of its own, by one switch, while base still
ends where it does.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chainmerge.chain import open_for_writing
from chainmerge.engines.metadata.allocation import stored_free_space
from chainmerge.engines.metadata.preconditions import require_clean_bits, require_sound_report
from chainmerge.engines.native import (
    Commit,
    NewTree,
    ZerosBehind,
    commit,
    place_tree,
    tree_that_hides,
)
from chainmerge.errors import Refused
from chainmerge.merging.verifying import verify_content, verify_soundness
from chainmerge.options import Direction, Placement
from chainmerge.planning.plan import HidingFacts
from chainmerge.planning.space.errors import OldBytesBehindEnd
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.transfer.copying import ReadBack, transfer_into
from chainmerge.storage.volumes import VolumeFacts, VolumeKind, open_volume

if TYPE_CHECKING:
    from chainmerge.chain.target import OpenChain, Target
    from chainmerge.chain.view import GuestView
    from chainmerge.merging.job import Job


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


def hide(job: Job) -> None:
    """Have the overlay show zeros of its own where base's volume is going to show something.

    Raises:
        NotEnoughSpace, RefcountTableFull, HeaderFull: nothing was changed.
        MergeNotWritten, Interrupted: the overlay is what it was.
        SwitchUnknown: it has the zeros or has not; what the guest sees is the same.
        ReleaseFailed: it has them, and leaked clusters.
    """
    place = job.target.base_index + 1
    view = job.opened.view(0, place + 1)

    def before_switch(new_image: Qcow2Image, merged: GuestView) -> None:
        verify_soundness(new_image)
        verify_content(new_image.name, merged, view, _nothing, job.request.should_stop)

    with open_for_writing(job.target.overlay) as port:
        image = Qcow2Image(port)
        tree = tree_that_hides(image, job.target.base.virtual_size)
        work = Commit(
            image=image,
            chain=view,
            # The overlay stays on base: no image is pulled up into it.
            base_index=place,
            tree=tree,
            zeroes=None,
            backing=None,
            placement=Placement.COW,
            shares_extents=False,
            instead=ZerosBehind((), job.target.base.virtual_size),
        )
        transfer = transfer_into(
            port,
            on_progress=_nothing,
            should_stop=job.request.should_stop,
            bandwidth=job.request.options.bandwidth,
            read_back=ReadBack.COMPARED,
        )
        with contextlib.closing(transfer):
            commit(port, work, transfer, before_switch)


def _nothing(_done: int) -> None:
    """Nobody needs to be told how far it is."""
