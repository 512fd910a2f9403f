# SPDX-License-Identifier: Apache-2.0
"""What a merge will do: decided from facts, before anything is written.

:func:`make_plan` is pure. Everything that it needs to know about the disk comes in
as facts (:mod:`chainmerge.inspection` gathers them), everything that the other
stages do follows from the :class:`MergePlan` that it returns. The plan is also the
document that ``chainmerge plan --json`` prints: its field names are a stable
interface, versioned by :data:`PLAN_VERSION`. All sizes are in bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from chainmerge.chain import Chain, ImageInfo, Relatives
from chainmerge.checkpoints import BitmapState, Decision, Fate
from chainmerge.errors import ChainmergeError
from chainmerge.options import Direction, Placement
from chainmerge.plan_errors import (
    BaseCannotHoldBitmaps,
    BaseHasOtherChildren,
    CannotDeleteVolume,
    CannotRename,
    CheckpointOfOthers,
    ChildSeesMore,
    DoomedInUse,
    ImageCorrupt,
    ImageDamaged,
    ImageDirty,
    MiddleHasOtherChildren,
    PlacementUnavailable,
    RelativeUnknown,
    SnapshotsWouldGo,
    UnguardedBitmaps,
)
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import CheckReport
from chainmerge.storage.volumes import VolumeFacts, VolumeKind

if TYPE_CHECKING:
    from chainmerge.options import MergeOptions

PLAN_VERSION = 1
_NAMED_ONE_BY_ONE: Final = 3


class EngineName(StrEnum):
    """Who writes guest data into base."""

    NATIVE = "native"
    QEMU = "qemu"


class Role(StrEnum):
    """An image's part in the merge."""

    BELOW = "below"
    BASE = "base"
    MIDDLE = "middle"
    TOP = "top"
    ABOVE = "above"


class Progress(StrEnum):
    """How far earlier runs of the same merge came."""

    NEW = "new"
    INTERRUPTED = "interrupted"
    MERGED = "merged"


@dataclass(frozen=True, slots=True)
class SpaceFacts:
    """What base will need, in bytes, if data is placed in one of the ways.

    ``new_clusters`` and ``new_l2_tables`` count allocations, ``written`` guest bytes.
    """

    image_end: int
    required: int
    optimal: int
    breakdown: Mapping[str, int]
    new_clusters: int
    new_l2_tables: int
    written: int
    required_if_pruned: int | None = None
    """The same as ``required`` if stale bitmaps are taken out first, by a switch of their own;
    None where there is nothing to take out or the engine does so anyway."""

    @property
    def least(self) -> int:
        """What is needed at least."""
        if self.required_if_pruned is None:
            return self.required
        return min(self.required, self.required_if_pruned)


@dataclass(frozen=True, slots=True)
class LeakFacts:
    """Clusters of the result that are marked used and that nothing uses, in bytes.

    ``ours`` were left by a merge of ours, and are given back. ``others`` were left by somebody
    else; ``reclaimed`` says whether they are given back, too. ``sign`` is what makes them look like
    the content of a lost L2 table, which is all that is left of it then; None if nothing does.
    """

    ours: int = 0
    others: int = 0
    sign: str | None = None
    reclaimed: bool = False


@dataclass(frozen=True, slots=True)
class MergeFacts:
    """What was found on disk; all that a plan rests on.

    ``obstacles`` are errors that were met while looking, such as locks held by others.
    ``final_bits`` holds the union for each name that is kept. ``recovered`` are the names
    whose bits in base come from an interrupted merge. ``undefined_bytes`` counts what the
    merged range defines and base does not, as far as an earlier run of the same merge would have
    given it a cluster; where it is 0, base may hold it all already, and
    ``merged`` says (True, False, or None if nobody compared) whether it does. ``result_check``
    is the consistency check of the image that is written, ``spaces`` has the ways in which the
    engine can place data in it.
    """

    chain: Chain
    base_index: int
    relatives: Relatives
    decisions: tuple[Decision, ...]
    final_bits: Mapping[str, BitSet]
    recovered: frozenset[str]
    interrupted: bool
    result_check: CheckReport | None
    movement: Movement
    pull_bytes: int
    undefined_bytes: int
    merged: bool | None
    volume: VolumeFacts
    engine: EngineName
    engine_reason: str
    direction: Direction
    pull_obstacle: str | None
    spaces: Mapping[Placement, SpaceFacts]
    obstacles: tuple[ChainmergeError, ...]
    warnings: tuple[str, ...]
    leaks: LeakFacts = LeakFacts()
    content_merged: bool | None = None
    """Whether base shows what top shows, whatever its bitmaps are; None if nobody compared."""

    @property
    def base(self) -> ImageInfo:
        """The image that is merged into."""
        return self.chain.images[self.base_index]

    @property
    def top(self) -> ImageInfo:
        """The uppermost image that is merged."""
        return self.chain.top

    @property
    def result(self) -> ImageInfo:
        """The image that is written, and holds everything afterwards."""
        return self.top if self.direction is Direction.PULL else self.base

    @property
    def merged_images(self) -> tuple[ImageInfo, ...]:
        """The images whose data goes into another one, lowest first."""
        if self.direction is Direction.PULL:
            return self.chain.images[self.base_index : -1]
        return self.chain.images[self.base_index + 1 :]

    @property
    def size_after(self) -> int:
        """Bytes of the guest's disk afterwards."""
        if self.direction is Direction.PULL:
            return self.top.virtual_size
        return max(self.base.virtual_size, self.top.virtual_size)


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image of the chain, as the tree shows it."""

    path: str
    role: Role
    format: str
    format_declared: bool
    virtual_size: int
    file_size: int
    cluster_size: int | None
    bitmaps: int
    parent: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Movement:
    """What the merged range defines, and what of it base must newly allocate.

    The ``*_bytes`` count guest bytes by what the topmost image of the range says of
    them; ``new_clusters`` and ``new_l2_tables`` count allocations in base.
    """

    data_bytes: int
    zero_bytes: int
    compressed_bytes: int
    new_clusters: int = 0
    new_l2_tables: int = 0


@dataclass(frozen=True, slots=True)
class DirectionCost:
    """What it costs to merge in one direction: guest bytes to be read and written."""

    bytes_to_copy: int
    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Directions:
    """Both ways to the same result: top's data down into base, or base's up into top."""

    commit: DirectionCost
    pull: DirectionCost
    chosen: str


@dataclass(frozen=True, slots=True)
class PlannedBitmap:
    """The fate of one bitmap name."""

    name: str
    fate: str
    rule: str
    reason: str
    tombstone: bool
    granularity: int | None
    dirty_bytes: int | None
    was_valid: bool
    unguarded: bool
    states: dict[str, str]
    recovered: bool


@dataclass(frozen=True, slots=True)
class SpacePlan:
    """Base's volume: what it is, what it must be, what it may become.

    ``required`` is what the merge needs at its peak: exactly with the native engine, with
    QEMU's a safe upper bound. ``placement`` is where data goes that base has a cluster for,
    ``required_by_placement`` what each way takes at least, ``prune_first`` whether stale bitmaps
    have to make room first, by a switch of their own. ``grow_to`` is the size that the volume
    will be extended to, None where it is large enough. ``missing`` is what cannot be had; a plan
    with a missing byte is refused.
    """

    kind: str
    size: int
    image_end: int
    required: int
    limit: int | None
    grow_to: int | None
    missing: int
    breakdown: dict[str, int]
    shrink_to: int | None
    placement: Placement
    required_by_placement: dict[str, int]
    prune_first: bool


@dataclass(frozen=True, slots=True)
class Repoint:
    """A child of top whose backing file becomes base."""

    child: str
    old_backing: str
    new_backing: str
    new_format: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that refuses the merge, in the words of the error it would raise."""

    code: str
    sentence: str
    hint: str


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that a merge will do. The same facts give the same plan."""

    version: int
    base: str
    top: str
    progress: Progress
    images: tuple[PlannedImage, ...]
    engine: EngineName
    engine_reason: str
    movement: Movement
    directions: Directions
    virtual_size_before: int
    virtual_size_after: int
    bitmaps: tuple[PlannedBitmap, ...]
    space: SpacePlan
    repoint: tuple[Repoint, ...]
    delete: tuple[str, ...]
    rename: tuple[str, str] | None
    verify: str
    refusals: tuple[Finding, ...]
    warnings: tuple[str, ...]
    leaks: LeakFacts = LeakFacts()

    @property
    def pulls(self) -> bool:
        """Whether top is what is written."""
        return self.directions.chosen == Direction.PULL

    @property
    def feasible(self) -> bool:
        """Whether a merge by this plan would start."""
        return not self.refusals


def make_plan(facts: MergeFacts, options: MergeOptions) -> MergePlan:
    """Decide on everything that a merge will do."""
    base, top = facts.base, facts.top
    return MergePlan(
        version=PLAN_VERSION,
        base=str(base.path),
        top=str(top.path),
        progress=_progress(facts),
        images=tuple(_planned_images(facts)),
        engine=facts.engine,
        engine_reason=facts.engine_reason,
        movement=_movement(facts, options),
        directions=_directions(facts),
        virtual_size_before=facts.result.virtual_size,
        virtual_size_after=facts.size_after,
        bitmaps=tuple(_planned_bitmap(decision, facts) for decision in facts.decisions),
        space=_space(facts, options),
        repoint=_repoint(facts, options),
        delete=_delete(facts, options),
        rename=_rename(facts, options),
        verify=options.verify,
        refusals=tuple(
            Finding(error.code, error.sentence, error.advice)
            for error in find_refusals(facts, options)
        ),
        warnings=(*facts.warnings, *_warnings(facts, options)),
        leaks=facts.leaks,
    )


def find_refusals(facts: MergeFacts, options: MergeOptions) -> tuple[ChainmergeError, ...]:
    """Every reason not to start, the most fundamental first."""
    return (
        *facts.obstacles,
        *_damage(facts),
        *_others_unknown(facts, options),
        *_others_at_risk(facts),
        *_bitmap_refusals(facts, options),
        *_settle_refusals(facts, options),
        *_space_refusals(facts, options),
    )


def choose_placement(facts: MergeFacts, options: MergeOptions) -> Placement:
    """Where data goes that base has a cluster for.

    Not over the old content, where there is the space: a file may take it from its file
    system, a volume has what it has, since making it larger than the merged image will be is
    for others to pay for.
    """
    if options.data != "auto" and Placement(options.data) in facts.spaces:
        return Placement(options.data)
    if Placement.COW not in facts.spaces:
        return Placement.IN_PLACE
    fits = _is_there(facts.spaces[Placement.COW].least, facts.volume)
    return Placement.COW if fits else Placement.IN_PLACE


def _is_there(required: int, volume: VolumeFacts) -> bool:
    if volume.kind is VolumeKind.FILE:
        return not volume.growth(required).missing
    return required <= volume.size


def prunes_first(facts: MergeFacts, options: MergeOptions) -> bool:
    """Whether stale bitmaps are taken out by a switch of their own, to make room for the merge.

    Where there is room, all that changes changes in one switch.
    """
    space = chosen_space(facts, options)
    return space.least < space.required and not _is_there(space.required, facts.volume)


def chosen_space(facts: MergeFacts, options: MergeOptions) -> SpaceFacts:
    """What base will need with data placed as chosen."""
    return facts.spaces[choose_placement(facts, options)]


def bytes_to_copy(facts: MergeFacts) -> int:
    """Guest bytes that a commit by QEMU writes into base."""
    movement = facts.movement
    return movement.data_bytes + movement.zero_bytes + movement.compressed_bytes


def _movement(facts: MergeFacts, options: MergeOptions) -> Movement:
    space = chosen_space(facts, options)
    return replace(
        facts.movement, new_clusters=space.new_clusters, new_l2_tables=space.new_l2_tables
    )


def _progress(facts: MergeFacts) -> Progress:
    if facts.merged:
        return Progress.MERGED
    return Progress.INTERRUPTED if facts.interrupted else Progress.NEW


def _planned_images(facts: MergeFacts) -> Iterator[PlannedImage]:
    roles = [
        *(Role.BELOW for _ in range(facts.base_index)),
        Role.BASE,
        *(Role.MIDDLE for _ in facts.merged_images[:-1]),
        Role.TOP,
    ]
    parent: str | None = None
    for image, role in zip(facts.chain.images, roles, strict=True):
        yield _planned_image(image, role, parent)
        parent = str(image.path)
    for above in facts.relatives.above:
        parent = str(above.between[0] if above.between else facts.top.path)
        yield _planned_image(above.image, Role.ABOVE, parent)


def _planned_image(image: ImageInfo, role: Role, parent: str | None) -> PlannedImage:
    return PlannedImage(
        path=str(image.path),
        role=role,
        format=image.format,
        format_declared=image.format_declared,
        virtual_size=image.guest_size or 0,
        file_size=image.file_size,
        cluster_size=image.header.cluster_size if image.header else None,
        bitmaps=len(image.bitmaps),
        parent=parent,
        notes=image.notes,
    )


def _directions(facts: MergeFacts) -> Directions:
    return Directions(
        commit=DirectionCost(
            bytes_to_copy=bytes_to_copy(facts),
            available=True,
            reason="what top defines goes down into base",
        ),
        pull=DirectionCost(
            bytes_to_copy=facts.pull_bytes,
            available=facts.pull_obstacle is None,
            reason=facts.pull_obstacle or "what only base defines comes up into top",
        ),
        chosen=facts.direction,
    )


def _planned_bitmap(decision: Decision, facts: MergeFacts) -> PlannedBitmap:
    bits = facts.final_bits.get(decision.name)
    images = [str(image.path) for image in facts.chain.images]
    return PlannedBitmap(
        name=decision.name,
        fate=decision.fate,
        rule=decision.rule,
        reason=decision.reason,
        tombstone=decision.tombstone,
        granularity=decision.granularity,
        dirty_bytes=bits.dirty_bytes() if bits is not None else None,
        was_valid=decision.was_valid,
        unguarded=decision.unguarded,
        states=dict(zip(images, map(str, decision.states), strict=True)),
        recovered=decision.name in facts.recovered,
    )


def _space(facts: MergeFacts, options: MergeOptions) -> SpacePlan:
    volume, required = facts.volume, _required(facts, options)
    space = chosen_space(facts, options)
    growth = volume.growth(required)
    limit = volume.capacity_limit
    if limit is None and volume.free_bytes is not None:
        limit = volume.size + volume.free_bytes
    shrinks = options.shrink and volume.kind is VolumeKind.LVM
    return SpacePlan(
        kind=volume.kind,
        size=volume.size,
        image_end=space.image_end,
        required=required,
        limit=limit,
        grow_to=(
            growth.size_after if growth.size_after > volume.size and not growth.missing else None
        ),
        missing=growth.missing,
        breakdown=dict(space.breakdown),
        shrink_to=_round_up(space.optimal, volume.growth_unit) if shrinks else None,
        placement=choose_placement(facts, options),
        required_by_placement={
            str(placement): one.least for placement, one in sorted(facts.spaces.items())
        },
        prune_first=prunes_first(facts, options),
    )


def _required(facts: MergeFacts, options: MergeOptions) -> int:
    space = chosen_space(facts, options)
    if facts.merged:
        return space.image_end
    return space.least if prunes_first(facts, options) else space.required


def _repoint(facts: MergeFacts, options: MergeOptions) -> tuple[Repoint, ...]:
    """Whose stored backing name or format is not right any more afterwards.

    The children of top; and, where several levels were merged, top itself if it stays: the
    images in between are no longer usable, and bitmaps that they lack would look like a
    gap between top and base.
    """
    if facts.direction is Direction.PULL:
        return ()
    changes = [_repoint_one(child, facts, options) for child in facts.relatives.children]
    if len(facts.merged_images) > 1 and not (options.delete or options.keep_name):
        changes.append(_onto_base(facts.top, facts.base))
    return tuple(change for change in changes if change is not None)


def _onto_base(image: ImageInfo, base: ImageInfo) -> Repoint:
    name = _name_for(image, base)
    return Repoint(str(image.path), image.backing_name or "", name, base.format)


def _repoint_one(child: ImageInfo, facts: MergeFacts, options: MergeOptions) -> Repoint | None:
    old = child.backing_name or ""
    base_format = facts.base.format
    declared = child.header.backing_format if child.header else None
    if options.keep_name:
        # The name that the child holds is base's from now on; its format may still be wrong.
        if declared == base_format:
            return None
        return Repoint(str(child.path), old, old, base_format)
    return _onto_base(child, facts.base)


def _name_for(child: ImageInfo, base: ImageInfo) -> str:
    """Base as the child's header should name it: relative where it named top so."""
    stored = (child.backing_name or "").removeprefix("file:")
    if stored.startswith("/"):
        return str(base.path)
    relative = os.path.relpath(base.path, child.path.parent)
    # A relative name counts from the directory by which the child was reached. Where that
    # is a symbolic link, `..` leads elsewhere.
    leads = (child.path.parent / relative).resolve()
    if leads != base.real_path:
        return str(base.real_path)
    # What stands before a colon would be taken for a protocol.
    return f"./{relative}" if ":" in relative.split("/", 1)[0] else relative


def _delete(facts: MergeFacts, options: MergeOptions) -> tuple[str, ...]:
    renames = _rename(facts, options) is not None
    # The file that another one is renamed to needs no deleting.
    doomed = [image for image in _doomed(facts, options) if not renames or image != facts.top]
    return tuple(str(image.path) for image in reversed(doomed))


def _doomed(facts: MergeFacts, options: MergeOptions) -> tuple[ImageInfo, ...]:
    """The images whose content nobody will have any more."""
    if options.delete:
        return facts.merged_images
    if not options.keep_name:
        return ()
    # One image remains under top's name, whichever way the data goes.
    return (facts.base if facts.direction is Direction.PULL else facts.top,)


def _rename(facts: MergeFacts, options: MergeOptions) -> tuple[str, str] | None:
    """Base's path and the one that it gets. A pull has its result under top's name anyway."""
    if not options.keep_name or facts.direction is Direction.PULL:
        return None
    return str(facts.base.path), str(facts.top.path)


def new_backing(facts: MergeFacts) -> tuple[str, str] | None:
    """Name and format of the backing file that top gets by a pull: base's. None for none."""
    if not facts.base_index:
        return None
    below = facts.chain.images[facts.base_index - 1]
    return _name_for(facts.top, below), below.format


def _warnings(facts: MergeFacts, options: MergeOptions) -> Iterator[str]:
    base, top = facts.base, facts.top
    if top.virtual_size < base.virtual_size and facts.direction is Direction.COMMIT:
        yield (
            f"{top.path} has a smaller disk ({top.virtual_size} bytes) than {base.path} "
            f"({base.virtual_size} bytes): base does not shrink, so the merged disk is the "
            "larger one"
        )
    middle = facts.merged_images[:-1]
    if middle and not options.delete and facts.direction is Direction.COMMIT:
        names = _run_of_images(middle)
        yield f"after the merge {names} must not be used any more: the data below is another"
    revealed = tuple(image for image in facts.merged_images if image.encrypted)
    if revealed and not facts.result.encrypted:
        yield (
            f"{facts.result.path} is not encrypted: what {_names(revealed)} holds can be read there"
        )
    for path, reason in facts.relatives.unreadable:
        yield f"{path} could be another user of these images, but cannot be read: {reason}"
    for image in facts.merged_images:
        if image.header is not None and image.header.snapshot_count:
            yield f"{image.path} holds internal snapshots: they are not merged"
    yield from _leaks(facts)


def _leaks(facts: MergeFacts) -> Iterator[str]:
    leaks, result = facts.leaks, facts.result.path
    if not leaks.others:
        return
    words = f"{leaks.others} bytes of {result} are leaked, and nobody knows by whom"
    if leaks.sign is not None:
        words += f"; they may be all that is left of what a lost L2 table led to: {leaks.sign}"
    if leaks.reclaimed:
        yield f"{words}. They are given back, as was asked for"
    elif leaks.sign is None:
        yield f"{words}. They stay; `chainmerge repair --yes` gives the space back"
    else:
        yield f"{words}. They stay; `chainmerge repair --reclaim` would destroy that"


def _damage(facts: MergeFacts) -> Iterator[ChainmergeError]:
    header, path = facts.result.header, str(facts.result.path)
    if header is None:
        return
    if header.corrupt:
        yield ImageCorrupt(path)
    elif header.dirty:
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


def _checkpoints_at_risk(facts: MergeFacts) -> Iterator[ChainmergeError]:
    """What base gets or loses is below the checkpoints of its other children, too."""
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
            yield CheckpointOfOthers(base, name, top, _names(others))


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
            yield BaseHasOtherChildren(str(base.path), _names(relatives.siblings))
    if relatives.middle_children:
        yield MiddleHasOtherChildren(
            str(base.path), str(top.path), _names(relatives.middle_children)
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
        yield BaseCannotHoldBitmaps(str(base.path), kind, _quoted(lost))
    unguarded = [d.name for d in facts.decisions if d.unguarded]
    if unguarded:
        holders = _names(facts.relatives.children) or str(facts.top.path)
        yield UnguardedBitmaps(str(facts.result.path), _quoted(unguarded), holders)


def _settle_refusals(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    if not (options.delete or options.keep_name):
        return
    renames = _rename(facts, options) is not None
    if facts.direction is Direction.PULL:
        yield from _needed_by_others(facts, options)
    option = "--delete" if options.delete else "--keep-name"
    doomed = _doomed(facts, options)
    for image in (*doomed, *((facts.base,) if renames else ())):
        if image.is_block_device:
            yield CannotDeleteVolume(str(image.path), option)
    for image in doomed:
        if image.header is not None and image.header.snapshot_count:
            yield SnapshotsWouldGo(str(image.path), image.header.snapshot_count, option)
    if renames and facts.base.identity[0] != facts.top.identity[0]:
        yield CannotRename(str(facts.base.path), str(facts.top.path))


def _needed_by_others(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    """What a pull leaves as it is can only be deleted if nobody else stands on it."""
    if not _doomed(facts, options):
        return
    others = facts.relatives.siblings
    if options.delete:
        others = (*others, *facts.relatives.middle_children)
    if others:
        yield DoomedInUse(_names(_doomed(facts, options)), _names(others))


def _space_refusals(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    if options.data != "auto" and Placement(options.data) not in facts.spaces:
        yield PlacementUnavailable(str(facts.result.path), options.data, facts.engine_reason)
    refusal = facts.volume.refusal(_required(facts, options))
    if refusal is not None:
        yield refusal


def _names(images: tuple[ImageInfo, ...]) -> str:
    return ", ".join(str(image.path) for image in images)


def _run_of_images(images: tuple[ImageInfo, ...]) -> str:
    """Images that follow each other in the chain: by name while a reader can take them in."""
    if len(images) <= _NAMED_ONE_BY_ONE:
        return _names(images)
    return f"{images[0].path} to {images[-1].path} ({len(images)} images)"


def _quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
