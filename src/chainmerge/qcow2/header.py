# SPDX-License-Identifier: Apache-2.0
"""The header cluster: header fields, feature bits and header extensions.

Rules are those of the qcow2 specification (docs/interop/qcow2.txt of QEMU) and of
what QEMU 7.2 checks when it opens an image (``qcow2_do_open``). Where QEMU is
lenient in a way that loses information, this parser refuses.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from chainmerge.arithmetic.rounding import divide_up
from chainmerge.qcow2.errors import BadExtension, BadHeader, BadOffset, NotQcow2, UnsupportedFeature
from chainmerge.qcow2.features import (
    EXTENSION_NAMES,
    Autoclear,
    BitmapsExtension,
    Compatible,
    Compression,
    CryptMethod,
    Extension,
    ExtensionType,
    Incompatible,
    extension_name,
)

if TYPE_CHECKING:
    from chainmerge.qcow2.readable import Readable

MAGIC = b"QFI\xfb"
V2_HEADER_LENGTH = 72
V3_HEADER_LENGTH = 104
COMPRESSION_TYPE_OFFSET = 104
EXTRA_OFFSET = 105
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_L2_CLUSTER_BITS = 14
SUBCLUSTERS = 32
SECTOR = 512
L1_ENTRY_BYTES = 8

# QEMU's limits (block/qcow2.h): QCOW_MAX_L1_SIZE, QCOW_MAX_REFTABLE_SIZE, QCOW_MAX_SNAPSHOTS.
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
_LARGEST_FILE_BYTES = (1 << 63) - 1
MIN_SNAPSHOT_ENTRY = 40
MAX_BACKING_NAME_BYTES = 1023
MAX_BACKING_FORMAT_BYTES = 15

# QEMU has no such limit, but writes five kinds at most; a 2 MiB cluster could hold 262,144.
MAX_EXTENSIONS = 256
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")

# Magic, offset and length of the backing file's name; where QEMU puts it is well within a KiB.
_BACKING = struct.Struct(">4s4xQI")
_GLANCE = 1024
_EXTENSION = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")
_CRYPTO = struct.Struct(">QQ")
_FEATURE_NAME = struct.Struct(">BB46s")
_KNOWN_INCOMPATIBLE = sum(Incompatible)


class Header(Struct, frozen=True):
    """The header cluster of one image. All offsets are file offsets in bytes."""

    version: int
    backing_name_offset: int
    backing_name_length: int
    cluster_bits: int
    virtual_size: int
    """Bytes of the guest's disk."""
    crypt_method: CryptMethod
    l1_size: int
    """Entries."""
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible: Incompatible
    compatible: Compatible
    autoclear: Autoclear
    refcount_order: int
    header_length: int
    compression_type: Compression
    extra: bytes
    """Header bytes from 105 to ``header_length``, verbatim."""
    extensions: tuple[Extension, ...]
    backing_name: str | None
    """UTF-8 with surrogate escapes, as :func:`os.fsdecode` does it."""
    backing_format: str | None
    data_file_name: str | None

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        """Width of one refcount: 1 to 64."""
        return 1 << self.refcount_order

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries are 16 bytes, with subclusters."""
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def subclusters_per_cluster(self) -> int:
        """32 with extended L2 entries, else 1."""
        return SUBCLUSTERS if self.extended_l2 else 1

    @property
    def subcluster_size(self) -> int:
        """Bytes: the unit in which the image maps the guest's disk."""
        return self.cluster_size // self.subclusters_per_cluster

    @property
    def l2_entry_size(self) -> int:
        """Bytes."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries in one L2 table."""
        return self.cluster_size // self.l2_entry_size

    @property
    def clusters(self) -> int:
        """Guest clusters, the last one possibly partial."""
        return divide_up(self.virtual_size, self.cluster_size)

    @property
    def l1_entries_used(self) -> int:
        """L1 entries that map the guest's disk; what follows maps saved VM states."""
        return divide_up(self.clusters, self.l2_entries)

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """The bitmaps extension, whether or not its autoclear bit vouches for it."""
        data = _extension_data(self.extensions, ExtensionType.BITMAPS)
        if data is None:
            return None
        count, _reserved, size, offset = _BITMAPS.unpack(data)
        return BitmapsExtension(count, size, offset)

    @property
    def bitmaps_trusted(self) -> bool:
        """Whether every writer since the bitmaps were stored knew of them."""
        return bool(self.autoclear & Autoclear.BITMAPS)

    @property
    def dirty(self) -> bool:
        """Whether refcounts may be stale (lazy refcounts, image not closed)."""
        return bool(self.incompatible & Incompatible.DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether QEMU found the image's metadata damaged, and said so in the image."""
        return bool(self.incompatible & Incompatible.CORRUPT)

    @property
    def external_data_file(self) -> bool:
        """Whether the guest's data is in another file."""
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def raw_data_file(self) -> bool:
        """Whether that other file can be read as a raw image."""
        return bool(self.autoclear & Autoclear.RAW_DATA_FILE)

    @property
    def encrypted(self) -> bool:
        """Whether the guest's data is encrypted, by whatever method."""
        return self.crypt_method != CryptMethod.NONE

    @property
    def luks_header(self) -> tuple[int, int] | None:
        """File offset and length in bytes of the LUKS header, for an image that has one."""
        data = _extension_data(self.extensions, ExtensionType.CRYPTO)
        if data is None:
            return None
        offset, length = _CRYPTO.unpack(data)
        return offset, length


def parse_header(image: Readable) -> Header:
    """Read and validate the header cluster.

    Raises:
        NotQcow2: the file does not start as a qcow2 image.
        BadHeader: a field is out of range.
        BadExtension: a header extension is malformed.
        BadOffset: a table that the header names is not in the file.
        UnsupportedFeature: an incompatible feature bit is not known.
    """
    fixed = _read_fixed(image)
    _check_geometry(image, fixed)
    cluster = image.read(0, 1 << fixed.cluster_bits)
    extensions_end = _extensions_end(image, fixed)
    extensions = _read_extensions(image, cluster, fixed.header_length, extensions_end)
    _check_features(image, fixed, extensions)
    compression = _compression(image, fixed, cluster)
    crypt_method = _crypt_method(image, fixed)
    _check_crypto_extension(image, crypt_method, extensions)
    header = Header(
        version=fixed.version,
        backing_name_offset=fixed.backing_name_offset,
        backing_name_length=fixed.backing_name_length,
        cluster_bits=fixed.cluster_bits,
        virtual_size=fixed.virtual_size,
        crypt_method=crypt_method,
        l1_size=fixed.l1_size,
        l1_table_offset=fixed.l1_table_offset,
        refcount_table_offset=fixed.refcount_table_offset,
        refcount_table_clusters=fixed.refcount_table_clusters,
        snapshot_count=fixed.snapshot_count,
        snapshots_offset=fixed.snapshots_offset,
        incompatible=Incompatible(fixed.incompatible),
        compatible=Compatible(fixed.compatible),
        autoclear=Autoclear(fixed.autoclear),
        refcount_order=fixed.refcount_order,
        header_length=fixed.header_length,
        compression_type=compression,
        extra=cluster[EXTRA_OFFSET : fixed.header_length],
        extensions=extensions,
        backing_name=_backing_name(image, fixed, cluster),
        backing_format=_backing_format(image, extensions),
        data_file_name=_text_extension(image, extensions, ExtensionType.DATA_FILE),
    )
    _check_tables(image, header)
    return header


def glance_at_backing_name(image: Readable) -> str | None:
    """The backing name of what may be an image, at the price of one small read.

    None for what begins as something else. Of a header nothing else is validated, unless the name
    is far from its usual place.

    Raises what :func:`parse_header` raises.
    """
    beginning = image.read(0, _GLANCE)
    magic, offset, length = _BACKING.unpack_from(beginning)
    if magic != MAGIC or not offset or not length:
        return None
    if offset + length > _GLANCE:
        return parse_header(image).backing_name
    return _text(image, "backing file name", beginning[offset : offset + length])


class _Fixed(NamedTuple):
    """The fields at fixed places, as numbers."""

    version: int
    backing_name_offset: int
    backing_name_length: int
    cluster_bits: int
    virtual_size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = V2_HEADER_LENGTH


def _read_fixed(image: Readable) -> _Fixed:
    if image.size < V2_HEADER_LENGTH:
        raise NotQcow2(image.name, f"it has {image.size} bytes, a header needs {V2_HEADER_LENGTH}")
    start = image.read(0, V3_HEADER_LENGTH)
    magic, version, *v2_fields = _V2.unpack_from(start)
    if magic != MAGIC:
        raise NotQcow2(image.name, f"it starts with {magic!r}")
    if version not in {2, 3}:
        raise BadHeader(image.name, "version", version, "2 or 3")
    if version == 2:
        return _Fixed(version, *v2_fields)
    if image.size < V3_HEADER_LENGTH:
        raise NotQcow2(image.name, f"it has {image.size} bytes, a header needs {V3_HEADER_LENGTH}")
    return _Fixed(version, *v2_fields, *_V3.unpack_from(start, V2_HEADER_LENGTH))


def _check_geometry(image: Readable, fixed: _Fixed) -> None:
    def refuse(field: str, value: int, allowed: str) -> BadHeader:
        return BadHeader(image.name, field, value, allowed)

    if not MIN_CLUSTER_BITS <= fixed.cluster_bits <= MAX_CLUSTER_BITS:
        allowed = f"{MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
        raise refuse("cluster_bits", fixed.cluster_bits, allowed)
    cluster_size = 1 << fixed.cluster_bits
    if fixed.version >= 3 and not V3_HEADER_LENGTH <= fixed.header_length <= cluster_size:
        allowed = f"{V3_HEADER_LENGTH} to {cluster_size}"
        raise refuse("header_length", fixed.header_length, allowed)
    if fixed.version >= 3 and fixed.header_length % 8:
        raise refuse("header_length", fixed.header_length, "a multiple of 8")
    if fixed.refcount_order > 6:
        raise refuse("refcount_order", fixed.refcount_order, "0 to 6")
    # QEMU would silently cut the disk to whole sectors, and with it the guest's last bytes.
    if fixed.virtual_size % SECTOR or fixed.virtual_size >= 1 << 63:
        raise refuse("virtual size", fixed.virtual_size, f"a multiple of {SECTOR} below {1 << 63}")
    name_range = f"0, or {fixed.header_length} to {cluster_size}"
    offset = fixed.backing_name_offset
    if offset and not fixed.header_length <= offset <= cluster_size:
        raise refuse("backing file name offset", offset, name_range)
    longest = min(MAX_BACKING_NAME_BYTES, cluster_size - offset)
    if offset and fixed.backing_name_length > longest:
        raise refuse("backing file name length", fixed.backing_name_length, f"at most {longest}")


def _extensions_end(image: Readable, fixed: _Fixed) -> int:
    """Offset of the first byte in the header cluster that cannot belong to extensions."""
    limit = fixed.backing_name_offset or 1 << fixed.cluster_bits
    # A small image can end inside its header cluster only if it was truncated.
    if image.size < limit:
        raise BadHeader(image.name, "file size", image.size, f"at least {limit}")
    return limit


def _read_extensions(
    image: Readable, cluster: bytes, start: int, end: int
) -> tuple[Extension, ...]:
    extensions: list[Extension] = []
    seen: set[int] = set()
    offset = start
    while offset < end:
        if offset + _EXTENSION.size > end:
            reason = f"its header reaches past the end of the extensions at {end}"
            raise BadExtension(image.name, "of unknown type", offset, reason)
        kind, length = _EXTENSION.unpack_from(cluster, offset)
        data_offset = offset + _EXTENSION.size
        if length > end - data_offset:
            reason = f"{length} bytes long, which reaches past the end of the extensions at {end}"
            raise BadExtension(image.name, extension_name(kind), offset, reason)
        if kind == ExtensionType.END:
            break
        if len(extensions) == MAX_EXTENSIONS:
            reason = f"more than {MAX_EXTENSIONS} extensions"
            raise BadExtension(image.name, extension_name(kind), offset, reason)
        # Of two, QEMU keeps the last; another reader may keep the first.
        if kind in seen and kind in EXTENSION_NAMES:
            raise BadExtension(image.name, extension_name(kind), offset, "is there twice")
        seen.add(kind)
        data = cluster[data_offset : data_offset + length]
        _check_extension(image, kind, data, offset)
        extensions.append(Extension(kind, data, offset))
        offset = data_offset + (length + 7) // 8 * 8
    return tuple(extensions)


def _check_extension(image: Readable, kind: int, data: bytes, offset: int) -> None:
    if kind == ExtensionType.BITMAPS:
        if len(data) != _BITMAPS.size:
            reason = f"{len(data)} bytes long, but must be {_BITMAPS.size}"
            raise BadExtension(image.name, extension_name(kind), offset, reason)
        if _BITMAPS.unpack(data)[1]:
            raise BadExtension(image.name, extension_name(kind), offset, "reserved field not 0")
    if kind == ExtensionType.CRYPTO and len(data) != _CRYPTO.size:
        reason = f"{len(data)} bytes long, but must be {_CRYPTO.size}"
        raise BadExtension(image.name, extension_name(kind), offset, reason)
    if kind == ExtensionType.BACKING_FORMAT and len(data) > MAX_BACKING_FORMAT_BYTES:
        reason = f"{len(data)} bytes long, but must be at most {MAX_BACKING_FORMAT_BYTES}"
        raise BadExtension(image.name, extension_name(kind), offset, reason)


def _check_features(image: Readable, fixed: _Fixed, extensions: tuple[Extension, ...]) -> None:
    unknown = fixed.incompatible & ~_KNOWN_INCOMPATIBLE
    if unknown:
        names = _incompatible_names(extensions)
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        listed = ", ".join(names.get(bit, f"incompatible feature bit {bit}") for bit in bits)
        raise UnsupportedFeature(image.name, listed)
    extended = fixed.incompatible & Incompatible.EXTENDED_L2
    if extended and fixed.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS:
        allowed = f"at least {MIN_EXTENDED_L2_CLUSTER_BITS} with extended L2 entries"
        raise BadHeader(image.name, "cluster_bits", fixed.cluster_bits, allowed)
    raw_data = fixed.autoclear & Autoclear.RAW_DATA_FILE
    if raw_data and not fixed.incompatible & Incompatible.DATA_FILE:
        allowed = "without the raw data file bit (2) where there is no external data file"
        raise BadHeader(image.name, "autoclear_features", fixed.autoclear, allowed)


def _incompatible_names(extensions: tuple[Extension, ...]) -> dict[int, str]:
    """Names by bit, from the feature name table; names are shown, so they are made printable."""
    table = _extension_data(extensions, ExtensionType.FEATURE_NAMES) or b""
    usable = len(table) - len(table) % _FEATURE_NAME.size
    names = {}
    for kind, bit, name in _FEATURE_NAME.iter_unpack(table[:usable]):
        if kind == 0:
            text = name.split(b"\0")[0].decode("utf-8", "replace")
            names[bit] = "".join(char if char.isprintable() else "?" for char in text)
    return names


def _compression(image: Readable, fixed: _Fixed, cluster: bytes) -> Compression:
    value = cluster[COMPRESSION_TYPE_OFFSET] if fixed.header_length > COMPRESSION_TYPE_OFFSET else 0
    if value not in {kind.value for kind in Compression}:
        raise BadHeader(image.name, "compression_type", value, "0 (zlib) or 1 (zstd)")
    flagged = bool(fixed.incompatible & Incompatible.COMPRESSION)
    if flagged != (value != Compression.ZLIB):
        allowed = "1 (zstd)" if flagged else "0 (zlib)"
        state = "set" if flagged else "clear"
        raise BadHeader(
            image.name,
            "compression_type",
            value,
            f"{allowed} where incompatible feature bit 3 is {state}",
        )
    return Compression(value)


def _crypt_method(image: Readable, fixed: _Fixed) -> CryptMethod:
    if fixed.crypt_method not in {method.value for method in CryptMethod}:
        allowed = "0 (none), 1 (AES) or 2 (LUKS)"
        raise BadHeader(image.name, "crypt_method", fixed.crypt_method, allowed)
    return CryptMethod(fixed.crypt_method)


def _check_crypto_extension(
    image: Readable, method: CryptMethod, extensions: tuple[Extension, ...]
) -> None:
    extension = _find_extension(extensions, ExtensionType.CRYPTO)
    if extension is None:
        if method is CryptMethod.LUKS:
            allowed = "0 or 1 where there is no encryption header extension"
            raise BadHeader(image.name, "crypt_method", int(method), allowed)
        return
    if method is not CryptMethod.LUKS:
        reason = f"there although crypt_method is {int(method)}, not 2 (LUKS)"
        raise BadExtension(image.name, extension_name(extension.type), extension.offset, reason)


def _backing_name(image: Readable, fixed: _Fixed, cluster: bytes) -> str | None:
    if not fixed.backing_name_offset or not fixed.backing_name_length:
        return None
    start = fixed.backing_name_offset
    return _text(image, "backing file name", cluster[start : start + fixed.backing_name_length])


def _backing_format(image: Readable, extensions: tuple[Extension, ...]) -> str | None:
    return _text_extension(image, extensions, ExtensionType.BACKING_FORMAT)


def _text_extension(
    image: Readable, extensions: tuple[Extension, ...], kind: ExtensionType
) -> str | None:
    data = _extension_data(extensions, kind)
    return _text(image, EXTENSION_NAMES[kind], data) if data else None


def _text(image: Readable, field: str, data: bytes) -> str | None:
    """Decode a file name or a format; QEMU ends it at the first NUL byte."""
    trimmed = data.rstrip(b"\0")
    if b"\0" in trimmed:
        raise BadHeader(image.name, field, repr(trimmed), "without NUL bytes")
    return trimmed.decode("utf-8", "surrogateescape") or None


def _find_extension(extensions: tuple[Extension, ...], kind: ExtensionType) -> Extension | None:
    return next((extension for extension in extensions if extension.type == kind), None)


def _extension_data(extensions: tuple[Extension, ...], kind: ExtensionType) -> bytes | None:
    extension = _find_extension(extensions, kind)
    return None if extension is None else extension.data


def _check_tables(image: Readable, header: Header) -> None:
    """Check sizes and places of the tables that the header names, not what is in them."""
    refcount_bytes = header.refcount_table_clusters * header.cluster_size
    if not 0 < refcount_bytes <= MAX_REFCOUNT_TABLE_BYTES:
        raise BadHeader(
            image.name,
            "refcount_table_clusters",
            header.refcount_table_clusters,
            f"1 to {MAX_REFCOUNT_TABLE_BYTES // header.cluster_size}",
        )
    most = MAX_L1_BYTES // 8
    least = header.l1_entries_used
    if least > most:
        allowed = f"at most {most * header.l2_entries * header.cluster_size}"
        raise BadHeader(image.name, "virtual size", header.virtual_size, allowed)
    if not least <= header.l1_size <= most:
        raise BadHeader(image.name, "l1_size", header.l1_size, f"{least} to {most}")
    if header.snapshot_count > MAX_SNAPSHOTS:
        allowed = f"at most {MAX_SNAPSHOTS}"
        raise BadHeader(image.name, "snapshot count", header.snapshot_count, allowed)

    size = image.size
    # A refcount table has whole clusters, but the file's last one need not be all there.
    whole_clusters = size + -size % header.cluster_size
    snapshots = header.snapshot_count * MIN_SNAPSHOT_ENTRY
    _check_place(
        image, header, "L1 table", header.l1_table_offset, header.l1_size * 8, file_end=size
    )
    _check_place(
        image,
        header,
        "refcount table",
        header.refcount_table_offset,
        refcount_bytes,
        file_end=whole_clusters,
    )
    _check_place(image, header, "snapshot table", header.snapshots_offset, snapshots, file_end=size)
    if header.luks_header is not None:
        _check_place(image, header, "LUKS header", *header.luks_header, file_end=size)


def _check_place(
    image: Readable, header: Header, structure: str, offset: int, length: int, *, file_end: int
) -> None:
    # QEMU wants even the offset of an empty table to be aligned, and one that a file can have.
    if offset % header.cluster_size:
        problem = f"is not aligned to clusters of {header.cluster_size} bytes"
        raise BadOffset(image.name, structure, offset, problem)
    if length == 0 and offset <= _LARGEST_FILE_BYTES:
        return
    if offset == 0:
        raise BadOffset(image.name, structure, offset, "is where the header is")
    if offset + length > file_end:
        problem = f"({length} bytes) is not within the file of {image.size} bytes"
        raise BadOffset(image.name, structure, offset, problem)
