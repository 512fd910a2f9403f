# SPDX-License-Identifier: Apache-2.0
"""Finishes a merge whose journal says that base holds everything: nothing is copied or compared.

What stands in base is taken as it is. The rules for bitmaps are for chains in which base does
not yet hold what the overlays have: to them an image between base and top that lacks a name
which base has taken over is a gap.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from chainmerge.chain.errors import ImageReplaced
from chainmerge.chain.reading import open_for_writing
from chainmerge.engines.metadata.leaks import everywhere_but, reclaim_leaks
from chainmerge.errors import ChainmergeError
from chainmerge.merging.concluding import settle_to_the_end
from chainmerge.merging.deleting import give_back
from chainmerge.merging.journal import asked_of
from chainmerge.merging.live_remains import forget_live_pull, restore_bitmaps, took_effect
from chainmerge.merging.reporting import verified_before
from chainmerge.merging.settling import SettleSteps
from chainmerge.merging.tombstones import drop_tombstones
from chainmerge.merging.verifying import verify_metadata
from chainmerge.planning.errors import CannotTakeAway
from chainmerge.planning.leaks import from_note
from chainmerge.planning.removals import belongings_of, going_with
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.identity import identify, same_image, this_boot
from chainmerge.records.live_journal import LiveJournal
from chainmerge.records.merge_journal import (
    Journal,
    JournalState,
    MergeJournalDamaged,
    first_sector_of,
    forget_journal,
    journalled,
    load_journal,
)
from chainmerge.records.merged_record import record_merged, written_again
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.storage.other_hosts import held_by_this_host
from chainmerge.storage.removal import removal_obstacle

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.documents.merge import MergeReport
    from chainmerge.merging.job import Request
    from chainmerge.records.identity import ImageIdentity
    from chainmerge.records.merged_record import MergedRecord
    from chainmerge.records.remains import Remains
    from chainmerge.storage.locks import ImageLock


class TookEffectInVm(Struct, frozen=True):
    """A live merge of the active layer is done: since then the guest has written to base."""

    journal: LiveJournal


class HoldsEverything(Struct, frozen=True):
    """Base holds everything, verified; the journal says what is left to settle."""

    journal: Journal


class ToBeMerged(Struct, frozen=True):
    """The merge has to be done, or found to be done, by looking at the images.

    ``warnings`` are for its report then, and ``end_before`` is what the volume of a raw base had,
    in bytes, before that merge may have extended it.
    """

    warnings: tuple[str, ...] = ()
    end_before: int | None = None


def find_ending(
    request: Request, target: Target, opened: OpenChain, remains: Remains
) -> TookEffectInVm | HoldsEverything | ToBeMerged:
    """What is left to do, as far as the records of earlier runs can say.

    All images are locked by the caller. A journal that is of no use here is left where it is,
    for the merge to replace: it says which leaked clusters are those of an earlier run.

    Raises LivePivotUnclear, LeftoverInUse, and what opening and reading a file raises.
    """
    if remains.pivoted is not None and took_effect(request, remains.pivoted, target, opened):
        return TookEffectInVm(remains.pivoted)
    base = target.base.real_path
    if request.options.direction == "pull":
        return ToBeMerged()
    if remains.journal_problem is not None:
        return ToBeMerged((remains.journal_problem.sentence,))
    journal = remains.journal
    if journal is None:
        return ToBeMerged()
    stranger = _stranger(journal, target)
    if stranger is not None:
        words = f"the journal of an interrupted merge into {target.base.path} is not used"
        return ToBeMerged((f"{words}: {stranger}",))
    if is_switched(journal, base) and _is_as_left(journal, request, target):
        return HoldsEverything(journal)
    return ToBeMerged(end_before=journal.volume_size or None)


def is_switched(journal: Journal, base: Path) -> bool:
    """Whether *base*, which is the journal's, begins as the new image does.

    Raises what opening and reading a file raises.
    """
    return bool(journal.first_sector) and journal.first_sector == first_sector_of(base)


def _stranger(journal: Journal, target: Target) -> str | None:
    """Which image is not the one that the journal is of, in words."""
    if not same_image(journal.base, identify(target.base.real_path)):
        return "the image there now is another one, or nothing shows that it is the same"
    known = [one.identity for one in journal.overlays]
    for image in target.chain.images[target.base_index + 1 :]:
        if not _is_one_of(known, image.real_path):
            return f"{image.path} was not part of that merge"
    if not same_image(journal.top, identify(target.chain.top.real_path)):
        return f"it merged {journal.top.path}"
    return None


def _is_one_of(known: Sequence[ImageIdentity], image: Path) -> bool:
    identity = identify(image)
    return any(same_image(one, identity) for one in known)


def _is_as_left(journal: Journal, request: Request, target: Target) -> bool:
    """Whether everything planned still holds: the same request, nothing written, no new users."""
    relatives, top = target.relatives, target.chain.top
    overlays = target.chain.images[target.base_index + 1 :]
    asked = asked_of(request.options)
    complete = len(overlays) == len(journal.overlays)
    repoints_top = any(one.child == str(top.real_path) for one in journal.repoint)
    if (asked.delete, asked.keep_name) != (journal.asked.delete, journal.asked.keep_name):
        return False
    # Top may stand on base directly if that was planned, and not if images are to go.
    if not complete and not (repoints_top and len(overlays) == 1):
        return False
    if not journal.boot or journal.boot != this_boot():
        return False
    marks = {one.identity.path: one.unchanged_since for one in journal.overlays}
    for image in overlays:
        now = journalled(image.real_path)
        if not now.unchanged_since or now.unchanged_since != marks.get(now.identity.path):
            return False
    # Who was found then is planned for. Anybody else has to be judged. Where top stands on base
    # already, the images that were between them are left beside it.
    known = [*journal.children, *(one.identity for one in journal.overlays)]
    for user in (*relatives.children, *relatives.siblings):
        if not _is_one_of(known, user.real_path):
            return False
    if relatives.middle_children:
        return False
    return all(child.virtual_size <= top.virtual_size for child in relatives.children) or (
        top.virtual_size >= target.base.virtual_size
    )


def finish_journalled(
    request: Request, target: Target, journal: Journal, locks: tuple[ImageLock, ...]
) -> MergeReport:
    """Finish a merge of which *journal* says that base holds everything.

    *locks* are held on its images. Raises what settling a merge raises.
    """
    request.begin_to_settle(str(target.base.path))
    base = target.base
    verified = [verified_before(str(target.chain.top.path), str(base.path))]
    if base.header is not None:
        kept = from_note(journal.leaked_before)
        if journal.state in (JournalState.SWITCHING, JournalState.TIDY):
            with open_for_writing(base) as port:
                reclaim_leaks(port, everywhere_but(kept))
        with FileReadable(base.real_path) as readable:
            verified.append(verify_metadata(Qcow2Image(readable), kept))
    steps = msgspec.structs.replace(steps_left(request, target, journal), locks=locks)
    return settle_to_the_end(request, steps, journal, verified)


def require_removable(request: Request, target: Target, journal: Journal) -> None:
    """Raise CannotTakeAway where the end of the merge cannot be had: nothing is begun then."""
    steps = steps_left(request, target, journal)
    images = (*steps.doomed, *((steps.base, steps.top) if steps.keep_name else ()))
    for path in (*(image.real_path for image in images), *steps.going.paths):
        obstacle = removal_obstacle(path)
        if obstacle is not None:
            option = "--delete" if journal.asked.delete else "--keep-name"
            raise CannotTakeAway(str(path), option, obstacle)


def steps_left(request: Request, target: Target, journal: Journal) -> SettleSteps:
    """What the journal has planned, for the images that are there."""
    top, base = target.chain.top, target.base
    overlays = target.chain.images[target.base_index + 1 :]
    # Children that stand on base already are none of top's, and nobody has locked them.
    waiting = {str(child.real_path): str(child.path) for child in target.relatives.children}
    if len(overlays) > 1:
        waiting[str(top.real_path)] = str(top.path)
    planned = set(journal.delete)
    doomed = tuple(image for image in reversed(overlays) if str(image.real_path) in planned)
    asked = journal.asked
    belongings = {
        image.identity: belongings_of(image, target.chain, request.access)
        for image in (base, *overlays)
    }
    unread = (top, *doomed) if asked.keep_name and asked.delete else doomed
    unnamed = (*doomed, base) if asked.keep_name else doomed
    return SettleSteps(
        base=base,
        top=top,
        repoint=tuple(
            msgspec.structs.replace(one, child=waiting[one.child])
            for one in journal.repoint
            if one.child in waiting
        ),
        doomed=doomed,
        keep_name=asked.keep_name,
        above=(*target.relatives.children, top),
        going=going_with(unread, unnamed, belongings),
        spent=journal.spent,
        shrink_to=journal.shrink_to or None,
    )


def finish_recorded(request: Request, record: MergedRecord) -> Iterator[str]:
    """Do what was left to do for a merge whose top is gone; yields warnings.

    Top, or what is left of it, can vouch for nothing any more. So base is only touched as far
    as the journal vouches for it, and what cannot be had is left.
    """
    base, result = record.beside, Path(record.result)
    if record.pulled is not None:
        yield from _give_back_after_pull(request, record)
        return
    try:
        journal = load_journal(base)
    except MergeJournalDamaged as error:
        yield error.sentence
        return
    if journal is None or not same_image(journal.base, record.result_identity):
        return
    try:
        with (
            held_by_this_host([result], request.access),
            lock_image(result, LockMode.WRITER, request.access.lock_wait),
        ):
            if record.result_format == "qcow2" and is_switched(journal, result):
                yield from drop_tombstones(result, journal.spent)
            shrink_to = journal.shrink_to or None
            yield from give_back(result, record.result_format, request.options, shrink_to)
            forget_journal(base)
    except ChainmergeError as error:
        yield f"{error.sentence} (the merge itself is done)"


def _give_back_after_pull(request: Request, record: MergedRecord) -> Iterator[str]:
    """Free what only the old image used; where top is in use by now, that is for repair."""
    top, pulled = Path(record.result), record.pulled
    assert pulled is not None
    try:
        with (
            held_by_this_host([top], request.access),
            lock_image(top, LockMode.WRITER, request.access.lock_wait) as lock,
        ):
            known = written_again(record)
            with WritablePort(top) as port:
                if port.identity != lock.identity:
                    raise ImageReplaced(str(top))
                if pulled.leaked_before is not None:
                    kept = from_note(pulled.leaked_before)
                    reclaim_leaks(port, everywhere_but(kept))
                restore_bitmaps(port, top)
            done = msgspec.structs.replace(pulled, leaked_before=None)
            record_merged(Path(record.top), msgspec.structs.replace(known, pulled=done))
            forget_live_pull(top)
            yield from give_back(top, "qcow2", request.options, None)
    except ChainmergeError as error:
        yield f"{error.sentence} (the merge itself is done)"
