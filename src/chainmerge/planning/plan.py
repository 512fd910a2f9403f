# SPDX-License-Identifier: Apache-2.0
"""What a merge will do: decided from facts, before anything is written.

:func:`make_plan` is pure. Everything that it needs to know about the disk comes in
as facts (:mod:`chainmerge.chain.target` gathers them), everything that the other
stages do follows from the :class:`MergePlan` that it returns. The plan is also the
document that ``chainmerge plan --json`` prints: its field names are a stable
interface, versioned by :data:`PLAN_VERSION`. All sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from chainmerge.bitmaps.rules import BitmapState, Decision, Fate
from chainmerge.chain import Chain, ImageInfo, Relatives, Searched
from chainmerge.chain.names import name_to_store
from chainmerge.chain.unseen_users import inactive_users, unseen_users, volumes
from chainmerge.errors import ChainmergeError
from chainmerge.options import LEFT_TO_A_GUEST, Direction, Placement
from chainmerge.planning.errors import (
    BaseCannotHoldBitmaps,
    BaseHasOtherChildren,
    BaseNamedByOthers,
    BaseNewer,
    CannotDeleteVolume,
    CannotRename,
    CannotTakeAway,
    CheckpointOfOthers,
    ChildSeesMore,
    DataFileOutOfReach,
    DoomedInUse,
    ImageCorrupt,
    ImageDamaged,
    ImageDirty,
    MiddleHasOtherChildren,
    PlacementUnavailable,
    RelativeUnknown,
    SnapshotsOfVmWouldChange,
    SnapshotsWouldChange,
    SnapshotsWouldGo,
    UnguardedBitmaps,
)
from chainmerge.planning.removals import NOTHING_GOES, Going, Removals, going_with
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import CheckReport
from chainmerge.records.files import StateDirectoryUnusable
from chainmerge.storage.errors import RawDeviceTooSmall
from chainmerge.storage.volumes import VolumeFacts, VolumeKind

if TYPE_CHECKING:
    from pathlib import Path

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
    allocates: int | None = None
    """Bytes that the file system has to give the file for it: behind its end, in holes, and for
    blocks that it shares. None where that is what ``required`` exceeds the file's size by."""
    end_after: int | None = None
    """Where the image ends after the merge, exactly; None where that is not known."""
    allocates_if_pruned: int | None = None
    """The same as ``allocates`` for ``required_if_pruned``."""
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
class SnapshotViews:
    """The internal snapshots of base, of top, or of an image between them.

    ``changed`` are those, by their positions in the image's table, that show other data once
    base's data has changed or top stands on another image; ``left_by_other_way`` says whether a
    merge in the other direction changes none in any of the images. They are ``removable`` where
    no VM has the image open, and ``freed`` are the bytes of its file that this gives back.
    """

    image: ImageInfo
    names: tuple[str, ...]
    changed: frozenset[int]
    left_by_other_way: bool
    removable: bool
    freed: int


@dataclass(frozen=True, slots=True)
class ImageTimes:
    """When an image was written last, and created; and how large its disk is.

    In nanoseconds since 1970, None where nothing tells that; and in bytes.
    """

    path: str
    written: int | None
    created: int | None
    virtual_size: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """What tells whether the overlays are newer than base, as they should be.

    Attributes:
        times: Those of base and the images above it up to top.
        held: Of the clusters that were looked at, all of which the overlays define, those that
            base has the same of its own.
        differing: Those that are not the same.
        equal: Whether base shows all that top shows; None where not everything was compared.
    """

    times: tuple[ImageTimes, ...]
    held: int = 0
    differing: int = 0
    equal: bool | None = False

    @property
    def written_later(self) -> bool:
        """Whether base was written after all images above it."""
        base, *above = (one.written for one in self.times)
        return base is not None and all(one is not None and one < base for one in above)

    @property
    def is_timeless(self) -> bool:
        """Whether one of them is a block device, of which there are no times."""
        return any(one.written is None for one in self.times)

    @property
    def holds_most(self) -> bool:
        """Whether base has most of what the overlays define, and shows not all that top shows."""
        return self.held > self.differing and self.equal is not True

    @property
    def speaks_for_base(self) -> bool:
        """Whether the overlays look like ones that were left behind."""
        return self.holds_most and self.written_later and self.equal is False

    @property
    def misfits(self) -> tuple[tuple[ImageTimes, ImageTimes], ...]:
        """Images that changed after the next one above them was made, or do not fit below it."""
        if self.equal is True:
            return ()
        return tuple((low, up) for low, up in pairwise(self.times) if _is_odd(low, up))


def _is_odd(lower: ImageTimes, upper: ImageTimes) -> bool:
    later = _after(lower.written, upper.written) or _after(lower.created, upper.created)
    return later or lower.virtual_size > upper.virtual_size


def _after(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one > other


@dataclass(frozen=True, slots=True)
class HidingFacts:
    """The overlay directly above a raw base whose volume has to be extended.

    What the volume holds behind base's end shows through the overlay as soon as it is extended,
    wherever the overlay says nothing. So the overlay says zeros there, before that.

    Attributes:
        overlay: the overlay.
        volume: what it lies on.
        start: where base's disk ends now, in bytes.
        required: bytes that the overlay's file or volume has to have for it.
        obstacle: why the overlay cannot be written to; None if it can.
    """

    overlay: ImageInfo
    volume: VolumeFacts
    start: int
    required: int
    obstacle: ChainmergeError | None


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
    removals: Removals = NOTHING_GOES
    """What is known of the names that the merge may take away."""
    snapshots: tuple[SnapshotViews, ...] = ()
    evidence: Evidence | None = None
    """Which of the images looks newer; None where what we recorded tells."""
    hiding: HidingFacts | None = None
    """What has to be hidden before base's volume is extended; None for nothing."""
    end_before: int | None = None
    """Bytes that raw base's volume had before an interrupted run extended it; None if none did.
    What it holds behind that is nobody's."""

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
class PlannedSnapshots:
    """The fate of an image's internal snapshots, by name.

    Attributes:
        image: The image that holds them.
        kept: Those that show the same afterwards.
        lost: Those that would show other data, or go with their image: this refuses the merge.
        dropped: Those that are deleted, as asked for.
        freed: Bytes of the image's file that nothing uses any more without them; 0 where the
            file is deleted.
    """

    image: str
    kept: tuple[str, ...]
    lost: tuple[str, ...]
    dropped: tuple[str, ...]
    freed: int


@dataclass(frozen=True, slots=True)
class SpacePlan:
    """Base's volume: what it is, what it must be, what it may become.

    ``required`` is what the merge needs at its peak: exactly with the native engine, with
    QEMU's a safe upper bound. ``placement`` is where data goes that base has a cluster for,
    ``required_by_placement`` what each way takes at least, ``prune_first`` whether stale bitmaps
    have to make room first, by a switch of their own. ``grow_to`` is the size that the volume
    will be extended to, None where it is large enough. ``missing`` is what cannot be had; a plan
    with a missing byte is refused. ``allocates`` is what the file system has to give a file:
    behind its end, in holes that are written to, and for blocks that other files share; None for
    a volume, and where it is not known.
    """

    kind: str
    size: int
    image_end: int
    required: int
    limit: int | None
    grow_to: int | None
    missing: int
    allocates: int | None
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
class PlannedHiding:
    """An overlay that gets zeros of its own before base's volume is extended.

    From ``start`` to ``end``, in guest bytes, nothing of what the volume holds there can show
    through it then. ``required`` is what its file has to have for that, in bytes.
    """

    image: str
    start: int
    end: int
    required: int


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
    snapshots: tuple[PlannedSnapshots, ...]
    space: SpacePlan
    hides: PlannedHiding | None
    repoint: tuple[Repoint, ...]
    delete: tuple[str, ...]
    rename: tuple[str, str] | None
    verify: str
    other_users: tuple[str, ...]
    searched: Searched
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
        snapshots=tuple(_planned_snapshots(views, facts, options) for views in facts.snapshots),
        space=_space(facts, options),
        hides=_hides(facts),
        repoint=_repoint(facts, options),
        delete=_delete(facts, options),
        rename=_rename(facts, options),
        verify=options.verify,
        other_users=_other_users(facts),
        searched=facts.relatives.searched,
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
        *_left_behind(facts, options),
        *_damage(facts),
        *_others_unknown(facts, options),
        *_others_at_risk(facts),
        *_bitmap_refusals(facts, options),
        *_snapshot_refusals(facts, options),
        *_settle_refusals(facts, options),
        *_others_unseen(facts, options),
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
    cow = facts.spaces[Placement.COW]
    whole = _is_there(cow.required, cow.allocates, facts.volume)
    least = cow.required_if_pruned
    pruned = least is not None and _is_there(least, cow.allocates_if_pruned, facts.volume)
    return Placement.COW if whole or pruned else Placement.IN_PLACE


def _is_there(required: int, allocates: int | None, volume: VolumeFacts) -> bool:
    if volume.kind is VolumeKind.FILE:
        return not volume.growth(required, allocates).missing
    return required <= volume.size


def prunes_first(facts: MergeFacts, options: MergeOptions) -> bool:
    """Whether stale bitmaps are taken out by a switch of their own, to make room for the merge.

    Where there is room, all that changes changes in one switch.
    """
    space = chosen_space(facts, options)
    if space.least >= space.required:
        return False
    return not _is_there(space.required, space.allocates, facts.volume)


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


def snapshots_to_remove(
    facts: MergeFacts, options: MergeOptions
) -> tuple[tuple[ImageInfo, frozenset[int]], ...]:
    """The snapshots that go before the merge: images, and positions in their tables.

    Also of images that are deleted in the end: until then nobody is to see wrong data in them.
    """
    if not options.drop_snapshots:
        return ()
    return tuple(
        (views.image, changed)
        for views in facts.snapshots
        if (changed := _changed_snapshots(views, facts))
    )


def _changed_snapshots(views: SnapshotViews, facts: MergeFacts) -> frozenset[int]:
    if facts.direction is Direction.PULL or not (facts.merged or facts.content_merged):
        return views.changed
    # Base does not change any more, but top may be put on base, past the images between.
    is_put_on_base = views.image == facts.top and len(facts.merged_images) > 1
    return views.changed if is_put_on_base else frozenset()


def _planned_snapshots(
    views: SnapshotViews, facts: MergeFacts, options: MergeOptions
) -> PlannedSnapshots:
    changed = _changed_snapshots(views, facts)
    if views.image in _doomed(facts, options):
        changed = frozenset(range(len(views.names)))
    going = tuple(name for at, name in enumerate(views.names) if at in changed)
    stays = views.image not in _doomed(facts, options)
    return PlannedSnapshots(
        image=str(views.image.path),
        kept=tuple(name for at, name in enumerate(views.names) if at not in changed),
        lost=() if options.drop_snapshots else going,
        dropped=going if options.drop_snapshots else (),
        freed=views.freed if stays and changed else 0,
    )


def _space(facts: MergeFacts, options: MergeOptions) -> SpacePlan:
    volume, required = facts.volume, _required(facts, options)
    space = chosen_space(facts, options)
    allocates = allocated_bytes(facts, options)
    growth = volume.growth(required, allocates)
    limit = volume.capacity_limit
    if limit is None and volume.free_bytes is not None:
        limit = volume.size + volume.free_bytes
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
        allocates=allocates if volume.kind is VolumeKind.FILE else None,
        breakdown=dict(space.breakdown),
        shrink_to=_shrink_to(facts, options, growth.size_after),
        placement=choose_placement(facts, options),
        required_by_placement={
            str(placement): one.least for placement, one in sorted(facts.spaces.items())
        },
        prune_first=prunes_first(facts, options),
    )


def _shrink_to(facts: MergeFacts, options: MergeOptions, size: int) -> int | None:
    """What a volume of *size* bytes is reduced to.

    Where QEMU writes, or stale bitmaps are taken out first, it is not known where the image will
    end, but it is not behind what the merge needs at most.
    """
    volume = facts.volume
    if not options.shrink or volume.kind is not VolumeKind.LVM or facts.result.header is None:
        return None
    space, required = chosen_space(facts, options), _required(facts, options)
    known = space.end_after is not None and not facts.merged and not prunes_first(facts, options)
    end = space.end_after if known and space.end_after is not None else required
    kept = end + left_free(options, is_leaf=not facts.relatives.children)
    return min(_round_up(kept, volume.growth_unit), size)


def left_free(options: MergeOptions, *, is_leaf: bool) -> int:
    """Bytes that a reduced volume keeps beyond what its image needs."""
    if options.leave is not None:
        return options.leave
    return LEFT_TO_A_GUEST if is_leaf else 0


def _hides(facts: MergeFacts) -> PlannedHiding | None:
    hiding = facts.hiding
    if hiding is None or facts.merged:
        return None
    overlay = hiding.overlay
    return PlannedHiding(str(overlay.path), hiding.start, overlay.virtual_size, hiding.required)


def _required(facts: MergeFacts, options: MergeOptions) -> int:
    space = chosen_space(facts, options)
    if facts.merged:
        return space.image_end
    return space.least if prunes_first(facts, options) else space.required


def allocated_bytes(facts: MergeFacts, options: MergeOptions) -> int | None:
    """What the file system has to give the file that is written; None if that is not known."""
    space = chosen_space(facts, options)
    if facts.merged:
        return 0
    return space.allocates_if_pruned if prunes_first(facts, options) else space.allocates


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
    name = name_to_store(image, base)
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


def _delete(facts: MergeFacts, options: MergeOptions) -> tuple[str, ...]:
    files = (_file_of(image, facts) for image in deleted_images(facts, options))
    return tuple(map(str, (*files, *going(facts, options).paths)))


def _file_of(image: ImageInfo, facts: MergeFacts) -> Path:
    """An image's path, or, where that is a link, what it leads to."""
    known = facts.removals.belongings.get(image.identity)
    return image.real_path if known is not None and known.links else image.path


def deleted_images(facts: MergeFacts, options: MergeOptions) -> tuple[ImageInfo, ...]:
    """The images whose files are deleted, in the order in which they are."""
    if not options.delete:
        return ()
    replaced = _replaced(facts, options)
    return tuple(image for image in reversed(facts.merged_images) if image != replaced)


def going(facts: MergeFacts, options: MergeOptions) -> Going:
    """What goes with the images that are deleted or renamed."""
    deleted = deleted_images(facts, options)
    replaced = _replaced(facts, options)
    if replaced is None:
        return going_with(deleted, deleted, facts.removals.belongings)
    # Without --delete the data of an image that is replaced stays where it is a file of its own.
    unread = (replaced, *deleted) if options.delete else ()
    return going_with(unread, (*deleted, facts.base), facts.removals.belongings)


def _replaced(facts: MergeFacts, options: MergeOptions) -> ImageInfo | None:
    """The image whose file base takes the place of."""
    return None if _rename(facts, options) is None else facts.top


def _doomed(facts: MergeFacts, options: MergeOptions) -> tuple[ImageInfo, ...]:
    """The images whose files go: deleted, or replaced by base."""
    replaced = _replaced(facts, options)
    return (*deleted_images(facts, options), *((replaced,) if replaced is not None else ()))


def _rename(facts: MergeFacts, options: MergeOptions) -> tuple[str, str] | None:
    """Base's path and the one that it gets, in place of top's file.

    A pull has its result under top's name anyway.
    """
    if not options.keep_name or facts.direction is Direction.PULL:
        return None
    return str(facts.base.path), str(facts.top.path)


def _other_users(facts: MergeFacts) -> tuple[str, ...]:
    """The images outside the chain that stand on one of it, from base up."""
    relatives = facts.relatives
    found = (*relatives.siblings, *relatives.middle_children, *relatives.children)
    return tuple(str(image.path) for image in found)


def new_backing(facts: MergeFacts) -> tuple[str, str] | None:
    """Name and format of the backing file that top gets by a pull: base's. None for none."""
    if not facts.base_index:
        return None
    below = facts.chain.images[facts.base_index - 1]
    return name_to_store(facts.top, below), below.format


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
    yield from _what_stays(facts, options)
    revealed = tuple(image for image in facts.merged_images if image.encrypted)
    if revealed and not facts.result.encrypted:
        yield (
            f"{facts.result.path} is not encrypted: what {_names(revealed)} holds can be read there"
        )
    for path, reason in facts.relatives.unreadable:
        yield f"{path} could be another user of these images, but cannot be read: {reason}"
    changed = _changed(facts, options)
    if facts.relatives.inactive and not any(inactive_users(changed, top, facts.relatives)):
        yield f"{volumes(facts.relatives)} could stand on these images and were not looked at"
    yield from _doubts(facts, options)
    yield from _leaks(facts)
    for views in facts.snapshots:
        dropped = _planned_snapshots(views, facts, options).dropped
        if dropped:
            nouns, verb = ("snapshot", "is") if len(dropped) == 1 else ("snapshots", "are")
            yield f"the internal {nouns} {_few(dropped)} of {views.image.path} {verb} deleted"


def _what_stays(facts: MergeFacts, options: MergeOptions) -> Iterator[str]:
    """What somebody who asked for less than that could expect to be gone."""
    if options.keep_name and not options.delete and facts.direction is Direction.PULL:
        what = "stays as it is" if len(facts.merged_images) == 1 else "stay as they are"
        yield f"{_run_of_images(facts.merged_images)} {what}: --delete deletes what is pulled up"
    for image in _doomed(facts, options):
        known = facts.removals.belongings.get(image.identity)
        if known is None:
            continue
        if known.kept_data_file is not None:
            yield known.kept_data_file
        elif known.data_file is not None and not options.delete:
            yield f"{known.data_file} stays, the data file of {image.path}: --delete deletes it"


def _left_behind(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    """What would destroy the newer of two images."""
    evidence = facts.evidence
    if evidence is None or options.despite_newer_base or not evidence.speaks_for_base:
        return
    # A pull leaves base as it is, unless it is to be deleted.
    if facts.direction is Direction.PULL and facts.base not in _doomed(facts, options):
        return
    yield BaseNewer(
        str(facts.base.path),
        str(facts.top.path),
        evidence.held,
        evidence.held + evidence.differing,
        _time(evidence.times[0].written),
        _time(max(one.written or 0 for one in evidence.times[1:])),
    )


def _doubts(facts: MergeFacts, options: MergeOptions) -> Iterator[str]:
    """What may have an innocent reason, or be a sign that one of the images is a wrong one."""
    evidence = facts.evidence
    if evidence is None or any(True for _ in _left_behind(facts, options)):
        return
    base, top = facts.base.path, facts.top.path
    misfits = evidence.misfits
    signs = [_misfit(lower, upper) for lower, upper in misfits[:_NAMED_ONE_BY_ONE]]
    if len(misfits) > len(signs):
        signs.append(f"{len(misfits) - len(signs)} more images are like that")
    if evidence.holds_most:
        seen = f"{evidence.held} of {evidence.held + evidence.differing}"
        signs.insert(0, f"{base} already holds {seen} clusters looked at of what is above it")
    if not signs:
        return
    untold = " (block devices have no times)" if evidence.is_timeless else ""
    later = ""
    if evidence.holds_most and evidence.equal is None and evidence.written_later:
        later = "; the merge compares all of it, and is refused where it differs"
    yield (
        f"{'; '.join(signs)}{untold}: if somebody has merged {top} before, or replaced {base}, the "
        "wrong data is kept; a restore, a copy, a change of bitmaps or a commit of another layer "
        f"explains it as well{later}"
    )


def _misfit(lower: ImageTimes, upper: ImageTimes) -> str:
    signs = []
    for verb, below, above in (
        ("written", lower.written, upper.written),
        ("created", lower.created, upper.created),
    ):
        if _after(below, above):
            signs.append(f"was {verb} ({_time(below)}) after {upper.path} ({_time(above)})")
    if lower.virtual_size > upper.virtual_size:
        sizes = f"{lower.virtual_size} bytes) than {upper.path} ({upper.virtual_size} bytes"
        signs.append(f"has a larger disk ({sizes})")
    return f"{lower.path} {' and '.join(signs)}"


def _time(nanoseconds: int | None) -> str:
    """A moment in the time zone that people here have."""
    seconds = (nanoseconds or 0) / 10**9
    try:
        return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(" ", "milliseconds")
    except (ValueError, OverflowError, OSError):
        # Files can have times that no calendar has.
        return f"{seconds:.3f} s after 1970"


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


def _changed(facts: MergeFacts, options: MergeOptions) -> tuple[ImageInfo, ...]:
    """The images besides top that show other content afterwards, or are deleted."""
    if facts.direction is Direction.PULL:
        return _doomed(facts, options)
    return facts.chain.images[facts.base_index : -1]


def _others_unseen(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    """What may stand where nobody has looked."""
    changed = _changed(facts, options)
    if facts.merged and _rename(facts, options) is None:
        # Base does not change any more. Children that are not seen would still lose top.
        yield from inactive_users(changed, facts.top, facts.relatives)
        return
    yield from unseen_users(changed, facts.top, facts.relatives, _without_change(facts))


def _without_change(facts: MergeFacts) -> str:
    """How to do without a change of base, as the beginning of a hint."""
    if facts.direction is Direction.PULL:
        return "leave out --delete and --keep-name, which a pull does not need"
    if facts.pull_obstacle is None:
        return f"pull instead (--direction pull), which leaves {facts.base.path} as it is"
    return f"find out which images use {facts.base.path}"


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


def _snapshot_refusals(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    if options.drop_snapshots:
        return
    doomed = _doomed(facts, options)
    option = "--delete" if options.delete else "--keep-name"
    for views in facts.snapshots:
        image = str(views.image.path)
        changed = _changed_snapshots(views, facts)
        names = tuple(name for at, name in enumerate(views.names) if at in changed)
        if not views.removable and (names or views.image in doomed):
            yield SnapshotsOfVmWouldChange(image, _few(names or views.names))
        elif views.image in doomed:
            instead = "" if names else f"leave out {option}, or "
            yield SnapshotsWouldGo(image, _few(views.names), option, instead)
        elif names:
            instead = ""
            pulls = facts.direction is Direction.PULL
            if views.left_by_other_way and (pulls or facts.pull_obstacle is None):
                other = Direction.COMMIT if pulls else Direction.PULL
                instead = f"merge the other way (--direction {other}), which changes none; or "
            yield SnapshotsWouldChange(image, _few(names), instead)


def _settle_refusals(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    yield from _no_place_for_records(facts, options)
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
    if renames:
        yield from _rename_refusals(facts)
    files = [image.real_path for image in (*doomed, *((facts.base,) if renames else ()))]
    for path in (*files, *going(facts, options).paths):
        if path in facts.removals.obstacles:
            yield CannotTakeAway(str(path), option, facts.removals.obstacles[path])


def _rename_refusals(facts: MergeFacts) -> Iterator[ChainmergeError]:
    base, top, mounts = facts.base, facts.top, facts.removals.mounts
    here, there = base.real_path.parent, top.real_path.parent
    if base.identity[0] != top.identity[0] or mounts.get(here) != mounts.get(there):
        yield CannotRename(str(base.path), str(top.path))
    if facts.relatives.siblings:
        others = _names(facts.relatives.siblings)
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
        yield DoomedInUse(_names(doomed), _names(others))


def _space_refusals(facts: MergeFacts, options: MergeOptions) -> Iterator[ChainmergeError]:
    if options.data != "auto" and Placement(options.data) not in facts.spaces:
        yield PlacementUnavailable(str(facts.result.path), options.data, facts.engine_reason)
    refusal = facts.volume.refusal(_required(facts, options), allocated_bytes(facts, options))
    if refusal is not None:
        fixed = facts.volume.kind is VolumeKind.BLOCK and facts.result.header is None
        yield RawDeviceTooSmall(**vars(refusal)) if fixed else refusal
    yield from _hiding_refusals(facts)


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
        volume = replace(volume, kind=VolumeKind.BLOCK, capacity_limit=volume.size)
    refusal = volume.refusal(hiding.required)
    if refusal is not None:
        yield refusal


def _names(images: tuple[ImageInfo, ...]) -> str:
    return ", ".join(str(image.path) for image in images)


def _run_of_images(images: tuple[ImageInfo, ...]) -> str:
    """Images that follow each other in the chain: by name while a reader can take them in."""
    if len(images) <= _NAMED_ONE_BY_ONE:
        return _names(images)
    return f"{images[0].path} to {images[-1].path} ({len(images)} images)"


def _few(names: tuple[str, ...]) -> str:
    """Names, the first of them only where there are many."""
    listed = ", ".join(map(repr, names[:_NAMED_ONE_BY_ONE]))
    more = len(names) - _NAMED_ONE_BY_ONE
    return f"{listed} and {more} more" if more > 0 else listed


def _quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
