# SPDX-License-Identifier: Apache-2.0
"""The images of a chain, open for reading."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.layers import Layer, layer_of_qcow2, layer_of_raw
from chainmerge.chain.model import Chain, Identity, ImageInfo, identity_of
from chainmerge.chain.reading import open_image
from chainmerge.chain.view import GuestView
from chainmerge.qcow2.bitmaps import BitmapEntry, read_bits
from chainmerge.qcow2.check import CheckReport, check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import Readable
from chainmerge.qcow2.remembered import MappingMemory
from chainmerge.storage.files import FileReadable
from chainmerge.storage.limits import allow_open_files

if TYPE_CHECKING:
    from chainmerge.chain.target import Target
    from chainmerge.qcow2.bits import BitSet
    from chainmerge.storage.locks import ImageLock


class OpenImage(Struct, frozen=True):
    """An image of the chain, open for reading."""

    info: ImageInfo
    readable: Readable
    image: Qcow2Image | None
    layer: Layer
    entries: Mapping[str, BitmapEntry]
    """The image's bitmaps by name: there can be 65,535 of them."""

    def entry(self, name: str) -> BitmapEntry | None:
        """The image's bitmap of that name."""
        return self.entries.get(name)

    def bits(self, name: str) -> BitSet:
        """The content of a bitmap that is known to be there and readable."""
        entry = self.entry(name)
        assert self.image is not None
        assert entry is not None
        return read_bits(self.image, entry)


class OpenChain(Struct, frozen=True):
    """All images of a chain, root first, open for reading."""

    images: tuple[OpenImage, ...]
    memory: MappingMemory

    def check(self, image: OpenImage) -> CheckReport:
        """The consistency check of one of its qcow2 images that nobody writes to.

        Raises:
            TooManyClusters: the file is larger than QEMU would check.
        """
        assert image.image is not None
        return check(image.image, self.memory.take_tables(image.image))

    def view(self, first: int = 0, stop: int | None = None) -> GuestView:
        """What a guest sees of the images from *first* to before *stop*."""
        return GuestView(tuple(image.layer for image in self.images[first:stop]))

    def with_mapped_root(self) -> OpenChain:
        """The same, where QEMU is asked what of a foreign root is zeros: its data is to move."""
        root, *others = self.images
        if not root.info.foreign:
            return self
        # As where it is opened.
        from chainmerge.chain.foreign.layers import (  # noqa: PLC0415
            ForeignLayer,
            MappedForeignLayer,
        )

        assert isinstance(root.layer, ForeignLayer)
        mapped = replace(root, layer=MappedForeignLayer(root.layer.source))
        return OpenChain((mapped, *others), self.memory)


@contextlib.contextmanager
def open_target(target: Target, locks: Sequence[ImageLock] = ()) -> Iterator[OpenChain]:
    """As :func:`open_chain` of a merge's chain. What moves of a foreign base is known then."""
    with open_chain(target.chain, locks) as opened:
        yield opened.with_mapped_root() if target.base.foreign else opened


@contextlib.contextmanager
def open_chain(chain: Chain, locks: Sequence[ImageLock] = ()) -> Iterator[OpenChain]:
    """Open every image of a chain for reading, each being still the one that was found.

    Images that are locked are read through their locks, so that a chain takes one descriptor
    for each image, whether it is locked or not. They are never opened a second time.

    Args:
        chain: the chain.
        locks: locks on some of its images, or on others; all held for longer than the context.

    Raises:
        ImageReplaced: an image is another one now.
        OpenFilesLimited: so many files cannot be open at a time.
        Refused: one cannot be opened.
    """
    locked = {identity_of(os.fstat(lock.fileno())): lock for lock in locks}
    to_open = [image for image in chain.images if image.identity not in locked]
    allow_open_files(len(to_open) + sum(image.data_file is not None for image in chain.images))
    with contextlib.ExitStack() as stack:
        memory = MappingMemory()
        images = tuple(_open(stack, info, locked, memory) for info in chain.images)
        yield OpenChain(images, memory)


def _open(
    stack: contextlib.ExitStack,
    info: ImageInfo,
    locked: Mapping[Identity, ImageLock],
    memory: MappingMemory,
) -> OpenImage:
    lock = locked.get(info.identity)
    readable = stack.enter_context(open_image(info)) if lock is None else lock.reader()
    if info.foreign:
        # Few chains stand on such an image, and no other needs what starts processes.
        from chainmerge.chain.foreign.content import ForeignContent  # noqa: PLC0415
        from chainmerge.chain.foreign.layers import ForeignLayer  # noqa: PLC0415

        content = stack.enter_context(ForeignContent(info))
        return OpenImage(info, readable, None, ForeignLayer(content), {})
    if info.header is None:
        return OpenImage(info, readable, None, layer_of_raw(readable), {})
    image = Qcow2Image(readable, None if lock is None else info.header)
    data: Readable = readable
    if info.data_file is not None:
        data = stack.enter_context(FileReadable(info.data_file))
    entries = {entry.name: entry for entry in info.bitmaps}
    return OpenImage(info, readable, image, layer_of_qcow2(image, data, memory.walk), entries)
