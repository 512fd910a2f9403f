# SPDX-License-Identifier: Apache-2.0
"""The block graph of a running VM, as those see it who merge in it. Sizes are in bytes.

A node is one layer of the VM's block graph: a *format* node (qcow2, raw) gives guest data and
stands on a *protocol* node (file, host_device), which is the file itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path

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
        return tuple(node for node in self._descend() if node.driver not in FILTERS)

    def path_of(self, image: BlockNode) -> Path | None:
        """The file of an image; None where it lies in none, or behind something unknown."""
        if image.file is None:
            return None
        protocol = self.nodes[image.file]
        return protocol.filename if protocol.driver in PLAIN_PROTOCOLS else None

    def jobs(self) -> tuple[str, ...]:
        """The jobs that use an image of the disk, or a filter above one, by their ids."""
        return tuple(sorted({job for node in self._descend() for job in node.jobs}))

    def _descend(self) -> Iterator[BlockNode]:
        seen = set()
        name: str | None = self.root
        while name is not None and name not in seen:
            seen.add(name)
            node = self.nodes[name]
            yield node
            name = node.backing
            if name is None and node.driver in FILTERS:
                name = node.file


FILTERS = frozenset(
    {"commit_top", "mirror_top", "copy-before-write", "copy-on-read", "throttle", "preallocate"}
)
"""Drivers of nodes that pass data through and are no image."""

PLAIN_PROTOCOLS = frozenset({"file", "host_device"})
"""Drivers of nodes that are a file or a block device of this machine."""
