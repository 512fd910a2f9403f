# SPDX-License-Identifier: Apache-2.0
"""The bitmaps of a chain, and the verdict on every name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.bitmaps.rules import LayerBitmaps, chain_test
from chainmerge.bitmaps.stored import bitmap_results, bitmaps_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.opening import OpenChain, OpenImage, open_chain
from chainmerge.chain.target import metadata_policy_of
from chainmerge.documents.bitmaps import (
    BitmapListing,
    BitmapRow,
    BitmapsOfDisks,
    BitmapVerdict,
    DiskGap,
    SharedCheckpoint,
)
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.options import Access
from chainmerge.qcow2.bitmaps import storable_granularity
from chainmerge.qcow2.bits import union_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def bitmaps_list(image: str | Path, access: Access | None = None) -> BitmapListing:
    """Every bitmap of a chain, and whether a backup read from *image* can use each name.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    access = access or Access()
    policy = metadata_policy_of(access, image)
    chain = discover(Path(access.active or image), policy)
    with open_chain(chain) as opened:
        return listing_of(opened, str(image))


def listing_of(opened: OpenChain, image: str) -> BitmapListing:
    """As :func:`bitmaps_list`, of a chain that is open; it is called *image*."""
    leaf_first = tuple(reversed(opened.images))
    rows = tuple(row for one in leaf_first for row in _rows(one))
    layers = tuple(bitmaps_of(one) for one in leaf_first)
    return BitmapListing(REPORT_VERSION, image, rows, tuple(_verdicts(layers)))


def next_backup_bytes(opened: OpenChain, usable: str) -> int:
    """What an incremental backup since a checkpoint copies, in guest bytes.

    As backup programs do it, the bits of all bitmaps of that name are united, at the finest of
    their granularities.

    Args:
        opened: the chain that the backup reads.
        usable: a name that passes the chain test, so that each image that has it counts.

    Raises:
        FormatError: a bitmap's table is damaged.
    """
    sources = [one.bits(usable) for one in opened.images if one.entry(usable) is not None]
    size = opened.images[-1].layer.virtual_size
    finest = min(bits.granularity for bits in sources)
    return union_all(sources, size, storable_granularity(size, finest)).dirty_bytes()


def bitmaps_list_disks(
    images: Sequence[str | Path], access: Access | None = None
) -> BitmapsOfDisks:
    """The bitmaps of several disks, and which checkpoints serve a backup of all of them.

    Args:
        images: the top end of each disk's chain.
        access: how images may be found and reached.

    Raises:
        ChainmergeError: a chain cannot be found or read.
    """
    disks = tuple(bitmaps_list(image, access) for image in images)
    return BitmapsOfDisks(REPORT_VERSION, disks, shared_checkpoints(disks))


def shared_checkpoints(disks: Sequence[BitmapListing]) -> tuple[SharedCheckpoint, ...]:
    """The verdict on every name over all disks. Pure.

    A backup takes all disks of a VM at one moment, so one disk without the checkpoint makes the
    next one full for that disk.
    """
    names = sorted({verdict.name for disk in disks for verdict in disk.verdicts})
    gaps = {name: tuple(_gaps(name, disks)) for name in names}
    return tuple(SharedCheckpoint(name, not gaps[name], gaps[name]) for name in names)


def _gaps(name: str, disks: Sequence[BitmapListing]) -> Iterator[DiskGap]:
    for disk in disks:
        verdict = next((one for one in disk.verdicts if one.name == name), None)
        if verdict is None:
            yield DiskGap(disk.image, "no bitmap of this name")
        elif not verdict.passes:
            yield DiskGap(disk.image, verdict.reason)


def _rows(opened: OpenImage) -> Iterator[BitmapRow]:
    if opened.image is None:
        return
    for found in bitmap_results(opened.image):
        yield BitmapRow(
            image=str(opened.info.path),
            name=found.name,
            state=found.state,
            granularity=found.granularity,
            dirty_bytes=found.dirty_bytes,
            tombstone=found.tombstone,
        )


def _verdicts(leaf_first: Sequence[LayerBitmaps]) -> Iterator[BitmapVerdict]:
    for name in sorted({name for layer in leaf_first for name in layer.occurrences}):
        verdict = chain_test([layer.state(name) for layer in leaf_first])
        yield BitmapVerdict(name, verdict.passes, verdict.reason)
