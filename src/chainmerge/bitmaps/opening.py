# SPDX-License-Identifier: Apache-2.0
"""Images that are locked and open, and whose bitmaps can be replaced."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.bitmaps.errors import (
    BitmapMissing,
    BitmapsChanged,
    BitmapsImpossible,
    BitmapWorthless,
    BrokenBitmapsInTheWay,
    ClearingUnsafe,
    MergeToFinishFirst,
    RemovalUnsafe,
)
from chainmerge.bitmaps.rules import BitmapState, LayerBitmaps
from chainmerge.bitmaps.sets import tombstone
from chainmerge.bitmaps.stored import bitmap_results, bitmaps_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.model import Chain, ImageInfo
from chainmerge.chain.opening import OpenChain, OpenImage, open_chain
from chainmerge.chain.reading import open_for_writing
from chainmerge.chain.relatives import Relatives
from chainmerge.chain.target import Target, metadata_policy_of, relatives_of
from chainmerge.chain.unseen_users import unseen_users
from chainmerge.documents.bitmaps import BitmapChange
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.engines.metadata.bitmap_set import AnyBitmap, KeptBitmap, StoredBitmap
from chainmerge.engines.metadata.replacement import replace_bitmaps, require_replaceable
from chainmerge.errors import Refused
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.unfinished import status
from chainmerge.storage.files import FileReadable, drop_cached
from chainmerge.storage.limits import allow_open_files
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.storage.other_hosts import held_by_this_host
from chainmerge.storage.other_users import require_alone

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.options import Access
    from chainmerge.storage.locks import ImageLock

_FIND_OUT: Final = "find out which other images use it"


def require_users_known(target: Target) -> None:
    """Raise what :func:`unseen_users` gives where base is going to be changed."""
    top = target.chain.top
    for refusal in unseen_users((target.base,), top, target.relatives, _FIND_OUT):
        raise refusal


@contextlib.contextmanager
def locked_to_drop_bitmaps(
    chain: Chain, images: Sequence[ImageInfo], access: Access
) -> Iterator[list[ImageLock]]:
    """Have *images*, of *chain*, for us alone, to drop from all of them what no backup can use.

    Raises what says that they are used, or MergeToFinishFirst.
    """
    paths = [image.path for image in images]
    with contextlib.ExitStack() as stack:
        allow_open_files(len(chain.images))
        stack.enter_context(held_by_this_host(paths, access))
        locks = [
            stack.enter_context(lock_image(path, LockMode.WRITER, access.lock_wait))
            for path in paths
        ]
        require_alone(paths)
        # Locked, so that nobody begins a merge after this.
        require_no_unfinished_merge(chain)
        # What an earlier run removed and could not flush would come back below what this one
        # removes, and pass for whole.
        for path in paths:
            drop_cached(path)
        yield locks


def require_no_unfinished_merge(chain: Chain, lowest: int = 0) -> None:
    """Bitmaps that look broken may be saved, and come back when the merge is finished.

    Args:
        chain: the images.
        lowest: the index of the lowest one into which, or out of which, no merge may be
            unfinished.

    Raises MergeToFinishFirst.
    """
    bases = {str(image.real_path) for image in chain.images[lowest:]}
    for unfinished in status([image.path for image in chain.images]).merges:
        if lowest and unfinished.base not in bases:
            continue
        command = (
            f"`chainmerge status {shlex.quote(unfinished.base)}` says how to finish or cancel it"
        )
        raise MergeToFinishFirst(str(chain.top.path), unfinished.base, command)


@contextlib.contextmanager
def refusals_after_a_change_of(image: ImageInfo) -> Iterator[None]:
    """Refused means that nothing was changed."""
    try:
        yield
    except Refused as error:
        raise BitmapsChanged(str(image.path), error.sentence) from error


class BitmapEdit(Struct, frozen=True):
    """An image that is locked and open, whose bitmaps can be replaced."""

    opened: OpenImage
    relatives: Relatives
    below: tuple[ImageInfo, ...] = ()

    @property
    def info(self) -> ImageInfo:
        return self.opened.info

    def stored_by_name(self, wanted: Sequence[str]) -> dict[str, AnyBitmap]:
        """The set as it is, in which the *wanted* ones are, and are usable.

        Raises BitmapMissing, BitmapWorthless, BrokenBitmapsInTheWay.
        """
        layer = bitmaps_of(self.opened)
        for name in wanted:
            require_usable(self.info, layer, name)
        return {bitmap.name: bitmap for bitmap in self.stored()}

    def stored(self) -> tuple[AnyBitmap, ...]:
        """The set as it is."""
        return self.stored_but(())

    def stored_but(self, without: Sequence[str]) -> tuple[AnyBitmap, ...]:
        """The set without some names, each bitmap in the clusters that it has.

        Raises BrokenBitmapsInTheWay if one that has to stay is broken.
        """
        layer = bitmaps_of(self.opened)
        staying = [entry for entry in self.info.bitmaps if entry.name not in without]
        broken = [e.name for e in staying if layer.state(e.name) is BitmapState.IN_USE]
        if broken:
            raise BrokenBitmapsInTheWay(str(self.info.path), ", ".join(map(repr, broken)))
        return tuple(KeptBitmap(entry) for entry in staying)

    def tombstones(self, names: Sequence[str]) -> tuple[StoredBitmap, ...]:
        """Tombstones for some of the bitmaps that the image has."""
        return tuple(
            tombstone(entry.name, self.info.virtual_size, entry.granularity)
            for entry in self.info.bitmaps
            if entry.name in names
        )

    def require_safe_removal(self, names: Sequence[str]) -> None:
        """Refuse to remove evidence below an image that would then pass the chain test."""
        for above in self.relatives.above:
            shared = sorted(set(names) & {entry.name for entry in above.image.bitmaps})
            if shared:
                raise RemovalUnsafe(
                    str(self.info.path), ", ".join(map(repr, shared)), str(above.image.path)
                )

    def require_whole_checkpoints(self, names: Sequence[str]) -> None:
        """Refuse to empty a part of a checkpoint: what other images have of it looks whole."""
        others = (*self.below, *(above.image for above in self.relatives.above))
        for name in names:
            holders = [str(image.path) for image in others if image.has_bitmap(name)]
            if holders:
                raise ClearingUnsafe(str(self.info.path), name, ", ".join(holders))

    def require_replaceable_by(self, bitmaps: Sequence[AnyBitmap]) -> None:
        """Raise what :meth:`replace_by` would refuse, as far as that can be known before."""
        assert self.opened.image is not None
        require_replaceable(self.opened.image, bitmaps)

    def replace_by(
        self, bitmaps: Sequence[AnyBitmap], action: str, names: tuple[str, ...]
    ) -> BitmapChange:
        """Store a set, and read it back."""
        with open_for_writing(self.info) as port:
            replace_bitmaps(port, bitmaps)
        with (
            refusals_after_a_change_of(self.info),
            FileReadable(self.info.real_path) as readable,
        ):
            results = bitmap_results(Qcow2Image(readable))
        return BitmapChange(REPORT_VERSION, str(self.info.path), action, names, results)


@contextlib.contextmanager
def editable(image: str | Path, access: Access) -> Iterator[BitmapEdit]:
    policy = metadata_policy_of(access, image)
    with (
        held_by_this_host([Path(image)], access),
        lock_image(image, LockMode.WRITER, access.lock_wait),
    ):
        require_alone([Path(image)])
        drop_cached(image)
        chain = discover(Path(image), policy)
        require_support(chain.top)
        relatives = relatives_of(chain, len(chain.images) - 1, access, policy)
        with open_top(chain) as opened:
            yield BitmapEdit(opened, relatives, chain.images[:-1])


@contextlib.contextmanager
def locked_reader(image: str | Path, access: Access) -> Iterator[OpenImage]:
    with (
        lock_image(image, LockMode.READER, access.lock_wait),
        open_top(discover(Path(image), metadata_policy_of(access))) as opened,
    ):
        yield opened


@contextlib.contextmanager
def open_top(chain: Chain) -> Iterator[OpenImage]:
    with open_chain(Chain(chain.images[-1:])) as opened:
        yield only_image(opened)


def only_image(opened: OpenChain) -> OpenImage:
    (image,) = opened.images
    return image


def require_usable(image: ImageInfo, layer: LayerBitmaps, name: str) -> None:
    state = layer.state(name)
    if state is BitmapState.ABSENT:
        raise BitmapMissing(str(image.path), name)
    if state is BitmapState.IN_USE:
        raise BitmapWorthless(str(image.path), name)


def require_support(image: ImageInfo) -> None:
    if not image.supports_bitmaps:
        kind = "a version 2 image" if image.header is not None else image.format
        raise BitmapsImpossible(str(image.path), kind)
