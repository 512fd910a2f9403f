# SPDX-License-Identifier: Apache-2.0
"""Files and volumes that are deleted at the end of a merge, whatever kind of merge it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chainmerge.chain.model import identity_of
from chainmerge.chain.relatives import find_users
from chainmerge.errors import ChainmergeError
from chainmerge.merging.errors import LeftoverInUse
from chainmerge.planning.errors import CannotTakeAway
from chainmerge.planning.placement import left_free
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.changes import is_there, what_stands_at
from chainmerge.records.identity import Sameness
from chainmerge.storage.files import FileReadable, fsync_directory
from chainmerge.storage.locks import LockMode, contentions
from chainmerge.storage.lvm_volumes import find_volume, remove_volume, rename_volume
from chainmerge.storage.removal import removal_obstacle
from chainmerge.storage.volume_facts import VolumeKind
from chainmerge.storage.volumes import volume_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.model import Identity
    from chainmerge.options import Access, MergeOptions
    from chainmerge.records.merged_record import DoomedImage, DoomedLink, MergedRecord
    from chainmerge.storage.volumes import Volume


def require_unused(record: MergedRecord, access: Access, options: MergeOptions) -> None:
    """Make sure that nobody needs by now what *record* says is to be deleted.

    Raises:
        CannotTakeAway: it cannot be deleted.
        LeftoverInUse: an overlay stands on it.
        ImageLocked: somebody has it open.
        Refused: what :func:`chainmerge.chain.relatives.find_users` raises.
    """
    doomed = list(record.delete)
    if options.delete and record.superseded is not None:
        doomed += record.superseded.images
    paths = [Path(one.path) for one in doomed if is_there(one.identity)]
    files = [path for path in paths if not path.is_block_device()]
    for path in (*files, *(Path(link.path) for link in record.links if _is_still_there(link))):
        obstacle = removal_obstacle(path)
        if obstacle is not None:
            raise CannotTakeAway(str(path), "--delete", obstacle)
    require_nobody_needs(record.base, paths, access)


def require_nobody_needs(base: str, doomed: Sequence[Path], access: Access) -> None:
    """Make sure that no image stands on those that are about to go, and that nobody has one open.

    Raises LeftoverInUse, ImageLocked, and what
    :func:`chainmerge.chain.relatives.find_users` raises.
    """
    if not doomed:
        return
    require_no_users(base, doomed, access)
    for refusal in contentions((path, LockMode.WRITER) for path in doomed):
        raise refusal


def require_no_users(base: str, doomed: Sequence[Path], access: Access) -> None:
    """Raise LeftoverInUse where an image outside of *doomed* stands on one of them."""
    users = find_users(doomed, [Path(place) for place in access.search])
    if users:
        raise LeftoverInUse(base, ", ".join(map(str, doomed)), ", ".join(map(str, users)))


def delete_recorded(
    record: MergedRecord, held: frozenset[Identity] = frozenset()
) -> tuple[str, ...]:
    """Delete the images that a record names, each only if it is certainly the same, then the links.

    Before the links, the volume of base gets the name of top's, where the record says so. *held*
    are the files that the caller has had open all the time; volumes that go must not be open.

    Raises OSError, FlushFailed, VolumeNotRemoved, VolumeNotRenamed, and what else lvm leads to.
    """
    deleted = []
    for doomed in record.delete:
        path = Path(doomed.path)
        answer = what_stands_at(path, doomed.identity)
        if doomed.volume is not None:
            # Of one that is not active nobody has looked who needs it by now.
            if answer is Sameness.SAME and remove_volume(doomed.path, doomed.volume):
                deleted.append(doomed.path)
            continue
        is_held = answer is Sameness.UNKNOWN and identity_of(path.stat()) in held
        if answer is Sameness.SAME or is_held:
            path.unlink()
            fsync_directory(path.parent)
            deleted.append(doomed.path)
    _rename_volume(record)
    for link in record.links:
        if _leads_nowhere(link):
            Path(link.path).unlink()
            fsync_directory(Path(link.path).parent)
            deleted.append(link.path)
    return tuple(deleted)


def _rename_volume(record: MergedRecord) -> None:
    """Give base's volume, which is open, the name of top's, where a record says so."""
    volume = record.renames_volume
    if volume is not None:
        rename_volume(record.base, volume, Path(record.result).name)


def _leads_nowhere(link: DoomedLink) -> bool:
    """Whether a link is still the one that was recorded, and what it led to is gone."""
    return _is_still_there(link) and not Path(link.path).exists()


def _is_still_there(link: DoomedLink) -> bool:
    path = Path(link.path)
    return path.is_symlink() and os.readlink(path) == link.text  # noqa: PTH115


def not_deleted(record: MergedRecord) -> Iterator[str]:
    """Images that a record names and that nobody can identify any more, a warning each."""
    for doomed in record.delete:
        if doomed.volume is not None:
            left = find_volume(doomed.path, doomed.volume)
            if left is not None:
                yield (
                    f"{doomed.path} was to be removed, but is not active, or called {left.path} by "
                    "now: it was left"
                )
        elif what_stands_at(doomed.path, doomed.identity) is Sameness.UNKNOWN:
            yield (
                f"{doomed.path} was to be deleted, but nothing shows whether the file there now is "
                "still that image: it was left"
            )


def delete_superseded(record: MergedRecord) -> tuple[str, ...]:
    """Delete what a live merge has left in place, as if its deletion had been requested then."""
    if record.superseded is None:
        return ()
    doomed = deletable(record.superseded.images)
    return delete_recorded(msgspec.structs.replace(record, delete=doomed))


def deletable(images: Sequence[DoomedImage]) -> list[DoomedImage]:
    """Those that can be deleted: files and logical volumes."""
    return [one for one in images if one.volume is not None or not Path(one.path).is_block_device()]


def gives_back(result_format: str, options: MergeOptions) -> bool:
    """Whether space of a merged image of this format is to be given back."""
    return result_format == "qcow2" and (options.shrink or options.discard)


def give_back(
    result: Path, result_format: str, options: MergeOptions, shrink_to: int | None
) -> Iterator[str]:
    """Shrink the volume and discard free space as requested; a failure does not fail the merge.

    Args:
        result: The merged image.
        result_format: Its format.
        options: What was asked for.
        shrink_to: The size that was planned for its volume; None if nobody knows of a plan,
            and a guest may write to it.
    """
    if not gives_back(result_format, options):
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
