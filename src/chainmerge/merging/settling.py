# SPDX-License-Identifier: Apache-2.0
"""The end of a merge: children re-pointed, files renamed and deleted, as the plan says.

Each step is atomic and each can be done again, so that a rerun continues wherever an interrupted
run stopped. What is to be deleted is recorded beforehand (:mod:`chainmerge.records.merged_record`):
afterwards there is nothing to tell from. The journal, where there is one, is told of each step
before it begins, but not of those in which there is nothing to do: each takes two flushes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from chainmerge.chain.model import ImageInfo, identity_of
from chainmerge.chain.reading import open_for_writing
from chainmerge.documents.plan import Repoint
from chainmerge.engines.metadata.backing import change_backing
from chainmerge.errors import ChainmergeError
from chainmerge.merging.deleting import delete_recorded
from chainmerge.planning.aftermath import deleted_images, going, new_backing
from chainmerge.planning.removals import Going
from chainmerge.records.changes import data_changed
from chainmerge.records.identity import identify
from chainmerge.records.merge_journal import Journal, JournalledRepoint, JournalState, enter_state
from chainmerge.records.merged_record import (
    DoomedImage,
    DoomedLink,
    LeftInPlace,
    MergedRecord,
    Pulled,
    forget_merged_record,
    latest_data_written_ns,
    note_deleted,
    record_merged,
)
from chainmerge.records.saved_bitmaps import forget_saved_bitmaps
from chainmerge.storage.files import fsync_directory, take_on_access
from chainmerge.storage.locks import ImageLock
from chainmerge.storage.lvm_volumes import lasting_path

if TYPE_CHECKING:
    from chainmerge.chain.model import Identity
    from chainmerge.options import MergeOptions
    from chainmerge.planning.facts import MergeFacts
    from chainmerge.records.request import RecordedRequest


class SettleSteps(Struct, frozen=True):
    """What is left to do once base holds everything.

    ``doomed`` are the images to be deleted, in that order, ``going`` what goes after them. With
    ``keep_name`` base takes the name of top. ``above`` are the images that ``repoint`` may name,
    all of them locked. ``spent`` are the names of tombstones that only top needs, ``shrink_to`` is
    the size that was planned for the volume of the result, if any. ``locks`` are those that the
    caller holds on the images: a volume that is open cannot be removed.
    """

    base: ImageInfo
    top: ImageInfo
    repoint: tuple[Repoint | JournalledRepoint, ...]
    doomed: tuple[ImageInfo, ...]
    keep_name: bool
    above: tuple[ImageInfo, ...]
    going: Going
    spent: Collection[str]
    shrink_to: int | None
    locks: tuple[ImageLock, ...] = ()

    @property
    def result(self) -> Path:
        """Where the merged image is in the end. A volume has its node under any name."""
        renames_file = self.keep_name and not self.base.is_block_device
        return self.top.real_path if renames_file else self.base.real_path

    @property
    def removed(self) -> tuple[ImageInfo, ...]:
        """The images that are removed as such: a file that base takes the place of is not."""
        if self.keep_name and self.base.is_block_device:
            return (self.top, *self.doomed)
        return self.doomed


class SettledMerge(Struct, frozen=True):
    """What was done of it. ``top_is_gone`` says whether nothing opens top any more."""

    repointed: tuple[str, ...]
    deleted: tuple[str, ...]
    top_is_gone: bool
    journal: Journal | None
    warnings: tuple[str, ...] = ()


def settle(
    steps: SettleSteps, journal: Journal | None, request: RecordedRequest | None
) -> SettledMerge:
    """Do all of it. *request* is what was asked for.

    Raises what :func:`chainmerge.engines.metadata.backing.change_backing` raises, OSError, Failed.
    """
    base = steps.base.real_path
    repointed: tuple[str, ...] = ()
    if steps.repoint:
        journal = enter_state(journal, JournalState.REPOINT)
        repointed = repoint(steps.repoint, steps.above)
        journal = enter_state(journal, JournalState.RECORD)
    record = record_intent(steps, request)
    warnings: tuple[str, ...] = ()
    if steps.keep_name:
        journal = enter_state(journal, JournalState.RENAME)
        keep_backing_reachable(steps)
        if not steps.base.is_block_device:
            warnings = rename_base(steps)
    deleted: tuple[str, ...] = ()
    if record is not None:
        journal = enter_state(journal, JournalState.DELETE)
        release_volumes(steps.removed, steps.locks)
        deleted = delete_recorded(record, held=_identities(steps.doomed))
    # Not before: as long as top stands on images that lack what base has now, a rerun needs
    # to be told that this is not a gap.
    forget_saved_bitmaps(base)
    if record is None:
        record_left(steps, request)
    else:
        note_deleted(steps.top.real_path, record)
    return SettledMerge(repointed, deleted, record is not None, journal, warnings)


def repoint(
    repoints: Sequence[Repoint | JournalledRepoint], above: Sequence[ImageInfo]
) -> tuple[str, ...]:
    """Give images another backing file; returns their paths.

    Raises what :func:`chainmerge.engines.metadata.backing.change_backing` raises, ImageReplaced.
    """
    by_path = {str(image.path): image for image in above}
    for change in repoints:
        with open_for_writing(by_path[change.child]) as port:
            change_backing(port, change.new_backing, change.new_format)
    return tuple(change.child for change in repoints)


def _identities(images: Sequence[ImageInfo]) -> frozenset[Identity]:
    return frozenset(image.identity for image in images)


def release_volumes(images: Collection[ImageInfo], locks: Sequence[ImageLock]) -> None:
    """Let go of those images that are volumes: none that is open can be removed."""
    volumes = {image.identity for image in images if image.is_block_device}
    for lock in locks:
        if lock.fileno() >= 0 and identity_of(os.fstat(lock.fileno())) in volumes:
            lock.release()


def record_intent(steps: SettleSteps, request: RecordedRequest | None) -> MergedRecord | None:
    """Record what is going to be renamed and deleted; None if nothing is."""
    top = steps.top.real_path
    if not (steps.keep_name or steps.doomed):
        # A record of an older merge under this name says nothing about this one.
        forget_merged_record(top)
        return None
    record = _record_of(steps, request)
    if record.renames_volume is not None:
        # What is recorded of base as the top of an older merge would hide this.
        forget_merged_record(steps.base.real_path)
    record_merged(top, record)
    return record


def record_left(steps: SettleSteps, request: RecordedRequest | None) -> None:
    """Record that top stays, and that all of it is in base: who merges it again may be wrong.

    If that cannot be recorded, a rerun looks at the images, as always; of a block device
    nothing would tell whether it was written to since.
    """
    top, base = steps.top.real_path, steps.base.real_path
    if steps.top.is_block_device:
        return
    left = LeftInPlace(identify(top), data_changed(top), data_changed(base))
    with contextlib.suppress(ChainmergeError):
        record_merged(top, msgspec.structs.replace(_record_of(steps, request), left=left))


def _record_of(steps: SettleSteps, request: RecordedRequest | None) -> MergedRecord:
    top, base = steps.top.real_path, steps.base.real_path
    if steps.removed:
        top, base = lasting_path(top), lasting_path(base)
    return MergedRecord(
        top=str(top),
        base=str(base),
        result=str(top if steps.keep_name else base),
        result_format=steps.base.format,
        result_identity=identify(steps.base.real_path),
        keep_name=steps.keep_name,
        delete=_doomed(steps.removed, steps.going),
        links=_links(steps.going),
        request=request,
        # Of base only this merge tells by now when it was written.
        data_written_ns=latest_data_written_ns(
            image.real_path for image in (steps.top, *steps.doomed)
        ),
    )


def record_pull(
    facts: MergeFacts,
    options: MergeOptions,
    leaked_before: list[tuple[int, int]] | None,
    request: RecordedRequest | None,
    written_ns: int | None,
) -> None:
    """Record a pull, which clusters of top were leaked before it, and how old the data was.

    Before it writes anything; once more, without the clusters, when nothing of it is leaked.
    """
    named = new_backing(facts)
    backing = None if named is None else named[0]
    top = facts.top.real_path
    onto = None if backing is None else identify(facts.chain.images[facts.base_index - 1].real_path)
    goes = going(facts, options)
    record = MergedRecord(
        top=str(top),
        # Of a volume that is gone only this name is known.
        base=str(lasting_path(facts.base.real_path)),
        result=str(top),
        result_format=facts.top.format,
        result_identity=identify(top),
        keep_name=False,
        delete=_doomed(deleted_images(facts, options), goes),
        pulled=Pulled(backing, onto, leaked_before, identify(facts.base.real_path)),
        links=_links(goes),
        request=request,
        data_written_ns=written_ns,
    )
    record_merged(top, record)


def _doomed(images: Sequence[ImageInfo], goes: Going) -> list[DoomedImage]:
    files = (*(image.real_path for image in images), *goes.data_files)
    return [DoomedImage(str(lasting_path(file)), identify(file)) for file in files]


def _links(goes: Going) -> list[DoomedLink]:
    return [
        DoomedLink(
            str(link),
            os.readlink(link),  # noqa: PTH115
            str(lasting_path(Path(os.path.realpath(link)))),
        )
        for link in goes.links
    ]


def keep_backing_reachable(steps: SettleSteps) -> None:
    """Change a backing name in base that counts from base's directory to count from anywhere.

    Where base will be reached from the same directory, it stays as it is; and that of a volume
    wherever it leads to the same place from each: links elsewhere can have the volumes' names.
    """
    base, top = steps.base, steps.top
    # The result is reached by the names that top had, of which a relative one counts from each.
    names = [
        # The node of a volume is nobody's name for it.
        *(() if top.is_block_device else (top.real_path,)),
        top.path,
        *(one.backing for one in steps.above if one.backing and one.identity != top.identity),
    ]
    places = {os.path.realpath(name.parent) for name in names}
    if base.backing is not None and base.backing_name:
        stored = base.backing_name.removeprefix("file:")
        stays = places == {os.path.realpath(base.path.parent)}
        if base.is_block_device:
            leads_to = {os.path.realpath(os.path.join(place, stored)) for place in places}  # noqa: PTH118
            stays = leads_to == {os.path.realpath(base.backing)}
        if not (stays or stored.startswith("/")):
            header = base.header
            assert header is not None
            with open_for_writing(base) as port:
                backing = lasting_path(base.backing.resolve())
                change_backing(port, str(backing), header.backing_format)


def rename_base(steps: SettleSteps) -> tuple[str, ...]:
    """Give base the name of top, whose file this deletes, with who may use top's file.

    Returns warnings.
    """
    base, target = steps.base, steps.top.real_path
    with open_for_writing(base) as port:
        lacking = take_on_access(port, target)
    base.real_path.rename(target)
    fsync_directory(target.parent)
    if target.parent != base.real_path.parent:
        fsync_directory(base.real_path.parent)
    if not lacking:
        return ()
    return (f"{target} lacks some of what the file it replaced had: {', '.join(lacking)}",)
