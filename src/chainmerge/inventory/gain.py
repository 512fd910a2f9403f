# SPDX-License-Identifier: Apache-2.0
"""What a merge of all images that only one leaf uses would free and copy. Reads tables only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.qcow2.extents import Kind
from chainmerge.qcow2.mapping import DEFAULT_WINDOW

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from chainmerge.chain.layers import Layer
    from chainmerge.chain.model import Identity
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.view import Resolved


class Gain(Struct, frozen=True):
    """In guest bytes: what images above hide of those below, and what would move.

    That is down or up, whichever is less: with the leaf's name kept, the result is the same.
    """

    hidden: int
    to_copy: int


def first_own_index(
    images: Sequence[Identity],
    users: Mapping[Identity, int],
    foreign: Container[Identity] = (),
) -> int:
    """The lowest image of a chain below which, and at which, nothing but this chain branches off.

    Args:
        images: of a chain, from its root up to its leaf.
        users: how many images have each one as their backing file.
        foreign: those of other formats: nothing is merged into one, and it is not looked into.
    """
    for index in range(len(images) - 2, -1, -1):
        if images[index] in foreign or users.get(images[index], 0) > 1:
            return index + 1
    return 0


def gain_of(opened: OpenChain, first: int) -> Gain:
    """What merging the images from *first* up into that one frees and copies.

    Raises:
        FormatError: tables are damaged.
    """
    view = opened.view(first)
    if len(view.layers) < 2:
        return Gain(0, 0)
    stored = sum(stored_in(layer) for layer in view.layers)
    top = len(view.layers) - 1
    seen = down = up = 0
    for runs in view.resolve():
        seen += _data_of(runs, 0, top)
        down += _data_of(runs, 1, top)
        up += _data_of(runs, 0, top - 1)
    return Gain(max(0, stored - seen), min(down, up))


def stored_in(layer: Layer) -> int:
    """Guest bytes of data that a layer holds, whoever sees them.

    Raises:
        FormatError: tables are damaged.
    """
    total = 0
    for extents in layer.iter_extents(0, layer.virtual_size, DEFAULT_WINDOW):
        is_data = (extents.kind == Kind.DATA) | (extents.kind == Kind.COMPRESSED)
        total += int(extents.length[is_data].sum())
    return total


def _data_of(runs: Resolved, lowest: int, highest: int) -> int:
    """Bytes of data that the layers from *lowest* to *highest* decide."""
    return int(runs.length[(runs.layer >= lowest) & (runs.layer <= highest)].sum())
