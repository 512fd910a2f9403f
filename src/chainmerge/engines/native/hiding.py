# SPDX-License-Identifier: Apache-2.0
"""Hides what lies below an image behind a guest byte, with zeros of the image's own.

Behind the end of a backing file that is shorter a guest reads zeros. Once the backing file is
longer it reads what that holds there, wherever the image above says nothing. So an image gets
zero clusters there (zeros, in version 2) before that happens, in one switch as any merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.chain.view import NO_LAYER, GuestView, Resolved
from chainmerge.engines.native.decisions import MappedDisk
from chainmerge.engines.native.survey import MappingNeed, NewTree, new_tree, survey_mapping
from chainmerge.options import Direction, Placement
from chainmerge.qcow2.extents import Extents, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.qcow2.image import Qcow2Image


class ZerosBehind(GuestView, frozen=True):
    """A view that says nothing before a guest byte, and zeros from there on.

    Attributes:
        end: The guest byte.
    """

    end: int

    def resolve(self, start: int = 0, end: int | None = None) -> Iterator[Resolved]:
        """As :meth:`GuestView.resolve`; its disk has no end."""
        assert end is not None
        if start < min(self.end, end):
            yield _run(start, min(self.end, end), Kind.UNALLOCATED)
        if max(start, self.end) < end:
            yield _run(max(start, self.end), end, Kind.ZERO)


def _run(start: int, end: int, kind: Kind) -> Resolved:
    return Resolved(Extents.single(start, end, kind), np.array([NO_LAYER], dtype=np.int32))


def tree_that_hides(image: Qcow2Image, end: int) -> NewTree:
    """What *image* gets so that nothing below it shows from guest byte *end* on.

    Its tree changes nothing where that is so already. Reads tables only.
    """
    size = image.header.virtual_size
    # Whatever is below is going to show up to the end of the disk.
    disk = MappedDisk(image.header, size_after=size, backing_end=size, direction=Direction.PULL)
    needs: dict[Placement, MappingNeed] = survey_mapping(image, disk, ZerosBehind((), end))
    return new_tree(image.name, disk, needs[Placement.COW], None)
