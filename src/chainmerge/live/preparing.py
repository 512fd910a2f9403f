# SPDX-License-Identifier: Apache-2.0
"""What comes before the first command to a VM: what speaks against it, space, and records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chainmerge.chain.opening import open_chain
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.live.errors import UnfinishedMergeFound
from chainmerge.merging.job import wipe_behind_end
from chainmerge.qcow2.bits import BitSet
from chainmerge.records.live_journal import live_journal_file, save_live_journal
from chainmerge.records.merge_journal import journal_file
from chainmerge.records.remains import read_remains
from chainmerge.records.saved_bitmaps import (
    SavedBitmap,
    SavedBitmaps,
    save_bitmaps,
    saved_bitmaps_file,
)
from chainmerge.storage.volumes import volume_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.errors import ChainmergeError
    from chainmerge.live.driver import Caller
    from chainmerge.live.planning import LivePlan
    from chainmerge.live.target import LiveTarget
    from chainmerge.options import LiveOptions
    from chainmerge.records.live_journal import LiveJournal
    from chainmerge.records.request import RecordedRequest


def left_behind(live: LiveTarget) -> Iterator[ChainmergeError]:
    """What other merges have left beside base that must not be lost."""
    base = live.target.base.real_path
    remains = read_remains(base, live.target.chain.top.real_path)
    if remains.live is not None:
        yield UnfinishedMergeFound(str(base), str(live_journal_file(base)))
    if remains.journal_problem is not None:
        yield remains.journal_problem
    elif remains.journal is not None:
        yield UnfinishedMergeFound(str(base), str(journal_file(base)))
    elif remains.usable_saved is not None:
        yield UnfinishedMergeFound(str(base), str(saved_bitmaps_file(base)))


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
    _wipe_behind_end(live, decided)
    _extend(decided, options, caller)
    journal = msgspec.structs.replace(decided.journal, request=request)
    saved = _to_save(live, journal)
    if saved is not None:
        save_bitmaps(live.target.base.real_path, saved)
    save_live_journal(journal)
    return journal


def _extend(decided: LivePlan, options: LiveOptions, caller: Caller) -> None:
    """Extend base's volume to what the plan says. A file grows as it is written to.

    Reserving space behind the end of a file that somebody else writes to could not be taken
    back: that is done by truncating it.
    """
    space = decided.plan.space
    if space.grow_to is None:
        return
    caller.report(ProgressEvent(Stage.EXTEND))
    volume = volume_at(Path(decided.journal.base.path), options.as_merge)
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
            in_overlay = None
            if 0 in kept.sources and node.read_only:
                in_overlay = overlay.bits(kept.name)
            elif 0 in kept.sources:
                # The guest writes to it: what it had then, it has in any case.
                found = node.bitmap(kept.name)
                assert found is not None
                in_overlay = BitSet.empty(overlay.info.virtual_size, found.granularity)
            bits = base.bits(kept.name) if kept.in_base else None
            bitmaps.append(SavedBitmap(kept.name, bits, in_overlay))
    return SavedBitmaps(journal.base, journal.overlays[0], tuple(bitmaps), journal.request)
