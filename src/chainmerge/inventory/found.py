# SPDX-License-Identifier: Apache-2.0
"""An image as a scan has found it: small values, so that ten thousand of them are nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.chain.model import Identity

if TYPE_CHECKING:
    from chainmerge.errors import ChainmergeError


class Problem(Struct, frozen=True):
    """What keeps something from being read: the code of an error, and its sentence."""

    code: str
    sentence: str


NOT_DAMAGE: Final = frozenset(
    {"access-denied", "cannot-open", "image-missing", "wrong-file-type", "unsupported-feature"}
)
"""Codes of problems that say nothing of what is in an image."""


def problem_of(error: ChainmergeError) -> Problem:
    """An error, as what is wrong with an image."""
    return Problem(error.code, error.sentence)


class FoundBitmap(Struct, frozen=True):
    """A bitmap in an image; sizes in bytes. *tombstone*: disabled, and without a dirty bit."""

    name: str
    state: BitmapState
    granularity: int
    stored_bytes: int
    tombstone: bool


class CheckFacts(Struct, frozen=True):
    """What a check of refcounts has found."""

    corruptions: int
    leaked_bytes: int
    first: str
    """The first thing that is wrong, in words."""


class ImageContent(Struct, frozen=True):
    """What is in an image, whatever its name is; the same for as long as its stamp is.

    Attributes:
        format: As :class:`chainmerge.documents.scan.ScannedImage` has it.
        virtual_size: Bytes of the guest's disk, None if the header cannot be read.
        cluster_size: In bytes; 0 without clusters.
        backing_name: As stored.
        backing_format: As stored.
        bitmaps: Those in its directory.
        bitmaps_problem: Why that cannot be read.
        unread_bitmaps: How many there are, if they are more than are looked at.
        snapshots: The number of its internal snapshots.
        dirty: Whether the header has the dirty bit.
        corrupt: Whether the header has the corrupt bit.
        born_ns: When its file was created, in nanoseconds since 1970; None if nothing tells.
        end: Of a device, where its last cluster in use ends, in bytes; else None.
        checked: What a check found, if there was one.
        problem: Why the header cannot be read.
    """

    format: str
    virtual_size: int | None = None
    cluster_size: int = 0
    backing_name: str | None = None
    backing_format: str | None = None
    bitmaps: tuple[FoundBitmap, ...] = ()
    bitmaps_problem: Problem | None = None
    unread_bitmaps: int = 0
    snapshots: int = 0
    dirty: bool = False
    corrupt: bool = False
    born_ns: int | None = None
    end: int | None = None
    checked: CheckFacts | None = None
    problem: Problem | None = None


class Stamp(Struct, frozen=True):
    """What tells whether a file is the one that it was, and unchanged.

    Attributes:
        identity: Of the file or device.
        device: Of the file system that its name is on (``st_dev``).
        is_device: Whether it is a block device, which has no times.
        size: Bytes.
        occupied: Bytes of the file system; 0 for a device.
        written_ns: When it was written last, in nanoseconds since 1970.
        changed_ns: When anything about it changed last, as above.
    """

    identity: Identity
    device: int
    is_device: bool
    size: int
    occupied: int
    written_ns: int
    changed_ns: int


class BackingLink(Struct, frozen=True):
    """Where the backing name of an image leads.

    Attributes:
        path: The file that it means; None where it means none.
        identities: Of all that it could mean, however it is spelled.
        problem: Why it is not followed.
    """

    path: Path | None
    identities: tuple[Identity, ...]
    problem: Problem | None


class FoundImage(Struct, frozen=True):
    """An image and what it stands on.

    Attributes:
        identity: Of its file or device.
        path: Its absolute path, as it was found.
        stamp: What it was when it was read.
        content: What it holds.
        link: Where its backing name leads; None for a root.
        named: Whether it lies where was looked; else an image that does has led to it.
    """

    identity: Identity
    path: str
    stamp: Stamp
    content: ImageContent
    link: BackingLink | None
    named: bool

    @property
    def is_overlay(self) -> bool:
        """Whether it names a backing file."""
        return self.content.backing_name is not None
