# SPDX-License-Identifier: Apache-2.0
"""The bitmaps of a chain, and the verdict on every name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.bitmaps.rules import LayerBitmaps, chain_test
from chainmerge.bitmaps.stored import bitmap_results, bitmaps_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.opening import OpenImage, open_chain
from chainmerge.chain.target import metadata_policy_of
from chainmerge.documents.bitmaps import BitmapListing, BitmapRow, BitmapVerdict
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.options import Access

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def bitmaps_list(image: str | Path, access: Access | None = None) -> BitmapListing:
    """Every bitmap of a chain, and whether a backup read from *image* can use each name.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    access = access or Access()
    policy = metadata_policy_of(access, image)
    chain = discover(Path(access.active or image), policy)
    with open_chain(chain) as opened:
        leaf_first = tuple(reversed(opened.images))
        rows = tuple(row for one in leaf_first for row in _rows(one))
        layers = tuple(bitmaps_of(one) for one in leaf_first)
    return BitmapListing(REPORT_VERSION, str(image), rows, tuple(_verdicts(layers)))


def _rows(opened: OpenImage) -> Iterator[BitmapRow]:
    if opened.image is None:
        return
    for found in bitmap_results(opened.image):
        yield BitmapRow(
            image=str(opened.info.path),
            name=found.name,
            state=found.state,
            granularity=found.granularity,
            dirty_bytes=found.dirty_bytes,
            tombstone=found.tombstone,
        )


def _verdicts(leaf_first: Sequence[LayerBitmaps]) -> Iterator[BitmapVerdict]:
    for name in sorted({name for layer in leaf_first for name in layer.occurrences}):
        verdict = chain_test([layer.state(name) for layer in leaf_first])
        yield BitmapVerdict(name, verdict.passes, verdict.reason)
