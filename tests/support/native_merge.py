# SPDX-License-Identifier: Apache-2.0
"""Merges by the native engine alone: the images, the commit, and what must hold around it.

The images above and below base are files; base is the content of a port in memory, so that
every state in which a crash can leave it can be looked at.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from chainmerge.bitmaps.comparing import bitmap_difference
from chainmerge.chain.layers import Layer, layer_of_qcow2
from chainmerge.chain.view import GuestView
from chainmerge.engines.metadata.allocation import stored_free_space
from chainmerge.engines.metadata.bitmap_set import AnyBitmap, StoredBitmap
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.metadata.refcount_blocks import refcount_writes
from chainmerge.engines.metadata.replacement import kept_where_unchanged, replace_bitmaps
from chainmerge.engines.native.commit import Commit, CommitOutcome, commit_natively
from chainmerge.engines.native.decisions import MappedDisk
from chainmerge.engines.native.survey import PlacedTree, new_tree, place_tree, survey_mapping
from chainmerge.merging.verifying import verify_bitmaps, verify_content, verify_soundness
from chainmerge.options import Direction, Placement
from chainmerge.qcow2.bitmaps import BitmapFlag, read_bits, read_directory
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.extents import Kind
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import (
    read_refcount_table,
    read_refcounts,
    refcounts_per_block,
)
from chainmerge.storage.transfer.copying import ReadBack, transfer_into
from tests.support import qemu
from tests.support.crash import RecordingPort
from tests.support.images import Discard, ImagePlan, apply_writes, view_of

if TYPE_CHECKING:
    from chainmerge.engines.native.commit import BeforeSwitch

Bytes = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]
Bitmaps = dict[str, tuple[BitSet, BitmapFlag]]

STALE = 0xAA
"""What fills clusters of a volume that hold nothing of the image."""


def unspoiled(content: bytes) -> bytes:
    return content


@dataclass(frozen=True)
class NativeMerge:
    """A chain and the merge of everything above one of its images down into that.

    Attributes:
        images: From the root up; the last one is top.
        base: Index of base.
        placement: Where data goes that base has a cluster for.
        old: The bitmaps that base has; none if version 2.
        new: Those that it shall have, of the disk's size after the merge. None: the old ones.
        snapshot_after: An internal snapshot is made in base after so many of its operations.
        base_options: More options to create base with.
        spoil: Changes base's file before the merge.
    """

    images: Sequence[ImagePlan]
    base: int = 0
    placement: Placement = Placement.COW
    old: Sequence[StoredBitmap] = ()
    new: Sequence[StoredBitmap] | None = None
    snapshot_after: int | None = None
    base_options: Mapping[str, str] = field(default_factory=dict)
    spoil: Callable[[bytes], bytes] = unspoiled

    @property
    def size_after(self) -> int:
        """Bytes of the guest's disk after the merge."""
        return max(self.images[self.base].disk_size, self.images[-1].disk_size)


@dataclass(frozen=True)
class BuiltMerge:
    """The images of a :class:`NativeMerge` on disk, and what they hold."""

    merge: NativeMerge
    paths: tuple[Path, ...]
    below: tuple[Layer, ...]
    above: tuple[Layer, ...]
    base_content: bytes

    def chain(self, base: Layer) -> GuestView:
        return GuestView((*self.below, base, *self.above))

    def through_top(self, base: bytes) -> bytes:
        """What the guest sees with these bytes as base's file."""
        view = self.chain(layer_of(base))
        return view.read(0, view.virtual_size)

    def base_alone(self, base: bytes) -> Bytes:
        """What base and the images below it show."""
        view = GuestView((*self.below, layer_of(base)))
        return np.frombuffer(view.read(0, view.virtual_size), dtype=np.uint8)

    @cached_property
    def seen(self) -> bytes:
        """What the guest sees before the merge, which is what it must always see."""
        return self.through_top(self.base_content)

    @cached_property
    def old(self) -> Bytes:
        """What base alone shows before the merge."""
        return self.base_alone(self.base_content)

    @cached_property
    def merged(self) -> Bytes:
        """What base alone shows afterwards: behind a shorter top's end, still what it did."""
        seen = np.frombuffer(self.seen, dtype=np.uint8)
        return np.concatenate([seen, self.old[len(seen) :]])

    @cached_property
    def hidden(self) -> BoolArray:
        """Which guest bytes of the old disk the images above base define."""
        hidden = np.zeros(len(self.old), dtype=np.bool_)
        for runs in GuestView(self.above).resolve():
            for index in np.flatnonzero(runs.kind != Kind.UNALLOCATED).tolist():
                start = int(runs.guest[index])
                hidden[start : start + int(runs.length[index])] = True
        return hidden

    @cached_property
    def old_bitmaps(self) -> Bitmaps:
        return trusted_bitmaps(self.base_content)

    @property
    def new_set(self) -> list[StoredBitmap] | None:
        """The bitmaps that base shall have; None where it cannot have any."""
        merge = self.merge
        if Qcow2Image(BytesReadable("base", self.base_content)).header.version < 3:
            return None
        if merge.new is not None:
            return list(merge.new)
        size = merge.size_after
        return [StoredBitmap(b.name, b.bits.with_disk_size(size), b.flags) for b in merge.old]

    @property
    def new_bitmaps(self) -> Bitmaps:
        return {bitmap.name: (bitmap.bits, bitmap.flags) for bitmap in self.new_set or ()}


def build(directory: Path, merge: NativeMerge) -> BuiltMerge:
    """Create and fill the images with QEMU's tools, and give base its bitmaps."""
    paths: list[Path] = []
    for index, plan in enumerate(merge.images):
        fmt = "raw" if plan.geometry is None else "qcow2"
        path = directory / f"{index}.{fmt}"
        is_base = index == merge.base
        qemu.create(
            path,
            plan.disk_size,
            backing=paths[-1].name if paths else None,
            backing_format=paths[-1].suffix[1:] if paths else "",
            fmt=fmt,
            **(plan.geometry.options if plan.geometry is not None else {}),
            **(merge.base_options if is_base else {}),
        )
        first_part = merge.snapshot_after if is_base and merge.snapshot_after is not None else None
        if first_part is not None:
            _write(path, plan, 0, first_part)
            qemu.qemu_img("snapshot", "-c", "before", path)
        _write(path, plan, first_part or 0, len(plan.operations))
        paths.append(path)
    base = paths[merge.base]
    if merge.old:
        port = RecordingPort(base.read_bytes())
        replace_bitmaps(port, merge.old)
        base.write_bytes(port.content)
    base.write_bytes(merge.spoil(base.read_bytes()))
    layers = view_of(paths).layers
    return BuiltMerge(
        merge,
        tuple(paths),
        layers[: merge.base],
        layers[merge.base + 1 :],
        base.read_bytes(),
    )


def _write(path: Path, plan: ImagePlan, first: int, end: int) -> None:
    operations = plan.operations[first:end]
    # Without this option QEMU ignores discards.
    discards = any(isinstance(each, Discard) for each in operations)
    options = ("--discard", "unmap") if discards else ()
    apply_writes(path, operations, fmt=path.suffix[1:], options=options)


def layer_of(content: bytes) -> Layer:
    readable = BytesReadable("base", content)
    return layer_of_qcow2(Qcow2Image(readable), readable)


def trusted_bitmaps(content: bytes) -> Bitmaps:
    """What a reader finds that ignores bitmaps without the autoclear bit, as QEMU does."""
    image = Qcow2Image(BytesReadable("base", content))
    if not image.header.bitmaps_trusted:
        return {}
    return {entry.name: (read_bits(image, entry), entry.flags) for entry in read_directory(image)}


# The commit


def prepared(built: BuiltMerge, port: RecordingPort) -> Commit:
    """What by_native makes of a chain whose base is read through *port*."""
    merge = built.merge
    image = Qcow2Image(port)
    chain = built.chain(layer_of_qcow2(image, port))
    disk = MappedDisk(
        header=image.header,
        size_after=max(image.header.virtual_size, chain.virtual_size),
        backing_end=built.below[-1].virtual_size if built.below else 0,
        direction=Direction.COMMIT,
    )
    need = survey_mapping(image, disk, GuestView(built.above))[merge.placement]
    stored: Sequence[AnyBitmap] | None = built.new_set
    if built.new_set is not None:
        same = bitmap_difference(image, built.new_set) is None
        stored = None if same else kept_where_unchanged(image, built.new_set)
    return Commit(
        image=image,
        chain=chain,
        base_index=merge.base,
        tree=new_tree(image.name, disk, need, stored),
        zeroes=None,
        backing=None,
        placement=merge.placement,
        shares_extents=False,
    )


def placed_in(job: Commit) -> PlacedTree:
    return place_tree(job.tree, stored_free_space(job.image))


def end_of_use(content: bytes) -> int:
    """The cluster behind the last one with a refcount."""
    return int(np.flatnonzero(all_refcounts(content))[-1]) + 1


def all_refcounts(content: bytes) -> npt.NDArray[np.uint64]:
    """The stored refcounts of all clusters up to the last one that a block describes."""
    image = Qcow2Image(BytesReadable("base", content))
    return read_refcounts(image, 0, stored_free_space(image).known)


def run(
    built: BuiltMerge, port: RecordingPort, before_switch: BeforeSwitch | None = None
) -> CommitOutcome:
    """Merge as by_native does, base's leaks being reclaimed already."""
    job = prepared(built, port)

    def verify(image: Qcow2Image, merged: GuestView) -> None:
        verify_soundness(image)
        if built.new_set is not None:
            verify_bitmaps(image, built.new_set)
        verify_content("base", merged, job.chain, _ignored, _never)
        if before_switch is not None:
            before_switch(image, merged)

    transfer = transfer_into(
        port,
        on_progress=_ignored,
        should_stop=_never,
        bandwidth=None,
        read_back=ReadBack.COMPARED,
    )
    return commit_natively(port, job, transfer, verify)


def _ignored(done: int) -> None:
    del done


def _never() -> bool:
    return False


# Base's file before the merge


def reclaimed(content: bytes) -> bytes:
    """Base without leaks, which is how a commit gets it."""
    port = RecordingPort(content)
    reclaim_leaks(port)
    return bytes(port.content)


def on_device(content: bytes, size: int) -> bytes:
    """Base on a volume of *size* bytes that held something else before."""
    image = Qcow2Image(BytesReadable("base", content))
    cluster_size = image.header.cluster_size
    device = bytearray(content[:size].ljust(size, bytes([STALE])))
    whole = size // cluster_size
    for cluster in np.flatnonzero(read_refcounts(image, 0, whole) == 0).tolist():
        start = cluster * cluster_size
        device[start : start + cluster_size] = bytes([STALE]) * cluster_size
    return bytes(device)


def leaking(content: bytes, every: int) -> bytes:
    """Free clusters that refcount blocks describe marked used, one in *every*.

    The file gets as long as its refcounts reach, so that all of these are leaks to QEMU.
    """
    port = RecordingPort(content)
    image = Qcow2Image(port)
    table = read_refcount_table(image)
    described = int(np.flatnonzero(table)[-1] + 1) * refcounts_per_block(image.header)
    present = np.repeat(table != 0, refcounts_per_block(image.header))[:described]
    free = np.flatnonzero((read_refcounts(image, 0, described) == 0) & present)[::every]
    end = (int(free[-1]) + 1) * image.header.cluster_size
    port.truncate_to(max(port.size, end))
    ones = np.ones(len(free), dtype=np.uint64)
    for offset, data in refcount_writes(port, image.header, table, free, ones):
        port.write(offset, data)
    return bytes(port.content)


def bitmap_set(
    seed: int, count: int, disk_size: int, granularity: int = 4096
) -> list[StoredBitmap]:
    """Some bitmaps with some bits."""
    choice = random.Random(seed)
    bitmaps = []
    for number in range(count):
        starts = [choice.randrange(disk_size // 4096) * 4096 for _ in range(number % 4)]
        ranges = [
            (start, min(choice.choice((512, 1 << 19)), disk_size - start)) for start in starts
        ]
        bits = BitSet.from_ranges(ranges, disk_size, granularity)
        flags = BitmapFlag.AUTO if number % 3 == 0 else BitmapFlag(0)
        bitmaps.append(StoredBitmap(f"{seed}.{number}", bits, flags))
    return bitmaps
