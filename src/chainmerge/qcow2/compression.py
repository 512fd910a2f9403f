# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: raw deflate (RFC 1951) or zstd."""

from __future__ import annotations

import sys
import zlib
from typing import TYPE_CHECKING

from chainmerge.qcow2.errors import DecompressionFailed
from chainmerge.qcow2.features import Compression

if TYPE_CHECKING:
    from chainmerge.qcow2.image import Qcow2Image


class _ZstdFailed(Exception):
    """What zstd reported."""


# QEMU compresses with a window of 12 bits but decompresses in one call, which accepts any
# distance within the cluster; a 12-bit window here would refuse what QEMU reads.
_RAW_DEFLATE = -zlib.MAX_WBITS


def decompress_cluster(image: Qcow2Image, offset: int, data: bytes) -> bytes:
    """Decompress one cluster.

    What follows the compressed stream in *data* is ignored: its length is only
    known in whole sectors (qcow2 specification, "Compressed Clusters Descriptor").

    Args:
        image: the image the cluster belongs to.
        offset: where *data* was read from, for the message.
        data: the compressed bytes, up to the end of their last sector.

    Returns:
        Exactly one cluster.

    Raises:
        DecompressionFailed: *data* does not hold a whole compressed cluster.
    """
    size = image.header.cluster_size
    decompress = _zstd if image.header.compression_type is Compression.ZSTD else _deflate
    try:
        plain = decompress(data, size)
    except (zlib.error, _ZstdFailed) as error:
        raise DecompressionFailed(image.name, offset, str(error)) from error
    if len(plain) != size:
        reason = f"holds {len(plain)} bytes of a cluster's {size}"
        raise DecompressionFailed(image.name, offset, reason)
    return plain


def _deflate(data: bytes, size: int) -> bytes:
    return zlib.decompressobj(_RAW_DEFLATE).decompress(data, size)


def _zstd(data: bytes, size: int) -> bytes:
    # Imported where it is used: few images need it.
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415
    else:
        from backports import zstd  # noqa: PLC0415
    # The library bounds its window to 128 MiB, the limit of QEMU's decompressor too.
    decompressor = zstd.ZstdDecompressor()
    try:
        return decompressor.decompress(data, max_length=size)
    except zstd.ZstdError as error:
        raise _ZstdFailed(str(error)) from error
