# SPDX-License-Identifier: Apache-2.0
"""Which internal snapshots a merge would change, and what it takes to remove them. Reads only.

A snapshot shows what its own tables name, and for the rest what is below its image. It is that
rest that a merge changes: a commit what base has, a pull what top stands on. Where a snapshot
lacks nothing that changes, it shows afterwards what it shows today.

=================  =======================  ==================================================
the snapshot is    it would show others'    because
in                 data where
=================  =======================  ==================================================
base               nowhere                  it reads through what base stands on, which stays
between or top,    neither it nor an image  base has there afterwards what top shows; where
by a commit        between base and its     neither has anything, nothing changes
                   own has anything, and
                   its image or one above
                   it has
top, by a commit   it has nothing and top   top is put on base, which has there what top shows
of a range         has
top, by a pull     it has nothing, and      top stands on base's backing file
                   base or an image
                   between has
=================  =======================  ==================================================

What a running VM writes to top meanwhile goes into base too. There a snapshot of top must lack
nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.distinct import distinct
from chainmerge.chain.layers import layer_of_qcow2
from chainmerge.chain.reading import open_image
from chainmerge.chain.view import GuestView, in_step
from chainmerge.engines.metadata.errors import NotEnoughSpace
from chainmerge.engines.metadata.snapshot_removal import SnapshotRemoval, plan_snapshot_removal
from chainmerge.errors import ChainmergeError
from chainmerge.options import Direction
from chainmerge.planning.errors import ChildSeesMore
from chainmerge.planning.facts import SnapshotViews
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import Kind
from chainmerge.qcow2.snapshots import Snapshot, image_of_snapshot, read_snapshots

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.arithmetic.arrays import BoolArray
    from chainmerge.chain.opening import OpenChain, OpenImage
    from chainmerge.chain.target import Target
    from chainmerge.chain.view import Resolved

# Each takes reading its tables. Further ones count as if they would show other data.
_MOST_LOOKED_AT: Final = 256


class SnapshotFacts(Struct, frozen=True):
    """What was found out about the internal snapshots of base, of top, and between them.

    ``removals`` says by path how those would be removed that show other data afterwards.
    """

    views: tuple[SnapshotViews, ...]
    removals: Mapping[str, SnapshotRemoval]
    obstacles: tuple[ChainmergeError, ...]


def look_at_snapshots(
    target: Target, opened: OpenChain, direction: Direction, *, to_remove: bool
) -> SnapshotFacts:
    """Which snapshots a merge of closed images would change.

    Args:
        target: the merge.
        opened: its images.
        direction: which way it goes.
        to_remove: whether those that it would change are to be removed.

    Raises:
        BadSnapshotTable: a table of snapshots cannot be read.
    """
    judge = _Judge(target, opened)
    other_way = Direction.PULL if direction is Direction.COMMIT else Direction.COMMIT
    changed = {index: judge.changed(index, direction) for index in judge.holders}
    left_by_other_way = any(changed.values()) and not any(
        judge.changed(index, other_way) for index in judge.holders
    )
    removals: dict[str, SnapshotRemoval] = {}
    obstacles: list[ChainmergeError] = []
    for index, positions in changed.items():
        if not (to_remove and positions):
            continue
        image = opened.images[index]
        try:
            removal = _removal(image, positions)
        except ChainmergeError as error:
            obstacles.append(error)
            continue
        removals[str(image.info.path)] = removal
        is_written = index == target.result_index(direction)
        missing = removal.required_size - image.readable.size
        if image.info.is_block_device and not is_written and missing > 0:
            obstacles.append(NotEnoughSpace(str(image.info.path), missing))
    views = tuple(
        SnapshotViews(
            image=opened.images[index].info,
            names=tuple(one.label for one in judge.snapshots(index)),
            changed=positions,
            left_by_other_way=left_by_other_way,
            removable=True,
            freed=_freed(removals.get(str(opened.images[index].info.path))),
        )
        for index, positions in changed.items()
    )
    return SnapshotFacts(views, removals, tuple(obstacles))


def look_at_snapshots_live(
    target: Target, opened: OpenChain, direction: Direction, *, guest_writes: bool
) -> tuple[SnapshotViews, ...]:
    """Which snapshots a merge in a running VM would change.

    Args:
        target: the merge.
        opened: its images.
        direction: which way it goes. A pull changes nothing by what the guest writes meanwhile.
        guest_writes: whether the guest can write to top while it goes on.

    Raises:
        BadSnapshotTable: a table of snapshots cannot be read.
    """
    judge = _Judge(target, opened)
    return tuple(
        SnapshotViews(
            image=opened.images[index].info,
            names=tuple(one.label for one in judge.snapshots(index)),
            changed=(
                judge.lacking(index)
                if guest_writes and direction is Direction.COMMIT
                else judge.changed(index, direction)
            ),
            left_by_other_way=False,
            removable=False,
            freed=0,
        )
        for index in judge.holders
    )


def children_with_larger_snapshots(target: Target) -> Iterator[ChildSeesMore]:
    """Children of top whose snapshots have larger disks than top, where base has one too.

    Of children that are larger themselves the plan knows already.
    """
    base, top = target.base, target.chain.top
    if base.virtual_size <= top.virtual_size:
        return
    for child in target.relatives.children:
        if child.header is None or not child.header.snapshot_count:
            continue
        with open_image(child) as readable:
            largest = max(
                read_snapshots(Qcow2Image(readable)), key=lambda snapshot: snapshot.disk_size
            )
        if largest.disk_size > top.virtual_size >= child.virtual_size:
            yield ChildSeesMore(
                str(base.path),
                str(top.path),
                f"internal snapshot {largest.label!r} of {child.path}",
                base.virtual_size,
                top.virtual_size,
                largest.disk_size,
            )


def _removal(image: OpenImage, positions: frozenset[int]) -> SnapshotRemoval:
    assert image.image is not None
    return plan_snapshot_removal(image.image, positions)


def _freed(removal: SnapshotRemoval | None) -> int:
    return 0 if removal is None else len(removal.freed) * removal.image.header.cluster_size


class _Judge:
    """Compares what snapshots lack with what would change below them."""

    def __init__(self, target: Target, opened: OpenChain) -> None:
        self._opened = opened
        self._base = target.base_index
        self._top = len(opened.images) - 1
        self.holders = tuple(
            index
            for index in range(self._base, self._top + 1)
            if (image := opened.images[index].image) is not None and image.header.snapshot_count
        )
        self._snapshots = {index: self._read(index) for index in self.holders}

    def _read(self, index: int) -> tuple[Snapshot, ...]:
        image = self._opened.images[index].image
        assert image is not None
        return read_snapshots(image)

    def snapshots(self, index: int) -> tuple[Snapshot, ...]:
        """The snapshots of the chain's image at *index*."""
        return self._snapshots[index]

    def changed(self, index: int, direction: Direction) -> frozenset[int]:
        """Positions of the image's snapshots that show other data after a merge."""
        if direction is Direction.PULL:
            if index < self._top:
                return frozenset()
            return self._chosen(index, (), self._opened.view(self._base, self._top))
        if index == self._base:
            return frozenset()
        hiding = () if index == self._top else range(self._base + 1, index)
        return self._chosen(index, hiding, self._opened.view(index))

    def lacking(self, index: int) -> frozenset[int]:
        """Positions of the image's snapshots that show anything of what base holds."""
        if index == self._base:
            return frozenset()
        return self._chosen(index, range(self._base + 1, index), None)

    def _chosen(
        self, index: int, hiding: tuple[int, ...] | range, changing: GuestView | None
    ) -> frozenset[int]:
        return frozenset(
            position
            for position, snapshot in enumerate(self._snapshots[index])
            if position >= _MOST_LOOKED_AT or self._shows_changes(index, snapshot, hiding, changing)
        )

    def _shows_changes(
        self,
        index: int,
        snapshot: Snapshot,
        hiding: tuple[int, ...] | range,
        changing: GuestView | None,
    ) -> bool:
        """Whether a snapshot lacks what one of the images *hiding* does not have either.

        And what the images of *changing* have; None for all that there is.
        """
        opened = self._opened.images[index]
        assert opened.image is not None
        size = max(snapshot.disk_size, opened.image.header.virtual_size)
        between = tuple(self._opened.images[one].layer for one in hiding)
        try:
            image = image_of_snapshot(opened.image, snapshot)
            known = image.header.virtual_size
            own = layer_of_qcow2(image, opened.layer.source)
            shown = GuestView((*between, own)).resolve(0, known)
            if changing is None:
                return known < size or any(_lacks(runs).any() for runs in shown)
            for upper, lower in in_step(shown, changing.resolve(0, known)):
                bounds = distinct(np.concatenate([upper.guest, lower.guest]))
                above, below = upper.cut_at(bounds), lower.cut_at(bounds)
                if (_lacks(above) & ~_lacks(below)).any():
                    return True
            # Behind the end of its table a snapshot has nothing.
            return any(not _lacks(runs).all() for runs in changing.resolve(known, size))
        except FormatError:
            # QEMU may read what we cannot make sense of.
            return True


def _lacks(runs: Resolved) -> BoolArray:
    lacking: BoolArray = runs.kind == Kind.UNALLOCATED
    return lacking
