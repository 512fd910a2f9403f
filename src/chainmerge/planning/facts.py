# SPDX-License-Identifier: Apache-2.0
"""What was found on disk: all that a plan rests on. All sizes are in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from msgspec import Struct

from chainmerge.bitmaps.rules import Decision
from chainmerge.chain.model import Chain, Identity, ImageInfo
from chainmerge.chain.relatives import Relatives
from chainmerge.documents.plan import NOTHING_LEAKED, EngineName, LeakFacts, Movement
from chainmerge.errors import ChainmergeError
from chainmerge.options import Direction, Placement
from chainmerge.planning.removals import NOTHING_GOES, Removals
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import CheckReport
from chainmerge.storage.lvm_volumes import Footprint
from chainmerge.storage.volume_facts import VolumeFacts


class SpaceFacts(Struct, frozen=True):
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
    blocks that it shares. None if that is what ``required`` exceeds the file's size by."""
    end_after: int | None = None
    """Where the image ends after the merge, exactly; None if that is not known."""
    allocates_if_pruned: int | None = None
    """The same as ``allocates`` for ``required_if_pruned``."""
    required_if_pruned: int | None = None
    """The same as ``required`` if stale bitmaps are taken out first, by a switch of their own;
    None if there is nothing to take out or the engine does so anyway."""

    @property
    def least(self) -> int:
        """What is needed at least."""
        if self.required_if_pruned is None:
            return self.required
        return min(self.required, self.required_if_pruned)


class SnapshotViews(Struct, frozen=True):
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


class ImageTimes(Struct, frozen=True):
    """When an image was written last, and created; and how large its disk is.

    In nanoseconds since 1970, None if nothing tells that; and in bytes.
    """

    path: str
    written: int | None
    created: int | None
    virtual_size: int


class Evidence(Struct, frozen=True):
    """What tells whether the overlays are newer than base, as they should be.

    Attributes:
        times: Those of base and the images above it up to top.
        held: Of the clusters that were looked at, all of which the overlays define, those that
            base has the same of its own.
        differing: Those that are not the same.
        equal: Whether base shows all that top shows; None if not everything was compared.
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
    later = is_later(lower.written, upper.written) or is_later(lower.created, upper.created)
    return later or lower.virtual_size > upper.virtual_size


def is_later(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one > other


class HidingFacts(Struct, frozen=True):
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


NOTHING_OCCUPIED: Final[Mapping[Identity, int]] = MappingProxyType({})
NO_FOOTPRINTS: Final[Mapping[Identity, Footprint]] = MappingProxyType({})


class MergeFacts(Struct, frozen=True):
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
    leaks: LeakFacts = NOTHING_LEAKED
    content_merged: bool | None = None
    """Whether base shows what top shows, whatever its bitmaps are; None if nobody compared."""
    removals: Removals = NOTHING_GOES
    """What is known of the names that the merge may take away."""
    snapshots: tuple[SnapshotViews, ...] = ()
    evidence: Evidence | None = None
    """Which of the images looks newer; None if what we recorded tells."""
    hiding: HidingFacts | None = None
    """What has to be hidden before base's volume is extended; None for nothing."""
    guest_writes: bool = False
    """Whether a running VM writes to the result, so that what is on disk lags behind."""
    shares: bool = False
    """Whether the file system lets the result share the data that moves."""
    occupied: Mapping[Identity, int] = NOTHING_OCCUPIED
    """What the files of images take of their file systems, by the image; block devices left out."""
    footprints: Mapping[Identity, Footprint] = NO_FOOTPRINTS
    """What the logical volumes of images take of their volume groups, by the image."""
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
