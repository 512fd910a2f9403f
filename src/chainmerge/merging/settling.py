# SPDX-License-Identifier: Apache-2.0
"""The end of a merge: children re-pointed, files renamed and deleted, as the plan says.

Each step is atomic and each can be done again, so that a rerun goes on wherever an
interrupted run stopped. What is to be deleted is recorded beforehand
(:mod:`chainmerge.records.merged_record`): afterwards there is nothing to tell from. The
journal, where there is one, is told of each step before it begins.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chainmerge.chain import ImageInfo, find_users, identity_of, open_for_writing
from chainmerge.engines.metadata import change_backing
from chainmerge.errors import ChainmergeError
from chainmerge.merging.job import volume_at
from chainmerge.planning.errors import CannotTakeAway, LeftoverInUse
from chainmerge.planning.plan import (
    MergeFacts,
    Repoint,
    deleted_images,
    going,
    left_free,
    new_backing,
)
from chainmerge.planning.removals import Going
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.changes import data_changed, is_there, stands_on, what_stands_at
from chainmerge.records.errors import LeftoverUnclear
from chainmerge.records.identity import Sameness, identify, same_image
from chainmerge.records.merge_journal import Journal, JournalledRepoint, JournalState, enter
from chainmerge.records.merged_record import (
    DoomedImage,
    DoomedLink,
    LeftInPlace,
    MergedRecord,
    Pulled,
    Superseded,
    forget_merged_record,
    merged_record_file,
    note_deleted,
    record_merged,
)
from chainmerge.records.saved_bitmaps import forget_saved_bitmaps
from chainmerge.storage.files import FileReadable, fsync_directory, read_anew, take_on_access
from chainmerge.storage.locks import LockMode, contentions
from chainmerge.storage.removal import removal_obstacle
from chainmerge.storage.volumes import VolumeKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain import Identity
    from chainmerge.options import Access, MergeOptions
    from chainmerge.records.request import RecordedRequest
    from chainmerge.storage.volumes import Volume


@dataclass(frozen=True, slots=True)
class SettleSteps:
    """What is left to do once base holds everything.

    ``doomed`` are the images to be deleted, in that order, ``going`` what goes after them. With
    ``keep_name`` base takes the name of top. ``above`` are the images that ``repoint`` may name,
    all of them locked.
    """

    base: ImageInfo
    top: ImageInfo
    repoint: tuple[Repoint | JournalledRepoint, ...]
    doomed: tuple[ImageInfo, ...]
    keep_name: bool
    above: tuple[ImageInfo, ...]
    going: Going

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
    warnings: tuple[str, ...] = ()


def settle(steps: SettleSteps, journal: Journal | None, request: RecordedRequest | None) -> Settled:
    """Do all of it. *request* is what was asked for.

    Raises what :func:`chainmerge.engines.metadata.change_backing` raises, OSError, Failed.
    """
    base = steps.base.real_path
    journal = enter(journal, JournalState.REPOINT)
    repointed = repoint(steps.repoint, steps.above)
    journal = enter(journal, JournalState.RECORD)
    record = record_intent(steps, request)
    warnings: tuple[str, ...] = ()
    if steps.keep_name:
        journal = enter(journal, JournalState.RENAME)
        warnings = rename_base(steps)
    deleted: tuple[str, ...] = ()
    if record is not None:
        journal = enter(journal, JournalState.DELETE)
        deleted = delete_recorded(record, held=_identities(steps.doomed))
    # Not before: as long as top stands on images that lack what base has now, a rerun needs
    # to be told that this is no gap.
    forget_saved_bitmaps(base)
    if record is None:
        record_left(steps, request)
    else:
        note_deleted(steps.top.real_path, record)
    return Settled(repointed, deleted, record is not None, journal, warnings)


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


def _identities(images: Sequence[ImageInfo]) -> frozenset[Identity]:
    return frozenset(image.identity for image in images)


def record_intent(steps: SettleSteps, request: RecordedRequest | None) -> MergedRecord | None:
    """Record what is going to be renamed and deleted; None where nothing is."""
    top = steps.top.real_path
    if not (steps.keep_name or steps.doomed):
        # A record of an older merge under this name says nothing about this one.
        forget_merged_record(top)
        return None
    record = _record_of(steps, request)
    record_merged(top, record)
    return record


def record_left(steps: SettleSteps, request: RecordedRequest | None) -> None:
    """Record that top stays, and that all of it is in base: who merges it again may be wrong.

    Where there is no place for that a rerun looks at the images, as ever; of a block device
    nothing would tell whether it was written to since.
    """
    top, base = steps.top.real_path, steps.base.real_path
    if steps.top.is_block_device:
        return
    left = LeftInPlace(identify(top), data_changed(top), data_changed(base))
    with contextlib.suppress(ChainmergeError):
        record_merged(top, msgspec.structs.replace(_record_of(steps, request), left=left))


def _record_of(steps: SettleSteps, request: RecordedRequest | None) -> MergedRecord:
    return MergedRecord(
        top=str(steps.top.real_path),
        base=str(steps.base.real_path),
        result=str(steps.result),
        result_format=steps.base.format,
        result_identity=identify(steps.base.real_path),
        keep_name=steps.keep_name,
        delete=_doomed(steps.doomed, steps.going),
        links=_links(steps.going),
        request=request,
    )


def record_pull(
    facts: MergeFacts,
    options: MergeOptions,
    leaked_before: list[tuple[int, int]] | None,
    request: RecordedRequest | None,
) -> None:
    """Record a pull, and which clusters of top were leaked before it.

    Before it writes anything; once more, without the clusters, when nothing of it is leaked.
    """
    named = new_backing(facts)
    backing = None if named is None else named[0]
    top = facts.top.real_path
    onto = None if backing is None else identify(facts.chain.images[facts.base_index - 1].real_path)
    goes = going(facts, options)
    record = MergedRecord(
        top=str(top),
        base=str(facts.base.real_path),
        result=str(top),
        result_format=facts.top.format,
        result_identity=identify(top),
        keep_name=False,
        delete=_doomed(deleted_images(facts, options), goes),
        pulled=Pulled(backing, onto, leaked_before, identify(facts.base.real_path)),
        links=_links(goes),
        request=request,
    )
    record_merged(top, record)


def _doomed(images: Sequence[ImageInfo], goes: Going) -> list[DoomedImage]:
    files = (*(image.real_path for image in images), *goes.data_files)
    return [DoomedImage(str(file), identify(file)) for file in files]


def _links(goes: Going) -> list[DoomedLink]:
    return [
        DoomedLink(str(link), os.readlink(link), os.path.realpath(link))  # noqa: PTH115
        for link in goes.links
    ]


def rename_base(steps: SettleSteps) -> tuple[str, ...]:
    """Give base the name of top, whose file this deletes, with who may use top's file.

    A backing name in base that counts from base's directory is first changed to count from
    anywhere. Returns warnings.
    """
    base, top = steps.base, steps.top
    target = top.real_path
    # The result is reached by the names that top had, of which a relative one counts from each.
    names = [
        target,
        top.path,
        *(one.backing for one in steps.above if one.backing and one.identity != top.identity),
    ]
    places = {os.path.realpath(name.parent) for name in names}
    stays = places == {os.path.realpath(base.path.parent)}
    if base.backing is not None and base.backing_name and not stays:
        stored = base.backing_name.removeprefix("file:")
        if not stored.startswith("/"):
            header = base.header
            assert header is not None
            with open_for_writing(base) as port:
                change_backing(port, str(base.backing.resolve()), header.backing_format)
    with open_for_writing(base) as port:
        lacking = take_on_access(port, target)
    base.real_path.rename(target)
    fsync_directory(target.parent)
    if target.parent != base.real_path.parent:
        fsync_directory(base.real_path.parent)
    if not lacking:
        return ()
    return (f"{target} has not all that the file it replaced had: {', '.join(lacking)}",)


def require_unused(record: MergedRecord, access: Access, options: MergeOptions) -> None:
    """Make sure that nobody has come to need what *record* says is to be deleted.

    Raises:
        CannotTakeAway: it cannot be deleted.
        LeftoverInUse: an overlay stands on it.
        ImageLocked: somebody has it open.
        Refused: what :func:`chainmerge.chain.find_users` raises.
    """
    doomed = list(record.delete)
    if options.delete and record.superseded is not None:
        doomed += record.superseded.images
    paths = [Path(one.path) for one in doomed if is_there(one.identity)]
    for path in (*paths, *(Path(link.path) for link in record.links if _is_still_there(link))):
        obstacle = removal_obstacle(path)
        if obstacle is not None:
            raise CannotTakeAway(str(path), "--delete", obstacle)
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


def delete_recorded(
    record: MergedRecord, held: frozenset[Identity] = frozenset()
) -> tuple[str, ...]:
    """Delete the files that a record names, each only if it is certainly the same, then the links.

    *held* are those that the caller has had open all the time.
    """
    deleted = []
    for doomed in record.delete:
        path = Path(doomed.path)
        answer = what_stands_at(path, doomed.identity)
        is_held = answer is Sameness.UNKNOWN and identity_of(path.stat()) in held
        if answer is Sameness.SAME or is_held:
            path.unlink()
            fsync_directory(path.parent)
            deleted.append(doomed.path)
    for link in record.links:
        if _leads_nowhere(link):
            Path(link.path).unlink()
            fsync_directory(Path(link.path).parent)
            deleted.append(link.path)
    return tuple(deleted)


def _leads_nowhere(link: DoomedLink) -> bool:
    """Whether a link is still the one that was recorded, and what it led to is gone."""
    return _is_still_there(link) and not Path(link.path).exists()


def _is_still_there(link: DoomedLink) -> bool:
    path = Path(link.path)
    return path.is_symlink() and os.readlink(path) == link.text  # noqa: PTH115


def not_deleted(record: MergedRecord) -> Iterator[str]:
    """What a record names and nobody can tell whether it is still that image, a warning each."""
    for doomed in record.delete:
        if what_stands_at(doomed.path, doomed.identity) is Sameness.UNKNOWN:
            yield (
                f"{doomed.path} was to be deleted, and nothing tells whether what stands there "
                "now is still that image: it is left"
            )


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

    Raises:
        LeftoverUnclear: nothing tells whether the result is still the image that it was.
    """
    if record is None:
        return False
    if record.pulled is not None and not _may_pull(options):
        return False
    if base is not None and not record.names_base(base):
        return False
    result = what_stands_at(record.result, record.result_identity)
    if result is Sameness.OTHER:
        return False
    if record.pulled is not None:
        read_anew(record.result)
        if not is_pulled(record, record.pulled, top):
            return False
    elif record.superseded is None and not record.keep_name and top.exists():
        return False
    if result is Sameness.UNKNOWN:
        file = str(merged_record_file(top))
        raise LeftoverUnclear(file, record.result, "no image is changed by that")
    if record.pulled is not None:
        return True
    if record.superseded is not None:
        in_base = active is not None and os.path.realpath(active) == record.base
        return _is_superseded(record.superseded, top, in_base=in_base)
    return True


def is_pulled(record: MergedRecord, pulled: Pulled, top: Path) -> bool:
    """Whether *top*, as it is reached, stands on what it stands on once the pull is done.

    Raises what opening and reading an image raises.
    """
    if not stands_on(top, pulled.backing):
        return False
    if pulled.onto is None or pulled.backing is None:
        return True
    if any(is_there(one.identity) for one in record.delete):
        # It has not come to its end, so that this is no later pull.
        return True
    backing = top.parent / pulled.backing.removeprefix("file:")
    return not backing.exists() or what_stands_at(backing, pulled.onto) is not Sameness.OTHER


def _is_superseded(superseded: Superseded, top: Path, *, in_base: bool) -> bool:
    """Whether *top* is what a live merge has left, or nothing is left of it.

    *in_base* says that the guest writes to base. Only that tells of a block device: it may have
    become another overlay in the meantime, of which nothing is merged.
    """
    try:
        is_left = same_image(identify(top), superseded.images[0].identity)
    except (OSError, ValueError):
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


def give_back(
    result: Path, result_format: str, options: MergeOptions, shrink_to: int | None
) -> Iterator[str]:
    """Shrink the volume and discard what is free, as asked; a failure is no reason to fail.

    Args:
        result: The merged image.
        result_format: Its format.
        options: What was asked for.
        shrink_to: The size that was planned for its volume; None where nobody knows of a plan,
            and a guest may write to it.
    """
    if result_format != "qcow2" or not (options.shrink or options.discard):
        return
    volume = volume_at(result, options)
    with FileReadable(result) as readable:
        end = check(Qcow2Image(readable)).image_end_offset
    try:
        if options.shrink:
            volume.shrink_to(max(end, _kept(volume, end, options, shrink_to)))
        if options.discard and volume.size > end:
            volume.discard(end, volume.size - end)
    except ChainmergeError as error:
        yield f"{error.sentence} (the merge itself is done)"


def _kept(volume: Volume, end: int, options: MergeOptions, shrink_to: int | None) -> int:
    if volume.kind is not VolumeKind.LVM:
        return end
    return end + left_free(options, is_leaf=True) if shrink_to is None else shrink_to
