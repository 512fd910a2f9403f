# SPDX-License-Identifier: Apache-2.0
"""The features, extensions and methods that a header names (qcow2 specification, "Header")."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from msgspec import Struct


class Incompatible(IntFlag):
    """Features that a reader must know (header bytes 72 to 79)."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Compatible(IntFlag):
    """Features that may be ignored (header bytes 80 to 87)."""

    LAZY_REFCOUNTS = 1


class Autoclear(IntFlag):
    """Features whose data is void once a writer that does not know them was here (88 to 95)."""

    BITMAPS = 1
    RAW_DATA_FILE = 2


class Compression(IntEnum):
    """How compressed clusters are compressed (header byte 104)."""

    ZLIB = 0
    ZSTD = 1


class CryptMethod(IntEnum):
    """How clusters are encrypted (header bytes 32 to 35)."""

    NONE = 0
    AES = 1
    LUKS = 2


class ExtensionType(IntEnum):
    """The header extensions that have a meaning here."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO = 0x0537BE77
    DATA_FILE = 0x44415441


EXTENSION_NAMES = {
    ExtensionType.BACKING_FORMAT: "backing format",
    ExtensionType.FEATURE_NAMES: "feature names",
    ExtensionType.BITMAPS: "bitmaps",
    ExtensionType.CRYPTO: "encryption header",
    ExtensionType.DATA_FILE: "data file name",
}


class Extension(Struct, frozen=True):
    """One header extension, as it stands in the file."""

    type: int
    data: bytes
    offset: int
    """File offset of the extension's own 8-byte header."""


class BitmapsExtension(Struct, frozen=True):
    """Where the bitmap directory is. Whoever reads the directory checks its plausibility."""

    count: int
    directory_size: int
    """Bytes."""
    directory_offset: int
    """File offset."""


def extension_name(extension_type: int) -> str:
    """What messages call a header extension."""
    known = {int(kind): name for kind, name in EXTENSION_NAMES.items()}
    return f"{extension_type:#010x} ({known.get(extension_type, 'unknown')})"
