# SPDX-License-Identifier: Apache-2.0
"""Bitmaps of images that nobody has open: add, remove, clear, merge.

Every change is one atomic switch of the image's whole set of bitmaps
(:mod:`chainmerge.engines.metadata`), however many bitmaps it concerns.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.bitmaps.errors import BitmapExists, BitmapMissing, GranularityInvalid, SizesDiffer
from chainmerge.bitmaps.opening import editable, locked_reader, require_usable
from chainmerge.bitmaps.stored import bitmaps_of
from chainmerge.chain.reading import identity_at
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.options import Access
from chainmerge.qcow2.bitmaps import BitmapFlag, storable_granularity
from chainmerge.qcow2.bits import BitSet, union_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.chain.opening import OpenImage
    from chainmerge.documents.bitmaps import BitmapChange


def bitmaps_add(
    image: str | Path,
    name: str,
    granularity: int = 65536,
    *,
    enabled: bool = True,
    access: Access | None = None,
) -> BitmapChange:
    """Add an empty bitmap.

    Args:
        image: the image that gets it.
        name: 1 to 1023 bytes, not yet in the image.
        granularity: guest bytes a bit, a power of two from 512 to 2 GiB.
        enabled: whether guest writes are recorded in it.
        access: how images may be found and reached.

    Raises:
        Refused: nothing was changed.
    """
    with editable(image, access or Access()) as edit:
        size = edit.info.virtual_size
        if edit.info.has_bitmap(name):
            raise BitmapExists(str(image), name)
        if granularity & (granularity - 1) or granularity != storable_granularity(
            size, granularity
        ):
            raise GranularityInvalid(str(image), granularity)
        flags = BitmapFlag.AUTO if enabled else BitmapFlag(0)
        added = StoredBitmap(name, BitSet.empty(size, granularity), flags)
        return edit.replace_by((*edit.stored(), added), "add", (name,))


def bitmaps_remove(
    image: str | Path,
    names: Sequence[str],
    access: Access | None = None,
    *,
    force: bool = False,
) -> BitmapChange:
    """Remove bitmaps by name.

    Args:
        image: the image that loses them.
        names: all must be there.
        access: how images may be found and reached.
        force: remove them even where an image above has the name and would pass for a whole
            checkpoint.

    Raises:
        Refused: nothing was changed.
    """
    with editable(image, access or Access()) as edit:
        present = {entry.name for entry in edit.info.bitmaps}
        for name in names:
            if name not in present:
                raise BitmapMissing(str(image), name)
        if not force:
            edit.require_safe_removal(names)
        return edit.replace_by(edit.stored_but(names), "remove", tuple(names))


def bitmaps_remove_all(
    image: str | Path, access: Access | None = None, *, force: bool = False
) -> BitmapChange:
    """Remove all bitmaps, readable or not.

    Args:
        image: the image that loses them.
        access: how images may be found and reached.
        force: as in :func:`bitmaps_remove`.

    Raises:
        Refused: nothing was changed.
    """
    with editable(image, access or Access()) as edit:
        names = tuple(entry.name for entry in edit.info.bitmaps)
        if not force:
            edit.require_safe_removal(names)
        return edit.replace_by((), "remove", names)


def bitmaps_clear(
    image: str | Path,
    names: Sequence[str],
    access: Access | None = None,
    *,
    force: bool = False,
) -> BitmapChange:
    """Forget what bitmaps have recorded; they stay, with their granularities and flags.

    As `qemu-img bitmap --clear` does: for a bitmap that is used over and over, after each backup.
    The chain test passes as before, so this is refused if the bitmap is only part of a checkpoint:
    the rest would be taken for the whole.

    Args:
        image: the image that holds them.
        names: all must be there, and none in-use.
        access: how images may be found and reached.
        force: clear them even where other images of the chain have the name too.

    Raises:
        Refused: nothing was changed.
    """
    with editable(image, access or Access()) as edit:
        held = edit.stored_by_name(names)
        if not force:
            edit.require_whole_checkpoints(names)
        size = edit.info.virtual_size
        for name in names:
            empty = BitSet.empty(size, held[name].granularity)
            held[name] = StoredBitmap(name, empty, held[name].flags)
        change = edit.replace_by(tuple(held.values()), "clear", tuple(names))
    warning = (
        f"a backup that builds on {', '.join(map(repr, names))} has only what is written from now "
        "on: unless one was taken right before, the next one must be a full one"
    )
    return replace(change, warnings=(warning,))


def bitmaps_merge(
    image: str | Path,
    target: str,
    sources: Sequence[str],
    source_image: str | Path | None = None,
    access: Access | None = None,
) -> BitmapChange:
    """Add the bits of *sources* to the bitmap *target* of an image.

    Args:
        image: holds the target.
        target: an existing bitmap of it; keeps its granularity.
        sources: names of bitmaps in the source image.
        source_image: the image that holds them; *image* itself if None.
        access: how images may be found and reached.

    Raises:
        Refused: nothing was changed.
    """
    access = access or Access()
    with contextlib.ExitStack() as stack:
        edit = stack.enter_context(editable(image, access))
        held = edit.stored_by_name([target])
        source = edit.opened
        # Who has the image to himself would wait for himself, by whatever name it is given again.
        if source_image is not None and identity_at(Path(source_image)) != edit.info.identity:
            source = stack.enter_context(locked_reader(source_image, access))
        size = edit.info.virtual_size
        if source.info.virtual_size > size:
            raise SizesDiffer(str(image), str(source.info.path), size, source.info.virtual_size)
        old = held[target]
        bits = [edit.opened.bits(target), *(_usable_bits(source, name) for name in sources)]
        held[target] = StoredBitmap(target, union_all(bits, size, old.granularity), old.flags)
        return edit.replace_by(tuple(held.values()), "merge", (target,))


def _usable_bits(source: OpenImage, name: str) -> BitSet:
    require_usable(source.info, bitmaps_of(source), name)
    return source.bits(name)
