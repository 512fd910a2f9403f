# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a qcow2 image, as errors that carry their facts.

All of them are refusals: the format layer only reads.
"""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import ImageInvalid, Refused

_CHECK_HINT = (
    "`chainmerge repair {image}` shows what can be repaired; restore the rest from a backup"
)


class FormatError(ImageInvalid, Refused):
    """The image is not what the qcow2 specification, or QEMU, accepts."""

    hint: ClassVar[str] = _CHECK_HINT
    image: str


class NotQcow2(FormatError):
    """The file does not start as a qcow2 image does."""

    code: ClassVar[str] = "not-qcow2"
    template: ClassVar[str] = "{image}: not a qcow2 image: {reason}"
    hint: ClassVar[str] = (
        "check the name, and the format if you gave one; 'qemu-img info {image}' shows what QEMU "
        "takes the file for"
    )
    explanation: ClassVar[str] = (
        "A qcow2 image starts with the bytes 'QFI' and 0xfb, in a header of at least 72 bytes. "
        "This file does not, so it is an image of another format, an empty or truncated file, or "
        "something else altogether. Nothing was guessed and nothing was changed."
    )
    reason: str


class BadHeader(FormatError):
    """A header field has a value that no valid image has."""

    code: ClassVar[str] = "bad-header"
    template: ClassVar[str] = "{image}: {field} is {value}, but must be {allowed}"
    explanation: ClassVar[str] = (
        "A field of the image's header has a value that the qcow2 specification forbids, or that "
        "QEMU refuses to open. The header is written rarely and as a whole, so this image was "
        "damaged, truncated, or made by hand, and nothing in it can be relied on. QEMU refuses "
        "such an image too."
    )
    field: str
    value: int | str
    allowed: str


class BadExtension(FormatError):
    """A header extension cannot be what it claims to be."""

    code: ClassVar[str] = "bad-header-extension"
    template: ClassVar[str] = "{image}: header extension {extension} at offset {offset}: {reason}"
    explanation: ClassVar[str] = (
        "Header extensions follow the header in the image's first cluster, one after another, and "
        "hold the backing file's format, the bitmaps, the name of an external data file and the "
        "like. One of them is malformed. To stop there silently would lose whatever comes after "
        "it, bitmaps included, so the image is refused, as QEMU refuses it."
    )
    extension: str
    offset: int
    reason: str


class UnsupportedFeature(FormatError):
    """The image uses something that this program does not know or cannot do."""

    code: ClassVar[str] = "unsupported-feature"
    template: ClassVar[str] = "{image}: needs a feature that is not supported: {feature}"
    hint: ClassVar[str] = (
        "use the newest release of chainmerge; or copy the image with 'qemu-img convert' of the "
        "QEMU that wrote it, and keep the original: its bitmaps and internal snapshots are not in "
        "the copy"
    )
    explanation: ClassVar[str] = (
        "The image says that it cannot be read correctly by a program that does not know a certain "
        "feature (an 'incompatible' feature bit), or uses a variant of something that is not "
        "implemented. Reading it anyway would give wrong data."
    )
    feature: str


class BadOffset(FormatError):
    """A reference inside the image points to where nothing can be."""

    code: ClassVar[str] = "bad-offset"
    template: ClassVar[str] = "{image}: {structure} at offset {offset:#x} {problem}"
    explanation: ClassVar[str] = (
        "One of the image's tables says that another structure is at a place where it cannot be: "
        "outside the file, not at the start of a cluster, or where something else is. The image "
        "is truncated or damaged."
    )
    structure: str
    offset: int
    problem: str


class BadEntry(FormatError):
    """A table entry has a value that means nothing."""

    code: ClassVar[str] = "bad-table-entry"
    template: ClassVar[str] = (
        "{image}: {table} entry for guest offset {guest:#x} is {entry:#018x}: {problem}"
    )
    explanation: ClassVar[str] = (
        "An entry of the tables that map the guest's disk to the file has reserved bits set or "
        "contradicts itself. Nobody can tell what the guest would read there, so nothing is done "
        "with the image."
    )
    table: str
    guest: int
    entry: int
    problem: str


class DecompressionFailed(FormatError):
    """A compressed cluster does not decompress to a cluster."""

    code: ClassVar[str] = "decompression-failed"
    template: ClassVar[str] = "{image}: compressed cluster at offset {offset:#x}: {reason}"
    explanation: ClassVar[str] = (
        "The image holds compressed clusters, and one of them is not valid compressed data, or "
        "does not give a whole cluster. The guest's data there is lost in this image; QEMU answers "
        "a read of it with an I/O error."
    )
    offset: int
    reason: str


class EncryptedContent(FormatError):
    """The guest's data is encrypted, and the key is not ours."""

    code: ClassVar[str] = "encrypted-content"
    template: ClassVar[str] = "{image}: the image is encrypted, its content cannot be read"
    hint: ClassVar[str] = (
        "use QEMU, with the key, for whatever needs the content of encrypted images"
    )
    explanation: ClassVar[str] = (
        "The image's clusters are encrypted (LUKS, or the old AES scheme). chainmerge reads its "
        "tables, but cannot read the guest's data."
    )
