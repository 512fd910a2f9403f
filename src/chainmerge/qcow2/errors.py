# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a qcow2 image, as errors that carry their facts.

All of them are refusals: the format layer only reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chainmerge.errors import ImageInvalid, Refused

_CHECK_HINT = (
    "`chainmerge repair {image}` shows what of it can be mended; what cannot has to be restored "
    "from a backup"
)


@dataclass(eq=False)
class FormatError(ImageInvalid, Refused):
    """The image is not what the qcow2 specification, or QEMU, accepts."""

    hint: ClassVar[str] = _CHECK_HINT
    image: str


@dataclass(eq=False)
class NotQcow2(FormatError):
    """The file does not start as a qcow2 image does."""

    code: ClassVar[str] = "not-qcow2"
    template: ClassVar[str] = "{image}: not a qcow2 image: {reason}"
    hint: ClassVar[str] = (
        "check the name, and that the format is given correctly; 'qemu-img info {image}' shows "
        "what QEMU takes the file for"
    )
    explanation: ClassVar[str] = (
        "A qcow2 image starts with the bytes 'QFI' and 0xfb, and a header of at least 72 bytes. "
        "The file has neither, so it is an image of another format, an empty or truncated file, "
        "or something else altogether. Nothing was guessed and nothing was changed."
    )
    reason: str


@dataclass(eq=False)
class BadHeader(FormatError):
    """A header field has a value that no valid image has."""

    code: ClassVar[str] = "bad-header"
    template: ClassVar[str] = "{image}: {field} is {value}, but must be {allowed}"
    explanation: ClassVar[str] = (
        "A field of the image's header has a value that the qcow2 specification forbids, or that "
        "QEMU refuses to open. The header is written rarely and as a whole, so this is an image "
        "that was damaged, truncated, or made by hand, and nothing in it can be relied on. "
        "QEMU refuses such an image too."
    )
    field: str
    value: int | str
    allowed: str


@dataclass(eq=False)
class BadExtension(FormatError):
    """A header extension cannot be what it claims to be."""

    code: ClassVar[str] = "bad-header-extension"
    template: ClassVar[str] = "{image}: header extension {extension} at offset {offset}: {reason}"
    explanation: ClassVar[str] = (
        "Header extensions follow the header in the image's first cluster, one after another, and "
        "hold the backing file's format, the bitmaps, the name of an external data file and the "
        "like. One of them is malformed. Stopping quietly there would lose whatever comes after "
        "it, bitmaps included, so the image is refused, as QEMU refuses it."
    )
    extension: str
    offset: int
    reason: str


@dataclass(eq=False)
class UnsupportedFeature(FormatError):
    """The image uses something that this program does not know or cannot do."""

    code: ClassVar[str] = "unsupported-feature"
    template: ClassVar[str] = "{image}: needs a feature that is not supported: {feature}"
    hint: ClassVar[str] = (
        "use the newest release of chainmerge; or copy the image with 'qemu-img convert' of the "
        "QEMU that wrote it, and keep it: its bitmaps and internal snapshots are not in the copy"
    )
    explanation: ClassVar[str] = (
        "The image says that it cannot be read correctly by a program that does not know a "
        "certain feature (an 'incompatible' feature bit), or asks for a variant of something "
        "that is not implemented. Reading on would give wrong data."
    )
    feature: str


@dataclass(eq=False)
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


@dataclass(eq=False)
class BadEntry(FormatError):
    """A table entry has a value that means nothing."""

    code: ClassVar[str] = "bad-table-entry"
    template: ClassVar[str] = (
        "{image}: {table} entry for guest offset {guest:#x} is {entry:#018x}: {problem}"
    )
    explanation: ClassVar[str] = (
        "An entry of the tables that map the guest's disk to the file has reserved bits set or "
        "contradicts itself. What the guest would read there cannot be told, so nothing is done "
        "with the image."
    )
    table: str
    guest: int
    entry: int
    problem: str


@dataclass(eq=False)
class DecompressionFailed(FormatError):
    """A compressed cluster does not decompress to a cluster."""

    code: ClassVar[str] = "decompression-failed"
    template: ClassVar[str] = "{image}: compressed cluster at offset {offset:#x}: {reason}"
    explanation: ClassVar[str] = (
        "The image holds compressed clusters, and one of them is not valid compressed data, or "
        "not a whole cluster of it. The guest's data there is lost in this image; QEMU answers a "
        "read of it with an I/O error."
    )
    offset: int
    reason: str


@dataclass(eq=False)
class EncryptedContent(FormatError):
    """The guest's data is encrypted, and the key is not ours."""

    code: ClassVar[str] = "encrypted-content"
    template: ClassVar[str] = "{image}: the image is encrypted, its content cannot be read"
    hint: ClassVar[str] = "leave what needs the content of encrypted images to QEMU, with its key"
    explanation: ClassVar[str] = (
        "The image's clusters are encrypted (LUKS, or the old AES scheme). Its tables can be "
        "read and are, but not the guest's data itself."
    )
