# SPDX-License-Identifier: Apache-2.0
"""What an image is, which images are below it, and what is wrong with it."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

LEVELS: Final = 3
"""How far below a directory other users of its images are looked for."""


class Searched(Struct, frozen=True):
    """Where other users of the images were looked for. Of other places nothing is known.

    Attributes:
        directories: All files in these were looked at.
        named: As well as all below these, which the caller has named.
        around: And what is up to three levels below these.
        left_out: What of it was not looked at, and why; a phrase each.
        active: The upper end of the chain, where the caller has named it.
        sole_user: Whether the caller says that no other images use those of the chain.
    """

    directories: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    active: str | None = None
    sole_user: bool = False

    @property
    def is_vouched_for(self) -> bool:
        """Whether the caller has said where the users of the images can be, or that none are."""
        return self.sole_user or bool(self.named)

    @property
    def places(self) -> str:
        """The places that were searched, in words."""
        parts = [*self.directories]
        if self.named:
            parts.append(f"{', '.join(self.named)} with everything below")
        if self.around:
            parts.append(f"up to {LEVELS} levels below {', '.join(self.around)}")
        return ", ".join(parts)


class ImageUser(Struct, frozen=True):
    """A process that has an image open.

    Attributes:
        pid: Its number.
        program: The name of its program, as far as the kernel keeps it (15 bytes).
    """

    pid: int
    program: str


class ImageReport(Struct, frozen=True):
    """One image, as ``chainmerge info`` shows it.

    Attributes:
        path: The image's path.
        format: Its format.
        format_declared: Whether somebody said so: the caller, or the image above it.
        in_chain: Whether it is the image asked about or lies below it; otherwise it is a sibling or
            a child.
        parent: The path of its backing file, None for a root.
        virtual_size: Size of the guest's disk in bytes.
        file_size: Size of the file or device in bytes.
        allocated_bytes: Guest bytes that the image itself defines, None if unknown.
        cluster_size: In bytes, None for formats without clusters.
        details: What else there is to say by name, e.g. ``compression`` or ``subclusters``.
        bitmaps: Number of bitmaps stored in it.
        snapshots: Number of internal snapshots.
        notes: What is out of the ordinary, a sentence each.
        occupied_bytes: What it takes of its file system, None for a device or if unknown.
        written_at: When it was written last, in seconds since 1970 (UTC); None as above.
        users: The processes that have it open; None if none is seen and not every process may be
            looked at.
    """

    path: str
    format: str
    format_declared: bool
    in_chain: bool
    parent: str | None
    virtual_size: int
    file_size: int
    allocated_bytes: int | None
    cluster_size: int | None
    details: dict[str, str]
    bitmaps: int
    snapshots: int
    notes: tuple[str, ...]
    occupied_bytes: int | None = None
    written_at: int | None = None
    users: tuple[ImageUser, ...] | None = None


class ChainReport(Struct, frozen=True):
    """An image, what lies below it and what else was found to use the same images.

    Attributes:
        version: Version of this document.
        image: The image asked about.
        images: The chain from its root up, then siblings and children. Each image is there once,
            by one absolute path without ``..``, which ``parent`` and ``image`` give as well.
        warnings: What the user should know, a sentence each.
        searched: Where siblings and children were looked for.
    """

    version: int
    image: str
    images: tuple[ImageReport, ...]
    warnings: tuple[str, ...]
    searched: Searched


class CheckResult(Struct, frozen=True):
    """What a consistency check of one image found.

    Attributes:
        version: Version of this document.
        image: The image's path.
        corruptions: Number of places where the image contradicts itself.
        leaks: Number of clusters marked used that nothing uses.
        messages: The findings, a sentence each; at most the first 100.
        image_end_offset: End of the last cluster in use, in bytes.
        remarks: What else is wrong, a sentence each: marks of a writer that died, bitmaps that
            are in-use, merges that were not finished.
    """

    version: int
    image: str
    corruptions: int
    leaks: int
    messages: tuple[str, ...]
    image_end_offset: int
    remarks: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing at all is wrong with the image."""
        return self.corruptions == 0 and self.leaks == 0 and not self.remarks


class BackingCandidate(Struct, frozen=True):
    """A file that could be a lost backing file.

    Attributes:
        path: Where it is.
        format: What it would be read as.
        reasons: What speaks for it, the strongest first.
    """

    path: str
    format: str
    reasons: tuple[str, ...]


class BackingReport(Struct, frozen=True):
    """What an image names as its backing file.

    Attributes:
        version: Version of this document.
        image: The image's path.
        backing: The name in its header, None for none.
        backing_format: The format that its header declares, None if it does not.
        problem: Why the image's chain cannot be read, None if it can.
        candidates: Where it cannot: files that could be the backing file, the likeliest first.
    """

    version: int
    image: str
    backing: str | None
    backing_format: str | None
    problem: str | None
    candidates: tuple[BackingCandidate, ...]


class RelinkReport(Struct, frozen=True):
    """An image that has been given another backing file.

    Attributes:
        version: Version of this document.
        image: The image's path.
        old_backing: The name that its header held, None for none.
        backing: The name that it holds now, None for none.
        backing_format: The format that its header declares for it now.
        verified: What was compared, a sentence each; empty if nothing was.
        warnings: What the user should know, a sentence each.
    """

    version: int
    image: str
    old_backing: str | None
    backing: str | None
    backing_format: str | None
    verified: tuple[str, ...]
    warnings: tuple[str, ...]
