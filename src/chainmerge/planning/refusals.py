# SPDX-License-Identifier: Apache-2.0
"""Every reason not to merge, found in the facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.bitmaps.rules import BitmapState, Fate
from chainmerge.chain.errors import ImageCorrupt, ImageDamaged, ImageDirty
from chainmerge.chain.unseen_users import inactive_users, unseen_users
from chainmerge.documents.plan import EngineName
from chainmerge.options import Direction, Placement
from chainmerge.planning.aftermath import (
    changed_images,
    changed_snapshots,
    deleted_images,
    going,
    planned_rename,
    removed_images,
)
from chainmerge.planning.errors import (
    BaseCannotHoldBitmaps,
    BaseHasOtherChildren,
    BaseNamedByOthers,
    BaseNewer,
    CannotDeleteVolume,
    CannotRename,
    CannotRenameVolume,
    CannotTakeAway,
    CheckpointOfOthers,
    ChildSeesMore,
    DataFileOutOfReach,
    DoomedInUse,
    MiddleHasOtherChildren,
    PlacementUnavailable,
    RelativeUnknown,
    SnapshotsOfVmWouldChange,
    SnapshotsWouldChange,
    SnapshotsWouldGo,
    UnguardedBitmaps,
)
from chainmerge.planning.placement import allocated_bytes, required_bytes
from chainmerge.planning.wording import first_few, local_time, names_of, quoted
from chainmerge.records.files import StateDirectoryUnusable
from chainmerge.storage.volume_errors import CannotGrow, RawDeviceTooSmall
from chainmerge.storage.volume_facts import VolumeKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.model import ImageInfo
    from chainmerge.errors import ChainmergeError
    from chainmerge.options import MergeOptions
    from chainmerge.planning.facts import MergeFacts


def find_refusals(facts: MergeFacts, options: MergeOptions) -> tuple[ChainmergeError, ...]:
    """Every reason not to start, the most fundamental first."""
    return (
        *facts.obstacles,
        *newer_base(facts, options),
        *_damage(facts),
        *_others_unknown(facts, options),
        *_others_at_risk(facts),
        *_bitmap_refusals(facts, options),
        *_snapshot_refusals(facts, options),
        *_settle_refusals(facts, options),
        *_others_unseen(facts, options),
        *_space_refusals(facts, options),
    )


def newer_base(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    """What would destroy the newer of two images."""
    evidence = facts.evidence
    if evidence is None or options.despite_newer_base or not evidence.speaks_for_base:
        return
    # A pull leaves base as it is, unless it is to be deleted.
    if facts.direction is Direction.PULL and facts.base not in removed_images(facts, options):
        return
    yield BaseNewer(
        str(facts.base.path),
        str(facts.top.path),
        evidence.held,
        evidence.held + evidence.differing,
        local_time(evidence.times[0].written),
        local_time(max(one.written or 0 for one in evidence.times[1:])),
    )


def _damage(facts: MergeFacts) -> Iterator[ChainmergeError]:
    header, path = facts.result.header, str(facts.result.path)
    if header is None:
        return
    if header.corrupt:
        yield ImageCorrupt(path)
    elif header.dirty and not facts.guest_writes:
        yield ImageDirty(path)
    elif facts.result_check is not None and not facts.result_check.sound:
        first = next(iter(facts.result_check.messages), "see chainmerge check")
        damage = facts.result_check.corruptions + facts.result_check.overlaps
        yield ImageDamaged(path, damage, first)


def _others_unknown(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    """What may be a sibling or a child, and would be destroyed if it was."""
    if facts.direction is Direction.PULL and not options.delete:
        return
    for path, reason in facts.relatives.unreadable:
        if path in facts.relatives.unknown:
            yield RelativeUnknown(str(path), str(facts.base.path), str(facts.top.path), reason)


def _others_unseen(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    """Users that may exist where nobody has looked."""
    changed = changed_images(facts, options)
    if facts.merged and planned_rename(facts, options) is None:
        # Base does not change any more. Children that are not seen would still lose top.
        yield from inactive_users(changed, facts.top, facts.relatives)
        return
    yield from unseen_users(changed, facts.top, facts.relatives, _without_change(facts))


def _without_change(facts: MergeFacts) -> str:
    """How to do without a change of base, as the beginning of a hint."""
    if facts.direction is Direction.PULL:
        return "leave --delete and --keep-name out: a pull does not need them"
    if facts.pull_obstacle is None:
        return f"pull instead (--direction pull), which leaves {facts.base.path} as it is"
    return f"find out which images use {facts.base.path}"


def _checkpoints_at_risk(facts: MergeFacts) -> Iterator[ChainmergeError]:
    """What base gets or loses is below the checkpoints of its other children too."""
    relatives = facts.relatives
    for decision in facts.decisions:
        name, in_base = decision.name, decision.states[facts.base_index]
        will_be_valid = decision.fate is Fate.KEEP
        will_be_there = will_be_valid or decision.tombstone_while_top_exists
        others: tuple[ImageInfo, ...] = ()
        if in_base is BitmapState.VALID and not will_be_valid:
            others = relatives.branches_with(name)
        elif in_base is BitmapState.ABSENT and will_be_there:
            others = tuple(one for one in relatives.beside if one.has_bitmap(name))
        if others:
            base, top = str(facts.base.path), str(facts.top.path)
            yield CheckpointOfOthers(base, name, top, names_of(others))


def _others_at_risk(facts: MergeFacts) -> Iterator[ChainmergeError]:
    if facts.direction is Direction.PULL:
        return
    base, top, relatives = facts.base, facts.top, facts.relatives
    # With all of top's data in base already, base does not change any more; the others are
    # then children of top that an interrupted run, or the VM in a live merge, has re-pointed.
    if relatives.siblings and not facts.merged:
        if facts.content_merged:
            yield from _checkpoints_at_risk(facts)
        else:
            yield BaseHasOtherChildren(str(base.path), names_of(relatives.siblings))
    if relatives.middle_children:
        yield MiddleHasOtherChildren(
            str(base.path), str(top.path), names_of(relatives.middle_children)
        )
    if top.virtual_size < base.virtual_size:
        for child in relatives.children:
            if child.virtual_size > top.virtual_size:
                yield ChildSeesMore(
                    str(base.path),
                    str(top.path),
                    str(child.path),
                    base.virtual_size,
                    top.virtual_size,
                    child.virtual_size,
                )


def _bitmap_refusals(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    lost = [d.name for d in facts.decisions if d.loses_valid_checkpoint]
    if lost and not options.drop_bitmaps:
        base = facts.base
        kind = "raw" if base.header is None else f"a version {base.header.version} qcow2 image"
        yield BaseCannotHoldBitmaps(str(base.path), kind, quoted(lost))
    unguarded = [d.name for d in facts.decisions if d.unguarded]
    if unguarded:
        holders = names_of(facts.relatives.children) or str(facts.top.path)
        yield UnguardedBitmaps(str(facts.result.path), quoted(unguarded), holders)


def _snapshot_refusals(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    if options.drop_snapshots:
        return
    doomed = removed_images(facts, options)
    option = "--delete" if options.delete else "--keep-name"
    for views in facts.snapshots:
        image = str(views.image.path)
        changed = changed_snapshots(views, facts)
        names = tuple(name for at, name in enumerate(views.names) if at in changed)
        if not views.removable and (names or views.image in doomed):
            yield SnapshotsOfVmWouldChange(image, first_few(names or views.names))
        elif views.image in doomed:
            instead = "" if names else f"leave out {option}, or "
            yield SnapshotsWouldGo(image, first_few(views.names), option, instead)
        elif names:
            instead = ""
            pulls = facts.direction is Direction.PULL
            if views.left_by_other_way and (pulls or facts.pull_obstacle is None):
                other = Direction.COMMIT if pulls else Direction.PULL
                instead = (
                    f"merge the other way (--direction {other}), which changes no snapshots; or "
                )
            yield SnapshotsWouldChange(image, first_few(names), instead)


def _settle_refusals(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    yield from _no_place_for_records(facts, options)
    if not (options.delete or options.keep_name):
        return
    renames = planned_rename(facts, options) is not None
    if facts.direction is Direction.PULL:
        yield from _needed_by_others(facts, options)
    option = "--delete" if options.delete else "--keep-name"
    doomed = removed_images(facts, options)
    for image in (*doomed, *((facts.base,) if renames else ())):
        if image.is_block_device and image.identity not in facts.removals.volumes:
            yield CannotDeleteVolume(str(image.path), option)
    if renames:
        yield from _rename_refusals(facts)
    files = [image.real_path for image in (*doomed, *((facts.base,) if renames else ()))]
    for path in (*files, *going(facts, options).paths):
        if path in facts.removals.obstacles:
            yield CannotTakeAway(str(path), option, facts.removals.obstacles[path])
    for image in doomed:
        volume = facts.removals.volumes.get(image.identity)
        if volume is not None and volume.obstacle_to_removal is not None:
            yield CannotTakeAway(str(volume.path), option, volume.obstacle_to_removal)


def _rename_refusals(facts: MergeFacts) -> Iterator[ChainmergeError]:
    base, top, mounts = facts.base, facts.top, facts.removals.mounts
    here, there = base.real_path.parent, top.real_path.parent
    devices = [one for one in (base, top) if one.is_block_device]
    volumes = [facts.removals.volumes.get(one.identity) for one in devices]
    if devices:
        # Devices that are no logical volumes are refused as that.
        groups = {"" if volume is None else volume.group for volume in volumes}
        if "" not in groups and (len(devices) == 1 or len(groups) > 1):
            yield CannotRenameVolume(str(base.path), str(top.path))
    elif base.identity[0] != top.identity[0] or mounts.get(here) != mounts.get(there):
        yield CannotRename(str(base.path), str(top.path))
    if facts.relatives.siblings:
        others = names_of(facts.relatives.siblings)
        yield BaseNamedByOthers(str(base.path), str(top.path), others)
    name = base.header.data_file_name if base.header is not None else None
    if base.data_file is not None and here != there and not (name or "").startswith("/"):
        yield DataFileOutOfReach(str(base.path), name or "", str(there))


def _no_place_for_records(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    """Where what a rerun has to know cannot be written down."""
    base, top = facts.base, facts.top
    images = []
    if facts.direction is Direction.PULL or options.delete or options.keep_name:
        images.append(top)
    if facts.direction is Direction.COMMIT and not facts.merged and _notes_beside_base(facts):
        images.append(base)
    files = [image.real_path for image in images if not image.is_block_device]
    for place in dict.fromkeys(file.parent for file in files):
        if place in facts.removals.closed:
            yield StateDirectoryUnusable(str(place), facts.removals.closed[place])


def _notes_beside_base(facts: MergeFacts) -> bool:
    """Whether a journal is kept, or bitmaps are saved until QEMU has copied."""
    if facts.engine is EngineName.NATIVE:
        return True
    return any(
        decision.fate is Fate.KEEP
        and (len(facts.merged_images) > 1 or decision.states[facts.base_index] is BitmapState.VALID)
        for decision in facts.decisions
    )


def _needed_by_others(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    """What a pull leaves as it is can only be deleted if nobody else stands on it."""
    doomed = deleted_images(facts, options)
    others = (*facts.relatives.siblings, *facts.relatives.middle_children)
    if doomed and others:
        yield DoomedInUse(names_of(doomed), names_of(others))


def _space_refusals(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    if options.data != "auto" and Placement(options.data) not in facts.spaces:
        yield PlacementUnavailable(str(facts.result.path), options.data, facts.engine_reason)
    refusal = facts.volume.refusal(required_bytes(facts, options), allocated_bytes(facts, options))
    if refusal is not None:
        fixed = facts.volume.kind is VolumeKind.BLOCK and facts.result.header is None
        yield RawDeviceTooSmall(**vars(refusal)) if fixed else _with_other_way(refusal, facts)
    yield from _hiding_refusals(facts)


def _with_other_way(refusal: CannotGrow, facts: MergeFacts) -> CannotGrow:
    """The same refusal, with the pull as a way out where there is one."""
    if facts.direction is Direction.PULL or facts.pull_obstacle is not None:
        return refusal
    top = facts.top.path
    return refusal.advised(
        f"{_without_change(facts)} and takes about {facts.pull_bytes} bytes for {top}; or "
    )


def _hiding_refusals(facts: MergeFacts) -> Iterator[ChainmergeError]:
    hiding = facts.hiding
    if hiding is None:
        return
    if hiding.obstacle is not None:
        yield hiding.obstacle
        return
    volume = hiding.volume
    if volume.kind is not VolumeKind.FILE:
        # Only what is merged into is extended.
        volume = replace(volume, kind=VolumeKind.BLOCK, capacity_limit=volume.size, thin=None)
    refusal = volume.refusal(hiding.required)
    if refusal is not None:
        yield refusal
