# SPDX-License-Identifier: Apache-2.0
"""Reads images one after the other, a small record each; none stays open.

Nothing is locked, so what a running VM writes to may be read half written: whoever judges a record
knows who has the image open. One that cannot be read is a record as well, which says why.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.rounding import divide_up, round_up
from chainmerge.bitmaps.rules import BitmapState
from chainmerge.bitmaps.stored import state_of
from chainmerge.chain.allowed_places import AllowedPlaces, Directories
from chainmerge.chain.model import Identity, ImageFormat, format_meant_by, identity_of
from chainmerge.chain.names import backing_path, possible_backing_paths
from chainmerge.chain.reading import begins_as_qcow2, identity_at
from chainmerge.chain.relatives import REMOVABLE_MAJORS, is_suspended
from chainmerge.errors import ChainmergeError
from chainmerge.inventory.found import (
    BackingLink,
    CheckFacts,
    FoundBitmap,
    FoundImage,
    ImageContent,
    Problem,
    Stamp,
    problem_of,
)
from chainmerge.qcow2.bitmaps import (
    TABLE_ALL_ONES,
    TABLE_ENTRY_SIZE,
    BitmapEntry,
    read_directory,
    read_table,
)
from chainmerge.qcow2.check import check
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.header import SECTOR
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.refcounts import end_of_use
from chainmerge.records.identity import birth_time
from chainmerge.storage.allocation import STAT_BLOCK
from chainmerge.storage.errors import reason_of
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterator


MOST_BITMAPS_OF_A_SCAN: Final = 1024
"""Bitmaps of an image that are looked at: a hostile one has 65,535 with names of a KiB each."""
_NANOSECONDS: Final = 10**9
_MOST_TABLE_BYTES: Final = 256 << 20
_NOTHING_THERE: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV}
)


class Surveyor(Struct, frozen=True):
    """How images are looked at.

    Attributes:
        allowed: Where backing files are followed to.
        directories: Where directories lie.
    """

    allowed: AllowedPlaces
    directories: Directories

    def may_follow_to(self, path: Path) -> bool:
        """Whether a backing file may be what *path* names, and what that leads to."""
        reached = self.directories.reached(path)
        if not self.allowed.holds(reached):
            return False
        resolved = self.directories.resolved(path)
        return resolved == reached or self.allowed.holds(resolved)


def stamp_of(path: str) -> Stamp | None:
    """What is at a path; None for what is no file or device, or cannot be looked at now.

    Raises OSError.
    """
    status = os.stat(path)  # noqa: PTH116 (there are many)
    is_device = stat.S_ISBLK(status.st_mode)
    if is_device:
        device = status.st_rdev
        if os.major(device) in REMOVABLE_MAJORS or is_suspended(device):
            return None
    elif not stat.S_ISREG(status.st_mode):
        return None
    return Stamp(
        identity=identity_of(status),
        device=status.st_dev,
        is_device=is_device,
        size=_device_size(status.st_rdev) if is_device else status.st_size,
        occupied=0 if is_device else status.st_blocks * STAT_BLOCK,
        written_ns=0 if is_device else status.st_mtime_ns,
        changed_ns=0 if is_device else status.st_ctime_ns,
    )


def _device_size(device: int) -> int:
    """Bytes; 0 if the kernel does not tell."""
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/size")
    try:
        return int(node.read_text(encoding="ascii")) * SECTOR
    except (OSError, ValueError):
        return 0


def image_content(path: str, *, thoroughly: bool) -> ImageContent | None:
    """What is in an image; None if it does not begin like qcow2.

    Args:
        path: a file or device.
        thoroughly: whether refcounts are checked.

    Raises:
        ChainmergeError: it cannot be read, and may be anything.
    """
    with FileReadable(path) as readable:
        if not begins_as_qcow2(readable):
            return None
        try:
            return _qcow2_content(readable, thoroughly=thoroughly)
        except ChainmergeError as error:
            return ImageContent(ImageFormat.QCOW2, problem=problem_of(error))


def content_below(path: str, declared: str | None, size: int) -> ImageContent:
    """What is in an image that one above uses as *declared*; None for an undeclared format.

    Only a raw image is not looked into.
    """
    try:
        content = image_content(path, thoroughly=False)
    except ChainmergeError as error:
        return ImageContent(declared or ImageFormat.RAW, problem=problem_of(error))
    meant = None if declared is None else format_meant_by(declared)
    if content is not None and meant in {None, ImageFormat.QCOW2}:
        return content
    if meant is None or meant == ImageFormat.RAW:
        return ImageContent(ImageFormat.RAW, virtual_size=round_up(size, SECTOR))
    return ImageContent(meant)


def as_found(
    path: str, stamp: Stamp, content: ImageContent, surveyor: Surveyor, *, named: bool
) -> FoundImage:
    """An image with where its backing name leads; nothing that it names is opened."""
    name = content.backing_name
    link = None if name is None else _link(Path(path), name, surveyor)
    return FoundImage(stamp.identity, path, stamp, content, link, named)


def _born(readable: FileReadable) -> int | None:
    seconds, _, rest = birth_time(Path(readable.name)).partition(".")
    return int(seconds) * _NANOSECONDS + int(rest) if seconds else None


def _qcow2_content(readable: FileReadable, *, thoroughly: bool) -> ImageContent:
    image = Qcow2Image(readable)
    header = image.header
    bitmaps: tuple[FoundBitmap, ...] = ()
    trouble: Problem | None = None
    count = 0 if header.bitmaps is None else header.bitmaps.count
    try:
        if count <= MOST_BITMAPS_OF_A_SCAN:
            bitmaps = tuple(_bitmaps(image))
    except FormatError as error:
        trouble = problem_of(error)
    return ImageContent(
        format=ImageFormat.QCOW2,
        virtual_size=header.virtual_size,
        cluster_size=header.cluster_size,
        backing_name=header.backing_name,
        backing_format=header.backing_format,
        bitmaps=bitmaps,
        bitmaps_problem=trouble,
        unread_bitmaps=count if count > MOST_BITMAPS_OF_A_SCAN else 0,
        snapshots=header.snapshot_count,
        dirty=header.dirty,
        corrupt=header.corrupt,
        born_ns=None if readable.is_block_device else _born(readable),
        end=end_of_use(image) if readable.is_block_device else None,
        checked=_checked(image) if thoroughly else None,
    )


def _checked(image: Qcow2Image) -> CheckFacts:
    report = check(image)
    first = report.messages[0] if report.messages else ""
    leaked = report.leaks * image.header.cluster_size
    return CheckFacts(report.corruptions + report.overlaps, leaked, first)


def _bitmaps(image: Qcow2Image) -> Iterator[FoundBitmap]:
    """The bitmaps of an image. Raises FormatError."""
    # 65,535 bitmaps could have the same large table.
    left = _MOST_TABLE_BYTES
    for entry in read_directory(image):
        table_bytes = entry.table_size * TABLE_ENTRY_SIZE
        left -= table_bytes
        bits, empty = _bits(image, entry) if left >= 0 else (0, False)
        state = state_of(image, entry)
        yield FoundBitmap(
            entry.name,
            state,
            entry.granularity,
            round_up(table_bytes, image.header.cluster_size) + bits,
            tombstone=state is BitmapState.DISABLED and empty,
        )


def _bits(image: Qcow2Image, entry: BitmapEntry) -> tuple[int, bool]:
    """What the bits of a bitmap take in the image, and whether none is set for sure."""
    try:
        table = read_table(image, entry)
    except FormatError:
        return 0, False
    stored = int(np.count_nonzero(table > TABLE_ALL_ONES))
    return stored * image.header.cluster_size, not table.any()


def _link(path: Path, name: str, surveyor: Surveyor) -> BackingLink:
    try:
        target = backing_path(path, name)
    except ChainmergeError as error:
        # It may be used all the same: another program follows such a name.
        possible = map(_identity, possible_backing_paths(path, name))
        return BackingLink(None, tuple(filter(None, possible)), problem_of(error))
    identity = _identity(target)
    identities = () if identity is None else (identity,)
    if not surveyor.may_follow_to(target):
        sentence = (
            f"{path} names the backing file {name!r}, which lies outside the places that were "
            "scanned, so it was not looked at"
        )
        return BackingLink(target, identities, Problem("backing-file-outside", sentence))
    if identity is None:
        return BackingLink(target, (), _why_not_there(path, name, target))
    return BackingLink(target, identities, None)


def _why_not_there(path: Path, name: str, target: Path) -> Problem:
    named = f"{path} names the backing file {name!r}"
    try:
        target.stat()
    except OSError as error:
        if error.errno not in _NOTHING_THERE:
            return Problem("cannot-open", f"{named}, which cannot be looked at: {reason_of(error)}")
    except ValueError:
        pass
    return Problem("backing-file-missing", f"{named}, and there is no such file")


def _identity(path: Path) -> Identity | None:
    try:
        return identity_at(path)
    except OSError:
        return None


def largest_size(content: ImageContent) -> int:
    """What an image takes if its guest writes to all of its disk, roughly; in bytes.

    Data, a table entry for each cluster, and its refcount; bitmaps and snapshots left out.
    """
    size = content.virtual_size or 0
    if not content.cluster_size:
        return size
    clusters = divide_up(size, content.cluster_size)
    return (clusters + 1) * content.cluster_size + clusters * (8 + 2)
