# SPDX-License-Identifier: Apache-2.0
"""What is done with base's bitmaps in a running VM, and when. Pure.

While data is copied, base's bitmaps must not record: QEMU would mark the copy, in whole
clusters. They are switched off, united with those of the merged images by a transaction, and
switched on again where base has everything. Both ends of that are one transaction each, so that
a look at base tells which has been done:

- the *window*, right after the job has made base writable, and before it may copy in earnest:
  stale bitmaps go, tombstones and the bitmaps that base takes over come. Where nobody writes to
  the merged images any more, their bits are added here.
- the *switch*, while the job is held: base's bitmaps record from now on. In an active merge the
  guest waits meanwhile, so that the bits added here are all that top will ever have.

:func:`undo_actions` leads back from anywhere in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.live.port import (
    AddBitmap,
    BitmapAction,
    ClearBitmap,
    DisableBitmap,
    EnableBitmap,
    MergeBitmap,
    RemoveBitmap,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.live.nodes import BlockNode
    from chainmerge.records.live_journal import KeptName, LiveJournal, TombstoneName


def disable_actions(journal: LiveJournal, base: BlockNode) -> tuple[BitmapAction, ...]:
    """Switch off what base keeps, before anything is copied. Base may be read-only."""
    return tuple(
        DisableBitmap(base.name, kept.name)
        for kept in journal.kept
        if (bitmap := base.bitmap(kept.name)) is not None and bitmap.recording
    )


def window_actions(
    journal: LiveJournal, base: BlockNode, overlays: Sequence[BlockNode]
) -> tuple[tuple[BitmapAction, ...], ...]:
    """What is to be done in the window, transaction by transaction.

    Whatever has been done already is left out, or can be done again.

    Args:
        journal: of the merge.
        base: its node.
        overlays: the nodes of the merged images, lowest first.
    """
    removed: list[BitmapAction] = [
        RemoveBitmap(base.name, name) for name in journal.stale if base.bitmap(name) is not None
    ]
    first: list[BitmapAction] = [*disable_actions(journal, base)]
    for kept in journal.kept:
        if base.bitmap(kept.name) is None:
            first.append(AddBitmap(base.name, kept.name, kept.granularity))
        if not journal.is_active:
            first.append(_union(kept, base, overlays))
    second: list[BitmapAction] = []
    for tombstone in journal.tombstones:
        before, after = _tombstone_actions(tombstone, base)
        first += before
        second += after
    return tuple(tuple(actions) for actions in ([*removed, *first], second) if actions)


def _tombstone_actions(
    tombstone: TombstoneName, base: BlockNode
) -> tuple[list[BitmapAction], list[BitmapAction]]:
    """What makes a tombstone, in two steps where one does not do."""
    found = base.bitmap(tombstone.name)
    add = AddBitmap(base.name, tombstone.name, tombstone.granularity)
    if found is None:
        return [add], []
    if found.inconsistent:
        # It can only be removed, and its name is free once that is done.
        return [RemoveBitmap(base.name, tombstone.name)], [add]
    actions: list[BitmapAction] = []
    if found.recording:
        actions.append(DisableBitmap(base.name, tombstone.name))
    if found.dirty_bytes:
        actions.append(ClearBitmap(base.name, tombstone.name))
    return actions, []


def switch_actions(
    journal: LiveJournal, base: BlockNode, overlays: Sequence[BlockNode]
) -> tuple[BitmapAction, ...]:
    """What is to be done while the job is held."""
    return tuple(_switched(journal, base, overlays))


def _switched(
    journal: LiveJournal, base: BlockNode, overlays: Sequence[BlockNode]
) -> Iterator[BitmapAction]:
    for kept in journal.kept:
        bitmap = base.bitmap(kept.name)
        # Those that record were merged in the same transaction that switched them on.
        if bitmap is None or bitmap.recording:
            continue
        if journal.is_active:
            yield _union(kept, base, overlays)
        yield EnableBitmap(base.name, kept.name)


def undo_actions(journal: LiveJournal, base: BlockNode) -> tuple[BitmapAction, ...]:
    """Put base's bitmaps back: those that it had record again, the others go.

    Bits that were added stay: the checkpoint is the union of all occurrences in any case. What
    was stale stays away.
    """
    return tuple(_undone(journal, base))


def _undone(journal: LiveJournal, base: BlockNode) -> Iterator[BitmapAction]:
    for kept in journal.kept:
        bitmap = base.bitmap(kept.name)
        if bitmap is None or bitmap.inconsistent:
            continue
        if not kept.in_base:
            yield RemoveBitmap(base.name, kept.name)
        elif not bitmap.recording:
            yield EnableBitmap(base.name, kept.name)
    for tombstone in journal.tombstones:
        if not tombstone.in_base and base.bitmap(tombstone.name) is not None:
            yield RemoveBitmap(base.name, tombstone.name)


def pull_actions(
    journal: LiveJournal, top: BlockNode, merged: Sequence[BlockNode]
) -> tuple[tuple[BitmapAction, ...], ...]:
    """What is to be done with top's bitmaps while a pull is held, transaction by transaction.

    Whatever has been done already is left out, or can be done again.

    Args:
        journal: of the pull.
        top: its node, which is open for writing.
        merged: the nodes of the images whose data has come up, lowest first.
    """
    first: list[BitmapAction] = [
        RemoveBitmap(top.name, name) for name in journal.stale if top.bitmap(name) is not None
    ]
    first += [_union(kept, top, merged) for kept in journal.kept if kept.sources]
    second: list[BitmapAction] = []
    for tombstone in journal.tombstones:
        before, after = _tombstone_actions(tombstone, top)
        first += before
        second += after
    return tuple(tuple(actions) for actions in (first, second) if actions)


def switch_off_actions(journal: LiveJournal, top: BlockNode) -> tuple[BitmapAction, ...]:
    """Have no bitmap of top pass for complete that lacks what images below had of it.

    Top may be open for reading only.
    """
    lacking = [one.name for one in journal.kept if one.sources]
    lacking += [*journal.stale, *(one.name for one in journal.tombstones)]
    return tuple(
        DisableBitmap(top.name, name)
        for name in lacking
        if (bitmap := top.bitmap(name)) is not None and bitmap.recording
    )


def faults(journal: LiveJournal, result: BlockNode) -> Iterator[str]:
    """How the bitmaps of *result* differ from what they should be once all is done.

    A sentence each.
    """
    for kept in journal.kept:
        bitmap = result.bitmap(kept.name)
        if bitmap is None:
            yield f"bitmap {kept.name!r} is missing"
        elif bitmap.inconsistent or not bitmap.persistent:
            yield f"bitmap {kept.name!r} will not be stored"
        elif not bitmap.recording:
            yield f"bitmap {kept.name!r} does not record"
    for name in journal.stale:
        if result.bitmap(name) is not None:
            yield f"bitmap {name!r} should not be there"
    for tombstone in journal.tombstones:
        bitmap = result.bitmap(tombstone.name)
        if bitmap is None or bitmap.recording or bitmap.dirty_bytes:
            yield f"{tombstone.name!r} should be a tombstone and is not"


def _union(kept: KeptName, result: BlockNode, merged: Sequence[BlockNode]) -> MergeBitmap:
    sources = tuple(merged[index].name for index in kept.sources)
    return MergeBitmap(result.name, kept.name, sources)
