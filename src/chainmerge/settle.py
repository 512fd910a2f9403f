# SPDX-License-Identifier: Apache-2.0
"""The end of a merge: children re-pointed, files renamed and deleted, as the plan says.

Each step is atomic and each can be done again, so that a rerun goes on wherever an
interrupted run stopped. What is to be deleted is recorded beforehand
(:mod:`chainmerge.records.merged_record`): afterwards there is nothing to tell from. The
journal, where there is one, is told of each step before it begins.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chainmerge.chain import ImageInfo, find_users, open_for_writing
from chainmerge.engines.metadata import change_backing
from chainmerge.errors import ChainmergeError
from chainmerge.merge_job import volume_at
from chainmerge.plan_errors import LeftoverInUse
from chainmerge.planning import MergeFacts, MergePlan, Repoint, new_backing
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.identity import identify, same_image
from chainmerge.records.live_journal import data_changed
from chainmerge.records.merge_journal import Journal, JournalledRepoint, JournalState, enter
from chainmerge.records.merged_record import (
    DoomedImage,
    MergedRecord,
    Pulled,
    Superseded,
    forget_merged_record,
    record_merged,
)
from chainmerge.records.saved_bitmaps import forget_saved_bitmaps
from chainmerge.storage.files import FileReadable, fsync_directory, read_anew, take_on_access
from chainmerge.storage.locks import LockMode, contentions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.options import Access, MergeOptions


@dataclass(frozen=True, slots=True)
class SettleSteps:
    """What is left to do once base holds everything.

    ``doomed`` are the images to be deleted, in that order. With ``keep_name`` base takes the
    name of top. ``above`` are the images that ``repoint`` may name, all of them locked.
    """

    base: ImageInfo
    top: ImageInfo
    repoint: tuple[Repoint | JournalledRepoint, ...]
    doomed: tuple[ImageInfo, ...]
    keep_name: bool
    above: tuple[ImageInfo, ...]

    @property
    def result(self) -> Path:
        """Where the merged image is in the end."""
        return self.top.real_path if self.keep_name else self.base.real_path


@dataclass(frozen=True, slots=True)
class Settled:
    """What was done of it. ``top_is_gone`` says whether nothing opens top any more."""

    repointed: tuple[str, ...]
    deleted: tuple[str, ...]
    top_is_gone: bool
    journal: Journal | None


def settle(steps: SettleSteps, journal: Journal | None) -> Settled:
    """Do all of it.

    Raises what :func:`chainmerge.engines.metadata.change_backing` raises, OSError, Failed.
    """
    base = steps.base.real_path
    journal = enter(journal, JournalState.REPOINT)
    repointed = repoint(steps.repoint, steps.above)
    journal = enter(journal, JournalState.RECORD)
    record = record_intent(steps)
    if steps.keep_name:
        journal = enter(journal, JournalState.RENAME)
        rename_base(steps.base, steps.top)
    deleted: tuple[str, ...] = ()
    if record is not None:
        journal = enter(journal, JournalState.DELETE)
        deleted = delete_recorded(record)
    # Not before: as long as top stands on images that lack what base has now, a rerun needs
    # to be told that this is no gap.
    forget_saved_bitmaps(base)
    return Settled(repointed, deleted, record is not None, journal)


def repoint(
    repoints: Sequence[Repoint | JournalledRepoint], above: Sequence[ImageInfo]
) -> tuple[str, ...]:
    """Give images another backing file; returns their paths.

    Raises what :func:`chainmerge.engines.metadata.change_backing` raises, ImageReplaced.
    """
    by_path = {str(image.path): image for image in above}
    for change in repoints:
        with open_for_writing(by_path[change.child]) as port:
            change_backing(port, change.new_backing, change.new_format)
    return tuple(change.child for change in repoints)


def record_intent(steps: SettleSteps) -> MergedRecord | None:
    """Record what is going to be renamed and deleted; None where nothing is."""
    top = steps.top.real_path
    if not (steps.keep_name or steps.doomed):
        # A record of an older merge under this name says nothing about this one.
        forget_merged_record(top)
        return None
    record = MergedRecord(
        top=str(top),
        base=str(steps.base.real_path),
        result=str(steps.result),
        result_format=steps.base.format,
        result_identity=identify(steps.base.real_path),
        keep_name=steps.keep_name,
        delete=[_doomed(image) for image in steps.doomed],
    )
    record_merged(top, record)
    return record


def record_pull(
    facts: MergeFacts, plan: MergePlan, leaked_before: list[tuple[int, int]] | None
) -> None:
    """Record a pull, and which clusters of top were leaked before it.

    Before it writes anything; once more, without the clusters, when nothing of it is leaked.
    """
    named = new_backing(facts)
    top = facts.top.real_path
    by_path = {str(image.path): image for image in facts.merged_images}
    record = MergedRecord(
        top=str(top),
        base=str(facts.base.real_path),
        result=str(top),
        result_format=facts.top.format,
        result_identity=identify(top),
        keep_name=False,
        delete=[_doomed(by_path[path]) for path in plan.delete],
        pulled=Pulled(None if named is None else named[0], leaked_before),
    )
    record_merged(top, record)


def _doomed(image: ImageInfo) -> DoomedImage:
    return DoomedImage(str(image.real_path), identify(image.real_path))


def rename_base(base: ImageInfo, top: ImageInfo) -> None:
    """Give base the name of top, whose file this deletes, with top's owner and permissions.

    A backing name in base that counts from base's directory is first changed to count from
    top's.
    """
    target = top.real_path
    if base.backing is not None and base.backing_name and base.path.parent != target.parent:
        stored = base.backing_name.removeprefix("file:")
        if not stored.startswith("/"):
            header = base.header
            assert header is not None
            with open_for_writing(base) as port:
                change_backing(port, str(base.backing.resolve()), header.backing_format)
    with open_for_writing(base) as port:
        take_on_access(port, target)
    base.real_path.rename(target)
    fsync_directory(target.parent)
    if target.parent != base.real_path.parent:
        fsync_directory(base.real_path.parent)


def require_unused(record: MergedRecord, access: Access, options: MergeOptions) -> None:
    """Make sure that nobody has come to need what *record* says is to be deleted.

    Raises:
        LeftoverInUse: an overlay stands on it.
        ImageLocked: somebody has it open.
        Refused: what :func:`chainmerge.chain.find_users` raises.
    """
    doomed = list(record.delete)
    if options.delete and record.superseded is not None:
        doomed += record.superseded.images
    paths = [Path(one.path) for one in doomed if _is_still(one)]
    if not paths:
        return
    require_no_users(record.base, paths, access)
    for refusal in contentions((path, LockMode.WRITER) for path in paths):
        raise refusal


def require_no_users(base: str, doomed: Sequence[Path], access: Access) -> None:
    """Raise LeftoverInUse where an image outside of *doomed* stands on one of them."""
    users = find_users(doomed, [Path(place) for place in access.search])
    if users:
        raise LeftoverInUse(base, ", ".join(map(str, doomed)), ", ".join(map(str, users)))


def _is_still(doomed: DoomedImage) -> bool:
    try:
        return same_image(identify(Path(doomed.path)), doomed.identity)
    except FileNotFoundError:
        return False


def delete_recorded(record: MergedRecord) -> tuple[str, ...]:
    """Delete the images that a record names, each only if it is still the same file."""
    deleted = []
    for doomed in record.delete:
        if _is_still(doomed):
            path = Path(doomed.path)
            path.unlink()
            fsync_directory(path.parent)
            deleted.append(doomed.path)
    return tuple(deleted)


def finished_before(
    record: MergedRecord | None,
    top: Path,
    base: Path | None,
    options: MergeOptions,
    active: str | None,
) -> bool:
    """Whether *record* says that the merge which is asked for was done, but for deletions.

    Args:
        record: what was recorded under top's name.
        top: as it was asked for, and so are *base* and *options*.
        base: see there.
        options: see there.
        active: what the guest is said to write to; None if nobody has said.
    """
    if record is None:
        return False
    if record.pulled is not None and not _may_pull(options):
        return False
    if base is not None and os.path.realpath(base) != record.base:
        return False
    try:
        if not same_image(identify(Path(record.result)), record.result_identity):
            return False
    except FileNotFoundError:
        return False
    if record.pulled is not None:
        read_anew(record.result)
        return stands_on(Path(record.result), record.pulled.backing)
    if record.superseded is not None:
        in_base = active is not None and os.path.realpath(active) == record.base
        return _is_superseded(record.superseded, top, in_base=in_base)
    if record.keep_name:
        return True
    return not top.exists()


def _is_superseded(superseded: Superseded, top: Path, *, in_base: bool) -> bool:
    """Whether *top* is what a live merge has left, or nothing is left of it.

    *in_base* says that the guest writes to base. Only that tells of a block device: it may have
    become another overlay in the meantime, of which nothing is merged.
    """
    try:
        is_left = same_image(identify(top), superseded.images[0].identity)
    except OSError:
        return True
    if not superseded.since:
        return is_left and in_base
    return is_left and superseded.since == data_changed(top)


def delete_superseded(record: MergedRecord) -> tuple[str, ...]:
    """Delete what a live merge has left in place, as if that had been asked for then."""
    if record.superseded is None:
        return ()
    devices = {one.path for one in record.superseded.images if Path(one.path).is_block_device()}
    doomed = [one for one in record.superseded.images if one.path not in devices]
    return delete_recorded(msgspec.structs.replace(record, delete=doomed))


def _may_pull(options: MergeOptions) -> bool:
    return options.direction == "pull" or (options.direction == "auto" and options.keep_name)


def stands_on(image: Path, backing: str | None) -> bool:
    """Whether the image's header names *backing* as its backing file."""
    with FileReadable(image) as readable:
        return Qcow2Image(readable).header.backing_name == backing


def give_back(result: Path, result_format: str, options: MergeOptions) -> Iterator[str]:
    """Shrink the volume and discard what is free, as asked; a failure is no reason to fail."""
    if result_format != "qcow2" or not (options.shrink or options.discard):
        return
    volume = volume_at(result, options)
    with FileReadable(result) as readable:
        end = check(Qcow2Image(readable)).image_end_offset
    try:
        if options.shrink:
            volume.shrink_to(end)
        if options.discard and volume.size > end:
            volume.discard(end, volume.size - end)
    except ChainmergeError as error:
        yield f"{error.sentence} (the merge itself is done)"
