# SPDX-License-Identifier: Apache-2.0
"""The block graph of a running VM, as those see it who merge in it. Sizes are in bytes.

A node is one layer of the VM's block graph: a *format* node (qcow2, raw) gives guest data and
stands on a *protocol* node (file, host_device), which is the file itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final

from msgspec import Struct

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.documents.bitmaps import BitmapResult


class NodeBitmap(Struct, frozen=True):
    """A named dirty bitmap of a node, as the VM has it in memory.

    Attributes:
        name: The bitmap's name.
        granularity: Guest bytes that one bit stands for.
        dirty_bytes: Guest bytes that are marked dirty; None where the VM does not tell.
        recording: Whether it is enabled. One of a node that is open for reading only is, too.
        persistent: Whether it is stored in the image when that is closed.
        inconsistent: Whether it was found in-use when the image was opened: worthless.
        busy: Whether a backup or an export uses it.
    """

    name: str
    granularity: int
    dirty_bytes: int | None
    recording: bool
    persistent: bool
    inconsistent: bool
    busy: bool

    @property
    def state(self) -> BitmapState:
        """Its state as it will be stored."""
        if self.inconsistent:
            return BitmapState.IN_USE
        return BitmapState.VALID if self.recording else BitmapState.DISABLED

    @property
    def result(self) -> BitmapResult:
        """The bitmap, for a report."""
        dirty = None if self.inconsistent else self.dirty_bytes
        return BitmapResult(
            name=self.name,
            state=self.state,
            granularity=self.granularity,
            dirty_bytes=dirty,
            tombstone=self.state is BitmapState.DISABLED and dirty == 0,
        )


class UserKind(StrEnum):
    """What uses a node."""

    NODE = "node"
    JOB = "job"
    DEVICE = "device"
    """The guest's device, an export, or whatever else reaches in from outside the graph."""


class NodeUser(Struct, frozen=True):
    """One user of a node: its name, what it is, and what the node is to it (``backing``, ...)."""

    name: str
    kind: UserKind
    role: str


class BlockNode(Struct, frozen=True):
    """A node of the block graph.

    Attributes:
        name: Its node name.
        driver: QEMU's name of its driver: ``qcow2``, ``raw``, ``file``, ``host_device``, ...
        filename: What QEMU opened, absolute; None where that is no plain path.
        read_only: Whether it is open for reading only now.
        virtual_size: Bytes that it gives to its users.
        backing: The name of the node below, of a format node with a backing file.
        file: The name of the node that holds its data.
        users: Who uses it.
        bitmaps: Its named bitmaps.
        nameless_bitmaps: How many others it has, which belong to jobs and filters.
        reads_a_part: Whether it begins or ends in the middle of its file.
    """

    name: str
    driver: str
    filename: Path | None
    read_only: bool
    virtual_size: int
    backing: str | None
    file: str | None
    users: tuple[NodeUser, ...]
    bitmaps: tuple[NodeBitmap, ...]
    nameless_bitmaps: int = 0
    reads_a_part: bool = False

    @property
    def is_filter(self) -> bool:
        """Whether it passes data through, and is no image.

        One of an unknown driver is, if it stands on one node and that is no format's way.
        """
        if self.driver in _FILTERS:
            return True
        return self.driver not in _FORMATS and (self.backing is None) != (self.file is None)

    @property
    def format(self) -> str:
        """The image's format: a protocol node that is used as an image is a raw one."""
        return "raw" if self.lacks_format_node else self.driver

    @property
    def lacks_format_node(self) -> bool:
        """Whether it is a raw image that is read without a node of that format."""
        return self.driver in PLAIN_PROTOCOLS

    def bitmap(self, name: str) -> NodeBitmap | None:
        """The bitmap of that name."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)

    def bitmap_results(self) -> tuple[BitmapResult, ...]:
        """Its bitmaps, for a report."""
        return tuple(bitmap.result for bitmap in sorted(self.bitmaps, key=lambda one: one.name))

    @property
    def jobs(self) -> tuple[str, ...]:
        """The jobs that use it, by their ids."""
        return tuple(user.name for user in self.users if user.kind is UserKind.JOB)


class BlockGraph(Struct, frozen=True):
    """All nodes of a VM at one moment, by their names; ``root`` is the one the disk reads."""

    nodes: Mapping[str, BlockNode]
    root: str

    def chain(self) -> tuple[BlockNode, ...]:
        """The images of the disk, the active one first.

        Filters, such as one that limits the disk's rate or the one of a job, are left out.
        """
        return tuple(node for node in self._descend(self.root) if not node.is_filter)

    def filters_on(self, image: BlockNode) -> tuple[BlockNode, ...]:
        """The filters through which an image is used, those directly on it first."""
        found = [image]
        for node in found:
            over = (self._filter_named(user) for user in node.users)
            found += [one for one in over if one is not None and one not in found]
        return tuple(found[1:])

    def users_of(self, image: BlockNode) -> tuple[NodeUser, ...]:
        """Who uses an image, directly or through filters. One that nobody uses uses it itself."""
        filters = self.filters_on(image)
        used = {one.name for one in filters if one.users}
        return tuple(
            user
            for node in (image, *filters)
            for user in node.users
            if self._filter_named(user) is None or user.name not in used
        )

    def is_read(self, image: BlockNode) -> bool:
        """Whether a device, an export or another node uses an image, and not a job alone."""
        return any(user.kind is not UserKind.JOB for user in self.users_of(image))

    def has_filter_below(self, image: BlockNode) -> bool:
        """Whether a filter lies between an image and its backing file."""
        return image.backing is not None and self.nodes[image.backing].is_filter

    def idle_filters_on(self, image: BlockNode) -> tuple[BlockNode, ...]:
        """The filters through which nobody uses an image, in the order in which they can go."""
        filters = self.filters_on(image)
        over = (user for node in (image, *filters) for user in node.users)
        is_idle = all(self._filter_named(user) is not None for user in over)
        return tuple(reversed(filters)) if is_idle else ()

    def uppermost_over(self, image: BlockNode) -> BlockNode:
        """The uppermost filter on an image, or the image: QEMU's jobs want to be told of it."""
        return (image, *self.filters_on(image))[-1]

    def protocol_of(self, image: BlockNode) -> BlockNode | None:
        """The node that is the file of an image; None where nothing is known to be.

        A raw image can be its own: QEMU reads a protocol node without a format node as one.
        """
        if image.driver in PLAIN_PROTOCOLS:
            return image
        if image.file is None:
            return None
        lowest = next((one for one in self._descend(image.file) if not one.is_filter), None)
        return lowest if lowest is not None and lowest.driver in PLAIN_PROTOCOLS else None

    def path_of(self, image: BlockNode) -> Path | None:
        """The file of an image; None where it lies in none, or behind something unknown."""
        protocol = self.protocol_of(image)
        return None if protocol is None else protocol.filename

    def jobs(self) -> tuple[str, ...]:
        """The jobs that use an image of the disk, or a filter above one, by their ids."""
        return tuple(sorted({job for node in self._descend(self.root) for job in node.jobs}))

    def _filter_named(self, user: NodeUser) -> BlockNode | None:
        """The filter that a user is, if it passes through what it uses."""
        node = self.nodes.get(user.name) if user.kind is UserKind.NODE else None
        return node if node is not None and node.is_filter and user.role in _PASSED_ROLES else None

    def _descend(self, start: str) -> Iterator[BlockNode]:
        seen = set()
        name: str | None = start
        while name is not None and name not in seen:
            seen.add(name)
            node = self.nodes[name]
            yield node
            name = node.backing or (node.file if node.is_filter else None)


_FILTERS: Final = frozenset(
    {
        "blklogwrites",
        "commit_top",
        "compress",
        "copy-before-write",
        "copy-on-read",
        "mirror_top",
        "preallocate",
        "snapshot-access",
        "throttle",
    }
)
"""Drivers of nodes that pass data through and are no image."""

_FORMATS: Final = frozenset(
    {
        "bochs",
        "cloop",
        "dmg",
        "luks",
        "parallels",
        "qcow",
        "qcow2",
        "qed",
        "raw",
        "vdi",
        "vhdx",
        "vmdk",
        "vpc",
    }
)
"""Drivers of nodes that are an image, and stand on the node of its file."""

_PASSED_ROLES: Final = frozenset({"file", "backing"})
"""As what a filter has the node that it passes through. Others, as ``target``, it writes to."""

PLAIN_PROTOCOLS: Final = frozenset({"file", "host_device"})
"""Drivers of nodes that are a file or a block device of this machine."""
