# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with refcounts, snapshots and bitmaps."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.qcow2.errors import FormatError


class BadRefcountTable(FormatError):
    """An entry of the refcount table names no refcount block."""

    code: ClassVar[str] = "bad-refcount-table"
    template: ClassVar[str] = "{image}: refcount table entry {index} is {entry:#018x}: {problem}"
    explanation: ClassVar[str] = (
        "The refcount table says where the image keeps the use counts of its clusters. One of its "
        "entries points to where no refcount block can be, so nobody can tell which clusters of "
        "the file are free, and nothing may be written to it."
    )
    index: int
    entry: int
    problem: str


class TooManyClusters(FormatError):
    """The file is too large, for its cluster size, to be checked."""

    code: ClassVar[str] = "too-many-clusters"
    template: ClassVar[str] = (
        "{image}: the file has {clusters} clusters, more than the {limit} that can be checked"
    )
    hint: ClassVar[str] = (
        "if the file really holds so much, copy it with 'qemu-img convert' to an image with larger "
        "clusters, and keep the original: its bitmaps and internal snapshots are not in the copy"
    )
    explanation: ClassVar[str] = (
        "A consistency check counts the references to every cluster of the file. QEMU refuses to "
        "check a file of more than 2147483647 clusters, and so does this program. A file that "
        "claims to be so large is usually a sparse one that was made on purpose."
    )
    clusters: int
    limit: int


class TooLittleMemory(FormatError):
    """The file could be checked, but not by this process."""

    code: ClassVar[str] = "too-little-memory"
    template: ClassVar[str] = (
        "{image}: the file has {clusters} clusters, and there is not enough memory to count the "
        "references to them"
    )
    hint: ClassVar[str] = (
        "if the file really holds so much, give the command more memory: 6 bytes for each cluster"
    )
    explanation: ClassVar[str] = (
        "A consistency check counts the references to every cluster of the file. A sparse file can "
        "claim many clusters and take little space. Memory is taken only for those that are in "
        "use, so this happens if the address space of the process is limited."
    )
    clusters: int


class BadSnapshotTable(FormatError):
    """The table of internal snapshots cannot be read."""

    code: ClassVar[str] = "bad-snapshot-table"
    template: ClassVar[str] = "{image}: snapshot table entry {index}: {problem}"
    explanation: ClassVar[str] = (
        "The image has internal snapshots, and the table that lists them is damaged. Nobody can "
        "tell which clusters the snapshots use, so nothing may be written to the image."
    )
    index: int
    problem: str


class BadBitmapDirectory(FormatError):
    """The list of the image's bitmaps cannot be read."""

    code: ClassVar[str] = "bad-bitmap-directory"
    template: ClassVar[str] = "{image}: bitmap directory: {problem}"
    hint: ClassVar[str] = (
        "QEMU does not open the image either; `chainmerge repair {image}` shows what is wrong, and "
        "with --yes removes the bitmaps and keeps the guest's data; the next backup of the disk "
        "must then be a full one"
    )
    explanation: ClassVar[str] = (
        "The bitmap directory lists the dirty bitmaps that the image holds for incremental "
        "backups. It must have exactly the size and the number of entries that the header says, "
        "and QEMU must accept each entry. This one breaks these rules, so none of the bitmaps can "
        "be relied on. The guest's data is not affected, but QEMU refuses to open the image."
    )
    problem: str


class BadBitmapTable(FormatError):
    """The table that says where a bitmap's bits are is damaged."""

    code: ClassVar[str] = "bad-bitmap-table"
    template: ClassVar[str] = "{image}: bitmap {bitmap!r}: {problem}"
    explanation: ClassVar[str] = (
        "The table of a dirty bitmap points to where its bits cannot be, so the bitmap is lost, "
        "and QEMU refuses to open the image. The guest's data is not affected. The next backup of "
        "the disk must be a full one."
    )
    bitmap: str
    problem: str


class UnreadableBitmap(FormatError):
    """A bitmap whose bits cannot be relied on was to be read."""

    code: ClassVar[str] = "unreadable-bitmap"
    template: ClassVar[str] = "{image}: bitmap {bitmap!r} has no usable content: {reason}"
    hint: ClassVar[str] = (
        "`chainmerge bitmaps repair LEAF`, LEAF being the active image, shows it, asks, and drops "
        "it from the whole chain; the next backup must be a full one"
    )
    explanation: ClassVar[str] = (
        "A bitmap is marked 'in use' while a program that writes to the image keeps it in memory. "
        "If the mark is still there after the program has ended, the bitmap was not stored and "
        "writes are missing from it. Other bitmaps use a type, a flag or extra data that is not "
        "known. In either case nobody can tell what changed on the disk."
    )
    bitmap: str
    reason: str
