# SPDX-License-Identifier: Apache-2.0
"""What follows the merge: new backing files, deleted or renamed files, removed snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.chain.names import name_to_store
from chainmerge.documents.plan import PlannedSnapshots, Repoint
from chainmerge.options import Direction
from chainmerge.planning.removals import Going, going_with

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.chain.model import ImageInfo
    from chainmerge.options import MergeOptions
    from chainmerge.planning.facts import MergeFacts, SnapshotViews


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
        if (changed := changed_snapshots(views, facts))
    )


def changed_snapshots(views: SnapshotViews, facts: MergeFacts) -> frozenset[int]:
    if facts.direction is Direction.PULL or not (facts.merged or facts.content_merged):
        return views.changed
    # Base does not change any more, but top may be put on base, past the images between.
    is_put_on_base = views.image == facts.top and len(facts.merged_images) > 1
    return views.changed if is_put_on_base else frozenset()


def planned_snapshots(
    views: SnapshotViews, facts: MergeFacts, options: MergeOptions
) -> PlannedSnapshots:
    changed = changed_snapshots(views, facts)
    if views.image in removed_images(facts, options):
        changed = frozenset(range(len(views.names)))
    going = tuple(name for at, name in enumerate(views.names) if at in changed)
    stays = views.image not in removed_images(facts, options)
    return PlannedSnapshots(
        image=str(views.image.path),
        kept=tuple(name for at, name in enumerate(views.names) if at not in changed),
        lost=() if options.drop_snapshots else going,
        dropped=going if options.drop_snapshots else (),
        freed=views.freed if stays and changed else 0,
    )


def planned_repoints(facts: MergeFacts, options: MergeOptions) -> tuple[Repoint, ...]:
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


def planned_deletions(facts: MergeFacts, options: MergeOptions) -> tuple[str, ...]:
    files = (_file_of(image, facts) for image in deleted_images(facts, options))
    return tuple(map(str, (*files, *going(facts, options).paths)))


def _file_of(image: ImageInfo, facts: MergeFacts) -> Path:
    """An image's path, or, where that is a link, what it leads to."""
    volume = facts.removals.volumes.get(image.identity)
    if volume is not None:
        return volume.path
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
    return None if planned_rename(facts, options) is None else facts.top


def removed_images(facts: MergeFacts, options: MergeOptions) -> tuple[ImageInfo, ...]:
    """The images whose files go: deleted, or replaced by base."""
    replaced = _replaced(facts, options)
    return (*deleted_images(facts, options), *((replaced,) if replaced is not None else ()))


def planned_rename(facts: MergeFacts, options: MergeOptions) -> tuple[str, str] | None:
    """Base's path and the one that it gets, in place of top's file.

    A pull has its result under top's name anyway.
    """
    if not options.keep_name or facts.direction is Direction.PULL:
        return None
    return str(facts.base.path), str(facts.top.path)


def new_backing(facts: MergeFacts) -> tuple[str, str] | None:
    """Name and format of the backing file that top gets by a pull: base's. None for none."""
    if not facts.base_index:
        return None
    below = facts.chain.images[facts.base_index - 1]
    return name_to_store(facts.top, below), below.format


def changed_images(facts: MergeFacts, options: MergeOptions) -> tuple[ImageInfo, ...]:
    """The images besides top that show other content afterwards, or are deleted."""
    if facts.direction is Direction.PULL:
        return removed_images(facts, options)
    return facts.chain.images[facts.base_index : -1]
