# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with refcounts, snapshots and bitmaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chainmerge.qcow2.errors import FormatError


@dataclass(eq=False)
class BadRefcountTable(FormatError):
    """An entry of the refcount table names no refcount block."""

    code: ClassVar[str] = "bad-refcount-table"
    template: ClassVar[str] = "{image}: refcount table entry {index} is {entry:#018x}: {problem}"
    explanation: ClassVar[str] = (
        "The refcount table says where the image keeps the use counts of its clusters. One of "
        "its entries points to where no refcount block can be, so it cannot be told which "
        "clusters of the file are free, and nothing may be written to it."
    )
    index: int
    entry: int
    problem: str


@dataclass(eq=False)
class TooManyClusters(FormatError):
    """The file is too large, for its cluster size, to be checked."""

    code: ClassVar[str] = "too-many-clusters"
    template: ClassVar[str] = (
        "{image}: the file has {clusters} clusters, more than the {limit} that can be checked"
    )
    hint: ClassVar[str] = (
        "if the file really holds so much, copy it with 'qemu-img convert' to larger clusters, and "
        "keep it: its bitmaps and internal snapshots are not in the copy"
    )
    explanation: ClassVar[str] = (
        "A consistency check counts the references to every cluster of the file. QEMU refuses to "
        "check a file of more than 2147483647 clusters, and so does this program. A file that "
        "claims to be so large is usually a sparse one that was made on purpose."
    )
    clusters: int
    limit: int


@dataclass(eq=False)
class TooLittleMemory(FormatError):
    """The file could be checked, but not by this process."""

    code: ClassVar[str] = "too-little-memory"
    template: ClassVar[str] = (
        "{image}: the file has {clusters} clusters, and there is not enough memory to count the "
        "references to them"
    )
    hint: ClassVar[str] = (
        "if the file really holds so much, give the command more memory: 6 bytes a cluster"
    )
    explanation: ClassVar[str] = (
        "A consistency check counts the references to every cluster of the file. A sparse file "
        "can claim many clusters and take little space. Memory is taken only for those that are "
        "in use, so this happens where a limit is set on the address space of the process."
    )
    clusters: int


@dataclass(eq=False)
class BadSnapshotTable(FormatError):
    """The table of internal snapshots cannot be read."""

    code: ClassVar[str] = "bad-snapshot-table"
    template: ClassVar[str] = "{image}: snapshot table entry {index}: {problem}"
    explanation: ClassVar[str] = (
        "The image has internal snapshots, and the table that lists them is damaged. Which "
        "clusters the snapshots use cannot be told, so nothing may be written to the image."
    )
    index: int
    problem: str


@dataclass(eq=False)
class BadBitmapDirectory(FormatError):
    """The list of the image's bitmaps cannot be read."""

    code: ClassVar[str] = "bad-bitmap-directory"
    template: ClassVar[str] = "{image}: bitmap directory: {problem}"
    hint: ClassVar[str] = (
        "QEMU does not open the image either; `chainmerge repair {image}` takes the bitmaps out "
        "and keeps the guest's data. The next backup of the disk must be a full one"
    )
    explanation: ClassVar[str] = (
        "The bitmap directory lists the dirty bitmaps that the image holds for incremental "
        "backups. It must have exactly the size and the number of entries that the header says, "
        "and each entry must be one that QEMU accepts. It does not, so none of the bitmaps can "
        "be relied on. The guest's data is not concerned, but QEMU refuses to open the image."
    )
    problem: str


@dataclass(eq=False)
class BadBitmapTable(FormatError):
    """The table that says where a bitmap's bits are is damaged."""

    code: ClassVar[str] = "bad-bitmap-table"
    template: ClassVar[str] = "{image}: bitmap {bitmap!r}: {problem}"
    explanation: ClassVar[str] = (
        "The table of a dirty bitmap points to where its bits cannot be, so the bitmap is lost, "
        "and QEMU refuses to open the image. The guest's data is not concerned. The next backup "
        "of the disk must be a full one."
    )
    bitmap: str
    problem: str


@dataclass(eq=False)
class UnreadableBitmap(FormatError):
    """The bits of a bitmap were asked for that has none to rely on."""

    code: ClassVar[str] = "unreadable-bitmap"
    template: ClassVar[str] = "{image}: bitmap {bitmap!r} has no usable content: {reason}"
    hint: ClassVar[str] = (
        "`chainmerge repair {image}` shows what removing it means, and with --yes does that; the "
        "next backup that would have used it must be a full one"
    )
    explanation: ClassVar[str] = (
        "A bitmap is marked 'in use' while a program that writes to the image keeps it in "
        "memory. If the mark is still there after the program has ended, the bitmap was not "
        "stored and writes are missing from it. Other bitmaps use a type, a flag or extra data "
        "that is not known. In neither case can it be told what changed on the disk."
    )
    bitmap: str
    reason: str
