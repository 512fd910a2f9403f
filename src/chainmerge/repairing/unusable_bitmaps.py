# SPDX-License-Identifier: Apache-2.0
"""Finds bitmaps of an image that no chain can use. Reads only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.bitmaps.rules import BitmapState, LayerBitmaps, chain_test
from chainmerge.bitmaps.stored import bitmaps_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.opening import open_chain
from chainmerge.chain.target import policy_of
from chainmerge.errors import ChainmergeError
from chainmerge.storage.locks import LockMode, contentions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chainmerge.chain.model import Identity, ImageInfo
    from chainmerge.chain.relatives import Relatives
    from chainmerge.options import Access


def unusable_bitmaps(image: ImageInfo, relatives: Relatives, access: Access) -> Mapping[str, str]:
    """Names of bitmaps of *image* that can be read but not used, and why.

    A backup reads a name from an upper end of a chain down. A name is of no use if it is whole
    from no upper end that is found above the image. Nothing is said where an upper end cannot
    be read, or is open for writing: while a guest runs, what is stored of bitmaps is void.
    """
    lines = []
    for leaf in _upper_ends(image, relatives):
        if leaf != image.path and any(contentions([(leaf, LockMode.READER)])):
            return {}
        try:
            lines.append(_line(leaf, image.identity, access))
        except ChainmergeError:
            return {}
    found: dict[str, str] = {}
    for name in sorted(_names(lines[0].own)):
        verdicts = [chain_test([layer.state(name) for layer in line.layers]) for line in lines]
        if not any(verdict.passes for verdict in verdicts):
            found[name] = verdicts[0].reason
    return found


class _Line(Struct, frozen=True):
    """The bitmaps of a chain from its upper end down, and those of the image asked about."""

    layers: tuple[LayerBitmaps, ...]
    own: LayerBitmaps


def _line(leaf: Path, identity: Identity, access: Access) -> _Line:
    with open_chain(discover(leaf, policy_of(access))) as opened:
        layers = [(one.info.identity, bitmaps_of(one)) for one in reversed(opened.images)]
    own = next(layer for found, layer in layers if found == identity)
    return _Line(tuple(layer for _, layer in layers), own)


def _upper_ends(image: ImageInfo, relatives: Relatives) -> list[Path]:
    above = [one.image for one in relatives.above]
    below = {backing.resolve() for one in above if (backing := one.backing) is not None}
    return [one.path for one in above if one.real_path not in below] or [image.path]


def _names(layer: LayerBitmaps) -> set[str]:
    """All but those that are broken, and tombstones."""
    return {
        name
        for name, occurrence in layer.occurrences.items()
        if occurrence.state is not BitmapState.IN_USE and not occurrence.is_tombstone
    }
