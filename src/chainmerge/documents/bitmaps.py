# SPDX-License-Identifier: Apache-2.0
"""The bitmaps of an image or a chain, and what became of them."""

from __future__ import annotations

from msgspec import Struct


class BitmapResult(Struct, frozen=True):
    """A bitmap of base as it was read back from the closed image.

    Attributes:
        name: The bitmap's name.
        state: ``valid``, ``disabled`` or ``in-use``.
        granularity: Guest bytes that one bit stands for.
        dirty_bytes: Guest bytes that are marked dirty, None if the content is worthless, and
            where it is in the memory of a VM that does not tell.
        tombstone: Whether the name only keeps images above from passing the chain test.
    """

    name: str
    state: str
    granularity: int
    dirty_bytes: int | None
    tombstone: bool = False


class BitmapRow(Struct, frozen=True):
    """One bitmap in one image.

    Attributes:
        image: The path of the image that holds it.
        name: The bitmap's name.
        state: ``valid``, ``disabled`` or ``in-use``.
        granularity: Guest bytes that one bit stands for.
        dirty_bytes: Guest bytes marked dirty, None if the content is worthless.
        tombstone: Whether the name only keeps images above from passing the chain test.
    """

    image: str
    name: str
    state: str
    granularity: int
    dirty_bytes: int | None
    tombstone: bool


class BitmapVerdict(Struct, frozen=True):
    """Whether a checkpoint can still serve a backup read from the chain's top end.

    Attributes:
        name: The bitmap's name.
        passes: Whether it passes the chain test.
        reason: Why, in words.
    """

    name: str
    passes: bool
    reason: str


class BitmapListing(Struct, frozen=True):
    """Every bitmap of a chain, top end first, and the verdict on every name."""

    version: int
    image: str
    rows: tuple[BitmapRow, ...]
    verdicts: tuple[BitmapVerdict, ...]


class DiskGap(Struct, frozen=True):
    """A disk on which a checkpoint cannot serve a backup: its top end, and why, in words."""

    image: str
    reason: str


class SharedCheckpoint(Struct, frozen=True):
    """Whether a checkpoint can serve a backup of all disks of a VM.

    Attributes:
        name: The name of its bitmaps.
        usable: Whether it passes on every disk: the next backup of the VM can be incremental.
        gaps: The disks on which it does not, in the order of the disks.
    """

    name: str
    usable: bool
    gaps: tuple[DiskGap, ...]


class BitmapsOfDisks(Struct, frozen=True):
    """The bitmaps of several disks, and which checkpoints serve a backup of all of them."""

    version: int
    disks: tuple[BitmapListing, ...]
    checkpoints: tuple[SharedCheckpoint, ...]


class BitmapChange(Struct, frozen=True):
    """What ``bitmaps add``, ``remove``, ``clear`` or ``merge`` changed in one image.

    Attributes:
        version: Version of this document.
        image: The image's path.
        action: ``add``, ``remove``, ``clear`` or ``merge``.
        names: The bitmaps that were added, removed or written to.
        bitmaps: The image's bitmaps afterwards, re-read from the closed image.
        warnings: What the user should know, a sentence each.
    """

    version: int
    image: str
    action: str
    names: tuple[str, ...]
    bitmaps: tuple[BitmapResult, ...]
    warnings: tuple[str, ...] = ()


class PrunedBitmap(Struct, frozen=True):
    """A bitmap that was removed from an image, or replaced by a tombstone, and why."""

    image: str
    name: str
    state: str
    tombstone: bool
    reason: str


class PruneReport(Struct, frozen=True):
    """What ``bitmaps prune`` did.

    Attributes:
        version: Version of this document.
        base: The lowest image that was looked at.
        top: The highest image that was looked at.
        removed: What was removed or replaced by a tombstone, in the order of removal.
        kept: Names that were left as they are.
        tombstones: Names of which a tombstone is left, because an image above has them.
    """

    version: int
    base: str
    top: str
    removed: tuple[PrunedBitmap, ...]
    kept: tuple[str, ...]
    tombstones: tuple[str, ...]


class PruneOfDisks(Struct, frozen=True):
    """What ``bitmaps prune`` did on several disks, and which checkpoints are left for all of them.

    Attributes:
        version: Version of this document.
        disks: What was done on each.
        checkpoints: The names that are left, and whether a backup of all disks can use each.
    """

    version: int
    disks: tuple[PruneReport, ...]
    checkpoints: tuple[SharedCheckpoint, ...]


class UnusableBitmap(Struct, frozen=True):
    """A bitmap that no backup of this chain can use.

    Attributes:
        name: The bitmap's name.
        images: The images of the chain that have a bitmap of this name, the active one first.
        reason: Why it cannot be used.
    """

    name: str
    images: tuple[str, ...]
    reason: str


class BitmapsRepairReport(Struct, frozen=True):
    """What ``bitmaps repair`` did; with ``dry_run``, what it would do.

    Attributes:
        version: Version of this document.
        image: The active image of the chain.
        dry_run: Whether nothing was changed.
        unusable: The bitmaps that cannot be used, by name.
        removed: What was (with ``dry_run``: would be) removed or replaced by a tombstone, in this
            order.
        kept: Names that stay.
        warnings: What the user should know, a sentence each.
    """

    version: int
    image: str
    dry_run: bool
    unusable: tuple[UnusableBitmap, ...]
    removed: tuple[PrunedBitmap, ...]
    kept: tuple[str, ...]
    warnings: tuple[str, ...] = ()
