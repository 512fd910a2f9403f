# SPDX-License-Identifier: Apache-2.0
"""What comes before the first command to a VM: what speaks against it, space, and records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chainmerge.chain.model import Chain
from chainmerge.chain.opening import open_chain
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.live.errors import UnfinishedMergeFound
from chainmerge.merging.job import wipe_behind_end
from chainmerge.qcow2.bits import BitSet, union_all
from chainmerge.records.live_journal import live_journal_file, save_live_journal
from chainmerge.records.merge_journal import journal_file
from chainmerge.records.remains import read_remains
from chainmerge.records.saved_bitmaps import (
    SavedBitmap,
    SavedBitmaps,
    save_bitmaps,
    saved_bitmaps_file,
)
from chainmerge.storage.volumes import LvmVolume, volume_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.opening import OpenImage
    from chainmerge.errors import ChainmergeError
    from chainmerge.live.driver import Caller
    from chainmerge.live.nodes import BlockNode
    from chainmerge.live.planning import LivePlan
    from chainmerge.live.target import LiveTarget
    from chainmerge.options import LiveOptions
    from chainmerge.records.live_journal import LiveJournal
    from chainmerge.records.request import RecordedRequest


def left_behind(live: LiveTarget, options: LiveOptions) -> Iterator[ChainmergeError]:
    """What other merges have left beside the images that must not be lost."""
    base, top = live.target.base.real_path, live.target.chain.top.real_path
    result = live.result(options).real_path
    remains = read_remains(result, top)
    if remains.live is not None:
        yield UnfinishedMergeFound(str(result), str(live_journal_file(result)))
    elif options.pulls and read_remains(base, top).live is not None:
        yield UnfinishedMergeFound(str(base), str(live_journal_file(base)))
    if remains.live_pull is not None:
        yield UnfinishedMergeFound(str(top), str(live_journal_file(top)))
    if remains.journal_problem is not None:
        yield remains.journal_problem
    elif remains.journal is not None:
        yield UnfinishedMergeFound(str(result), str(journal_file(result)))
    elif remains.usable_saved is not None:
        yield UnfinishedMergeFound(str(result), str(saved_bitmaps_file(result)))


def prepare_live_merge(
    live: LiveTarget,
    decided: LivePlan,
    request: RecordedRequest,
    options: LiveOptions,
    caller: Caller,
) -> LiveJournal:
    """Do what comes before a VM is told anything, and return the journal, which is on disk.

    Raises Failed, OutcomeUnknown.
    """
    if not options.pulls:
        _wipe_behind_end(live, decided)
    _extend(decided, options, caller)
    journal = msgspec.structs.replace(decided.journal, request=request)
    saved = _united_to_save(live, journal) if options.pulls else _to_save(live, journal)
    if saved is not None:
        save_bitmaps(Path(journal.result.path), saved)
    save_live_journal(journal)
    return journal


def _extend(decided: LivePlan, options: LiveOptions, caller: Caller) -> None:
    """Extend the volume that is written, and its pool. A file grows as it is written to.

    Reserving space behind the end of a file that somebody else writes to could not be taken
    back: that is done by truncating it.
    """
    space = decided.plan.space
    if space.grow_to is None and not space.extends_pool:
        return
    caller.report(ProgressEvent(Stage.EXTEND))
    volume = volume_at(Path(decided.journal.result.path), options.as_merge)
    if space.extends_pool and isinstance(volume, LvmVolume):
        volume.extend_pool(space.allocates or 0)
    if space.grow_to is not None:
        volume.grow_to(space.required)
        volume.make_growth_durable()


def _wipe_behind_end(live: LiveTarget, decided: LivePlan) -> None:
    """Make zeros of what base's last cluster holds behind the end that QEMU is going to move.

    The VM reads nothing there, and writes nowhere in base before its job begins.
    """
    size = decided.plan.virtual_size_after
    if live.target.base.virtual_size < size:
        with open_chain(live.target.chain) as opened:
            wipe_behind_end(opened.images[live.target.base_index], size)


def _to_save(live: LiveTarget, journal: LiveJournal) -> SavedBitmaps | None:
    """What a cold merge needs to know of base's checkpoints, should the VM end in the middle."""
    index = live.target.base_index
    if not journal.kept:
        return None
    with open_chain(live.target.chain) as opened:
        base, overlay = opened.images[index], opened.images[index + 1]
        node = live.nodes[index + 1]
        bitmaps = []
        for kept in journal.kept:
            if kept.in_base and not live.base.read_only:
                # An active merge that was undone can leave base writable: then nothing but the
                # VM knows its bits.
                continue
            in_overlay = _bits_of(node, overlay, kept.name) if 0 in kept.sources else None
            bits = base.bits(kept.name) if kept.in_base else None
            bitmaps.append(SavedBitmap(kept.name, bits, in_overlay))
    return SavedBitmaps(journal.base, journal.overlays[0], tuple(bitmaps), journal.request)


def _united_to_save(live: LiveTarget, journal: LiveJournal) -> SavedBitmaps | None:
    """What top's checkpoints are in the end, should the VM die with top open for writing.

    None where the guest writes to top: what it writes only the VM knows.
    """
    if journal.above is None or not journal.kept:
        return None
    first, node = live.target.base_index, live.nodes_above[0]
    bitmaps = []
    with (
        open_chain(live.target.chain) as opened,
        open_chain(Chain(live.above[:1])) as beyond,
    ):
        for kept in journal.kept:
            sources = [opened.images[first + index] for index in kept.sources]
            bits = [image.bits(kept.name) for image in (*sources, opened.images[-1])]
            united = union_all(bits, live.top.virtual_size, kept.granularity)
            above = _bits_of(node, beyond.images[0], kept.name)
            bitmaps.append(SavedBitmap(kept.name, united, above))
    return SavedBitmaps(journal.top, journal.above, tuple(bitmaps), journal.request)


def _bits_of(node: BlockNode, image: OpenImage, name: str) -> BitSet | None:
    """What of a bitmap an image certainly has; None if it lacks it.

    One that the guest writes to: what it had then, it has in any case.
    """
    found = node.bitmap(name)
    if found is None:
        return None
    if node.read_only:
        return image.bits(name)
    return BitSet.empty(image.info.virtual_size, found.granularity)
