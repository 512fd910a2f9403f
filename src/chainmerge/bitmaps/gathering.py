# SPDX-License-Identifier: Apache-2.0
"""The bitmaps of a chain as they are on disk, and what becomes of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.bitmaps.pulled import bitmaps_left_in_use
from chainmerge.bitmaps.rules import (
    NOT_THERE,
    BitmapState,
    Decision,
    Fate,
    LayerBitmaps,
    Occurrence,
    decide,
)
from chainmerge.bitmaps.stored import bitmaps_of
from chainmerge.qcow2.bitmaps import storable_granularity
from chainmerge.qcow2.bits import BitSet, union_all
from chainmerge.records.errors import LeftoverUnclear
from chainmerge.records.identity import Sameness, compare, identify
from chainmerge.records.saved_bitmaps import SavedBitmap, SavedBitmaps, saved_bitmaps_file

if TYPE_CHECKING:
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target


class BitmapFacts(Struct, frozen=True):
    """The bitmaps of a chain, and what becomes of them.

    ``layers`` goes from root to top and has base's checkpoints as they were before an
    interrupted merge; ``recovered`` names those. ``final_bits`` has the union for each
    name that is kept, of the disk's final size; ``base_bits`` what base itself has of it.
    """

    layers: tuple[LayerBitmaps, ...]
    decisions: tuple[Decision, ...]
    final_bits: Mapping[str, BitSet]
    base_bits: Mapping[str, BitSet]
    recovered: frozenset[str]
    warnings: tuple[str, ...]


def gather_bitmaps_to_pull(
    target: Target, opened: OpenChain, saved: SavedBitmaps | None
) -> BitmapFacts:
    """Like :func:`gather_bitmaps`, but top is the result: top gets what base holds.

    *saved* is what a pull in a VM has saved of top's.
    """
    on_disk = [bitmaps_of(image) for image in opened.images]
    index = target.base_index
    top = opened.images[-1].image
    left = {} if top is None else bitmaps_left_in_use(top, saved)
    on_disk[-1] = _with_saved(on_disk[-1], left)
    on_disk[index] = replace(on_disk[index], supports_bitmaps=on_disk[-1].supports_bitmaps)
    above = frozenset(entry.name for one in target.relatives.above for entry in one.image.bitmaps)
    decisions = decide(on_disk, index, above, top_stays=False)
    kept = [decision for decision in decisions if decision.fate is Fate.KEEP]
    base_bits = {
        decision.name: opened.images[index].bits(decision.name)
        for decision in kept
        if on_disk[index].state(decision.name) is BitmapState.VALID
    }
    size = target.chain.top.virtual_size
    known = {index: base_bits, len(on_disk) - 1: left}
    final = {decision.name: _unite(decision, opened, known, size) for decision in kept}
    return BitmapFacts(tuple(on_disk), decisions, final, base_bits, frozenset(left), ())


def gather_bitmaps(
    target: Target, opened: OpenChain, saved: SavedBitmaps | None, *, top_stays: bool
) -> BitmapFacts:
    """Decide on every bitmap, and unite the bits of those that are kept.

    Raises LeftoverUnclear.
    """
    on_disk = tuple(bitmaps_of(image) for image in opened.images)
    base_index = target.base_index
    saved_bits, warnings = _usable_saved(target, opened, on_disk, saved)
    layers = (
        *on_disk[:base_index],
        _with_saved(on_disk[base_index], saved_bits),
        *on_disk[base_index + 1 :],
    )
    decisions = decide(layers, base_index, names_above(target), top_stays=top_stays)
    kept = [decision for decision in decisions if decision.fate is Fate.KEEP]
    on_base = opened.images[base_index]
    base_bits = {
        name: bits if (bits := saved_bits.get(name)) is not None else on_base.bits(name)
        for name in (decision.name for decision in kept)
        if layers[base_index].state(name) is BitmapState.VALID
    }
    size = max(target.base.virtual_size, target.chain.top.virtual_size)
    known = {base_index: base_bits}
    final = {decision.name: _unite(decision, opened, known, size) for decision in kept}
    return BitmapFacts(layers, decisions, final, base_bits, frozenset(saved_bits), warnings)


def names_above(target: Target) -> frozenset[str]:
    """Names of bitmaps in images that read base without being part of the merge.

    Siblings count, with what stands on them: where they are allowed at all, they are children
    of top that an interrupted run has re-pointed already. Before that it has left in base what
    keeps their broken checkpoints from looking whole, so what base does not name needs nothing.
    """
    above = {entry.name for one in target.relatives.above for entry in one.image.bitmaps}
    beside = {entry.name for image in target.relatives.beside for entry in image.bitmaps}
    return frozenset(above | beside & {entry.name for entry in target.base.bitmaps})


def _usable_saved(
    target: Target,
    opened: OpenChain,
    on_disk: Sequence[LayerBitmaps],
    saved: SavedBitmaps | None,
) -> tuple[dict[str, BitSet | None], tuple[str, ...]]:
    """The bitmaps of base that an interrupted merge saved, as far as they belong to this chain.

    None stands for a name that base did not have: where base has it now, in whatever state, the
    interrupted merge has put it there.

    Raises LeftoverUnclear.
    """
    if saved is None:
        return {}, ()
    base, overlay = on_disk[target.base_index], on_disk[target.base_index + 1]
    answers = (
        compare(saved.base, identify(target.base.real_path)),
        compare(saved.overlay, identify(target.overlay.real_path)),
    )
    same = all(answer is Sameness.SAME for answer in answers)
    unclear = not same and Sameness.OTHER not in answers
    usable: dict[str, BitSet | None] = {}
    lost: list[str] = []
    for bitmap in saved.bitmaps:
        state = base.state(bitmap.name)
        needed = state in (BitmapState.DISABLED, BitmapState.IN_USE)
        if bitmap.in_base is None:
            if state is not BitmapState.ABSENT and unclear:
                raise _unclear(target, answers)
            if same and state is not BitmapState.ABSENT:
                usable[bitmap.name] = None
        elif needed and same and _still_covers(opened, target, overlay, bitmap):
            usable[bitmap.name] = bitmap.in_base
        elif needed and unclear:
            raise _unclear(target, answers)
        elif needed:
            lost.append(bitmap.name)
    if not lost:
        return usable, ()
    warning = (
        f"an interrupted merge saved bitmaps of {target.base.path}, but the image on top of it is "
        f"no longer the same one: {', '.join(map(repr, lost))} cannot be restored, and the next "
        "backup that builds on this must be a full one"
    )
    return usable, (warning,)


def _unclear(target: Target, answers: tuple[Sameness, Sameness]) -> LeftoverUnclear:
    """The error that nothing shows whether the saved bitmaps belong to this chain."""
    image = target.base if answers[0] is Sameness.UNKNOWN else target.overlay
    file = saved_bitmaps_file(target.base.real_path)
    consequence = "the next backup that builds on the bitmaps that it holds must be a full one"
    return LeftoverUnclear(str(file), str(image.path), consequence)


def _still_covers(
    opened: OpenChain, target: Target, overlay: LayerBitmaps, saved: SavedBitmap
) -> bool:
    """Whether the overlay still has all the bits that it had."""
    then = saved.in_overlay
    if then is None or overlay.state(saved.name) is not BitmapState.VALID:
        return False
    now = opened.images[target.base_index + 1].bits(saved.name)
    return now.with_geometry(then.disk_size, then.granularity).covers(then)


def _with_saved(layer: LayerBitmaps, saved: Mapping[str, BitSet | None]) -> LayerBitmaps:
    revived = {
        name: NOT_THERE if bits is None else Occurrence(BitmapState.VALID, bits.granularity, None)
        for name, bits in saved.items()
    }
    return replace(layer, occurrences={**layer.occurrences, **revived})


def _unite(
    decision: Decision, opened: OpenChain, known: Mapping[int, Mapping[str, BitSet]], size: int
) -> BitSet:
    """The union of a name's bitmaps; *known* has those that are not as they are on disk."""
    assert decision.granularity is not None
    name = decision.name
    sources = (
        known[index][name] if name in known.get(index, ()) else opened.images[index].bits(name)
        for index in decision.sources
    )
    return union_all(sources, size, storable_granularity(size, decision.granularity))
