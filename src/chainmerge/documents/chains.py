# SPDX-License-Identifier: Apache-2.0
"""The chains of images in a directory."""

from __future__ import annotations

from msgspec import Struct

from chainmerge.documents.images import ImageUser


class ChainSummary(Struct, frozen=True):
    """A leaf of a directory, and the chain below it.

    What a merge would free and copy is that of a merge of all images that only this leaf uses
    into the lowest of them, ``base``. Images that other leaves of the directory use as well are
    not touched by it.

    Attributes:
        leaf: The path of the uppermost image: no image of the directory stands on it.
        images: The number of images in the chain; None if it cannot be read.
        virtual_size: Size of the guest's disk in bytes, None as above.
        occupied_bytes: What the files of the chain take of their file systems, devices left out;
            None as above. What several chains share counts in each of them.
        base: What its images would be merged into; None if there is nothing to merge.
        freed_bytes: Bytes of lower images that images above hide: what such a merge gives back,
            tables and bitmaps of the deleted images left out; None if it cannot be read. Of a
            chain on logical volumes what the volume group gets back, exactly.
        bytes_to_copy: Bytes that it would copy, or share, down into base or up into the leaf,
            whichever is less; None as above.
        unfinished: Whether a merge of images of the chain was not finished; ``status`` says more.
        users: The processes that have the leaf open; None if that is not known.
        problem: Why the chain cannot be read, or what is wrong with it, in a sentence; None if
            nothing was found. Nothing is checked for this: ``check`` does that.
        data_files: The external data files of its images, which a merge has to be allowed to use.
    """

    leaf: str
    images: int | None
    virtual_size: int | None
    occupied_bytes: int | None
    base: str | None
    freed_bytes: int | None
    bytes_to_copy: int | None
    unfinished: bool
    users: tuple[ImageUser, ...] | None
    problem: str | None
    data_files: tuple[str, ...] = ()


class ChainsReport(Struct, frozen=True):
    """The chains of a directory.

    Attributes:
        version: Version of this document.
        directory: Its absolute path. What lies below it is not looked at.
        chains: Those whose merge would free most first, those that cannot be read last.
        occupied_bytes: What all their files take, each counted once.
        freed_bytes: What merging all of them would free.
    """

    version: int
    directory: str
    chains: tuple[ChainSummary, ...]
    occupied_bytes: int
    freed_bytes: int
