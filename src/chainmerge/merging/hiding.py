# SPDX-License-Identifier: Apache-2.0
"""Zeros in an overlay, over what a raw base shows when its volume is larger."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chainmerge.chain.reading import open_for_writing
from chainmerge.engines.native.commit import Commit, commit_natively
from chainmerge.engines.native.hiding import ZerosBehind, tree_that_hides
from chainmerge.merging.verifying import verify_content, verify_soundness
from chainmerge.options import Placement
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.transfer.copying import ReadBack, transfer_into

if TYPE_CHECKING:
    from chainmerge.chain.view import GuestView
    from chainmerge.merging.job import Job


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
            commit_natively(port, work, transfer, before_switch)


def _nothing(_done: int) -> None:
    """Nobody needs to be told how far it is."""
