# SPDX-License-Identifier: Apache-2.0
"""The images of a running VM that a merge is about."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.chain.model import ImageInfo
from chainmerge.chain.target import Target
from chainmerge.live.nodes import BlockGraph, BlockNode
from chainmerge.qcow2.bitmaps import storable_granularity

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.options import LiveOptions


class LiveTarget(Struct, frozen=True):
    """A merge in a running VM: the images on disk, and their nodes.

    Attributes:
        target: The chain on disk up to top, base's place in it, and who else is around.
        graph: The VM's block graph.
        nodes: The nodes of the chain's images, root first.
        above: The images on top in the VM, the one directly on top first.
        nodes_above: Their nodes.
    """

    target: Target
    graph: BlockGraph
    nodes: tuple[BlockNode, ...]
    above: tuple[ImageInfo, ...]
    nodes_above: tuple[BlockNode, ...]

    @property
    def base(self) -> BlockNode:
        """Base's node."""
        return self.nodes[self.target.base_index]

    @property
    def merged(self) -> tuple[BlockNode, ...]:
        """The nodes of the merged images, lowest first."""
        return self.nodes[self.target.base_index + 1 :]

    @property
    def top(self) -> BlockNode:
        """Top's node."""
        return self.nodes[-1]

    @property
    def is_active(self) -> bool:
        """Whether top is what the guest writes to."""
        return not self.above

    @property
    def active(self) -> BlockNode:
        """The node that the guest writes to."""
        return self.nodes_above[-1] if self.nodes_above else self.top

    @property
    def merged_images(self) -> tuple[ImageInfo, ...]:
        """The merged images, lowest first."""
        return self.target.chain.images[self.target.base_index + 1 :]

    def granularity_of(self, name: str) -> int:
        """The granularity that a name has in the chain, in bytes, for a tombstone of it."""
        size = max(self.base.virtual_size, self.top.virtual_size)
        found = (bitmap.granularity for node in self.nodes if (bitmap := node.bitmap(name)))
        return storable_granularity(size, next(found, 1 << 16))

    @property
    def images(self) -> tuple[ImageInfo, ...]:
        """All images of the disk, the root first."""
        return (*self.target.chain.images, *self.above)

    def result(self, options: LiveOptions) -> ImageInfo:
        """The image that is written: base, or top in a pull."""
        return self.target.chain.top if options.pulls else self.target.base

    def job_id(self, options: LiveOptions) -> str:
        """What the VM is to call the job: by the image that is written, and by no other's name.

        A file's number alone is that of a file on another file system as well.
        """
        device, number = self.result(options).identity
        purpose = "pull-" if options.pulls else ""
        return f"chainmerge-{purpose}{device:x}-{number:x}"

    def images_deleted(self, options: LiveOptions) -> tuple[ImageInfo, ...]:
        """The images that nothing is left to be read of, if they are to go."""
        if not options.delete:
            return ()
        if options.pulls:
            return self.target.chain.images[self.target.base_index : -1]
        return self.merged_images

    def images_written(self, options: LiveOptions) -> tuple[Path, ...]:
        """Base, the merged images, whose bitmaps may go, and the one that is put on base.

        A pull writes to top alone.
        """
        if options.pulls:
            return (self.target.chain.top.path,)
        images = (self.target.base, *self.merged_images, *self.above[:1])
        return tuple(image.path for image in images)
