# SPDX-License-Identifier: Apache-2.0
"""What a merge must make of a chain's bitmaps, and when it is refused: the rules, once more.

Written from the table in docs/design.md and from what the guest wrote, with one array element
for each sector. It shares nothing with the code under test, not even the way in which it looks
at a chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tests.support.images import SECTOR, WriteCompressed
from tests.support.merge_cases import BitmapPlan, LayerPlan, MergeCase, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Sectors = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ExpectedBitmap:
    """A bitmap of base after the merge. *granularity* is None where any will do."""

    enabled: bool
    granularity: int | None
    dirty: Sectors


def disk_after(case: MergeCase) -> int:
    if case.pulls:
        return case.layers[case.top].disk_size
    return max(case.layers[case.base].disk_size, case.layers[case.top].disk_size)


def expected_bitmaps(case: MergeCase) -> dict[str, ExpectedBitmap]:
    """Base's bitmaps, by name, after a merge that is not refused."""
    if not case.result.holds_bitmaps:
        return {}
    top_needs_guard = _top_stays(case) and not case.pulls
    found = {}
    for name in _names(case.layers[case.base : case.top + 1]):
        if _passes(case, name):
            found[name] = _union(case, name)
        elif name in _names(case.above) or (top_needs_guard and _is_valid(_top(case), name)):
            clean = np.zeros(disk_after(case) // SECTOR, dtype=bool)
            found[name] = ExpectedBitmap(False, None, clean)
    return found


def spent_tombstones(case: MergeCase) -> set[str]:
    """Names of which base holds a tombstone for as long as top is there, and no longer.

    They are dropped at the very end, which takes another set of bitmaps; the planned space has
    none for it. Where it is not to be had they stay, and do no harm.
    """
    base = case.layers[case.base]
    if case.pulls or _top_stays(case) or not base.holds_bitmaps:
        return set()
    names = _names(case.layers[case.base : case.top + 1]) - _names(case.above)
    return {name for name in names if _is_valid(_top(case), name) and not _passes(case, name)}


def expected_refusals(case: MergeCase) -> set[str]:
    """The codes of all reasons not to do the merge."""
    return set(_refusals(case))


def _refusals(case: MergeCase) -> Iterator[str]:
    base, top, merged = case.layers[case.base], _top(case), case.layers[case.base + 1 : case.top]
    if case.pulls:
        doomed = (base, *merged) if case.options.delete else ()
        if _loses_snapshots(case, doomed):
            yield "internal-snapshots"
        # What lies below top is out of the chain, and top cannot say that there was a gap.
        names = _names(case.layers[case.base : case.top + 1])
        if not top.holds_bitmaps and names & _names(case.above):
            yield "bitmaps-unguarded"
        return
    doomed = (*merged, top) if case.options.delete else (top,)
    if _loses_snapshots(case, doomed):
        yield "internal-snapshots"
    if top.disk_size < base.disk_size and any(
        child.disk_size > top.disk_size for child in case.children
    ):
        yield "child-sees-more"
    if top.disk_size > base.disk_size and _is_stuck(case, base, top.disk_size):
        yield "cannot-grow-base"
    if base.holds_bitmaps:
        return
    names = _names(case.layers[case.base : case.top + 1])
    if not case.options.drop_bitmaps and any(_passes(case, name) for name in names):
        yield "base-cannot-hold-bitmaps"
    # Top directly on base is right with its own bits, but only if there were no others.
    short = {name for name in _names(merged) if _top_stays(case) and _is_valid(top, name)}
    if short or names & _names(case.above):
        yield "bitmaps-unguarded"


def _loses_snapshots(case: MergeCase, doomed: Iterable[LayerPlan]) -> bool:
    goes = not _top_stays(case) and not case.options.drop_snapshots
    return goes and any(layer.snapshot for layer in doomed)


def _is_stuck(case: MergeCase, base: LayerPlan, size: int) -> bool:
    """Whether the engine cannot make base's disk as large as *size*."""
    if base.geometry is None or base.geometry.compat != "0.10":
        return False
    if case.options.engine == "native":
        return base.snapshot
    # Without zero clusters nothing can hide what a longer backing file has there.
    longer_backing = case.base > 0 and case.layers[case.base - 1].disk_size > base.disk_size
    return base.snapshot or longer_backing


def end_may_be_stuck(case: MergeCase) -> bool:
    """Whether base cannot grow if its last cluster is compressed, which only QEMU knows.

    Its clusters have parts, and those behind the old end of the disk have to become zeros to
    hide a longer backing file. A compressed cluster has no such parts.
    """
    base, end = case.layers[case.base], case.layers[case.base].disk_size
    if (
        case.options.engine == "native"
        or base.geometry is None
        or not base.geometry.extended_l2
        or end >= _top(case).disk_size
    ):
        return False
    longer_backing = case.base > 0 and case.layers[case.base - 1].disk_size > end
    return longer_backing and any(
        isinstance(write, WriteCompressed) and write.offset + write.length == end
        for write in base.image.operations
    )


def _top(case: MergeCase) -> LayerPlan:
    return case.layers[case.top]


def _top_stays(case: MergeCase) -> bool:
    return not (case.options.delete or case.options.keep_name)


def _names(layers: Iterable[LayerPlan]) -> set[str]:
    return {bitmap.name for layer in layers for bitmap in layer.bitmaps}


def _bitmap(layer: LayerPlan, name: str) -> BitmapPlan | None:
    return next((bitmap for bitmap in layer.bitmaps if bitmap.name == name), None)


def _is_valid(layer: LayerPlan, name: str) -> bool:
    bitmap = _bitmap(layer, name)
    return bitmap is not None and bitmap.state is State.VALID and not layer.untrusted


def _passes(case: MergeCase, name: str) -> bool:
    """The chain test, from top: valid, as far down as there is any."""
    going_down = case.layers[case.top :: -1]
    valid = [_is_valid(layer, name) for layer in going_down]
    present = [_bitmap(layer, name) is not None for layer in going_down]
    run = valid.index(False) if False in valid else len(valid)
    return run > 0 and not any(present[run:])


def _union(case: MergeCase, name: str) -> ExpectedBitmap:
    occurrences = [
        (layer, bitmap)
        for layer in case.layers[case.base : case.top + 1]
        if (bitmap := _bitmap(layer, name)) is not None
    ]
    granularity = min(bitmap.granularity for _, bitmap in occurrences)
    size = disk_after(case)
    dirty = np.zeros(size // SECTOR, dtype=bool)
    for layer, bitmap in occurrences:
        recorded = _recorded(layer, bitmap)[: len(dirty)]
        dirty[: len(recorded)] |= recorded
    return ExpectedBitmap(True, granularity, _in_steps(dirty, granularity))


def _recorded(layer: LayerPlan, bitmap: BitmapPlan) -> Sectors:
    """What QEMU marked dirty while the image was the active one."""
    dirty = np.zeros(layer.disk_size // SECTOR, dtype=bool)
    for write in layer.seen_by(bitmap):
        dirty[write.offset // SECTOR : (write.offset + write.length) // SECTOR] = True
    return _in_steps(dirty, bitmap.granularity)


def _in_steps(dirty: Sectors, granularity: int) -> Sectors:
    """With one dirty sector, all those are dirty that the same bit stands for."""
    step = granularity // SECTOR
    if step >= len(dirty):
        return np.full(len(dirty), dirty.any())
    whole = np.append(dirty, np.zeros(-len(dirty) % step, dtype=bool)).reshape(-1, step)
    return np.repeat(whole.any(axis=1), step)[: len(dirty)]
