# SPDX-License-Identifier: Apache-2.0
"""Chains of bitmaps in a few words, for tables."""

from __future__ import annotations

from chainmerge.bitmaps.rules import (
    BitmapState,
    Decision,
    LayerBitmaps,
    Occurrence,
    decide,
)

NAME = "cp1"


def layer(image: str, occurrence: str) -> LayerBitmaps:
    """``valid``, ``disabled``, ``in-use``, ``absent``, ``tombstone``, ``cannot`` (raw or v2).

    ``valid/4096`` gives a granularity; 65536 otherwise. ``v2:in-use`` is a name in the
    bitmaps extension of a version 2 image, which must not have one.
    """
    rest = occurrence.removeprefix("v2:")
    supports_bitmaps = rest == occurrence
    word, _, granularity = rest.partition("/")
    if word in {"absent", "cannot"}:
        return LayerBitmaps(image, {}, supports_bitmaps=word == "absent")
    state = BitmapState.DISABLED if word == "tombstone" else BitmapState(word)
    empty = word == "tombstone"
    return LayerBitmaps(
        image, {NAME: Occurrence(state, int(granularity or 65536), empty)}, supports_bitmaps
    )


def decide_one(chain: str, *, above: bool, top_stays: bool) -> Decision | None:
    """``chain`` reads from the root up: ``base=valid top=absent``."""
    layers = [layer(*part.split("=")) for part in chain.split()]
    base_index = [part.image for part in layers].index("base")
    names_above = {NAME} if above else set()
    decisions = decide(layers, base_index, names_above, top_stays=top_stays)
    assert len(decisions) <= 1
    return decisions[0] if decisions else None
