# SPDX-License-Identifier: Apache-2.0
"""The images of a chain as layers: each says which part of the disk it defines."""

from __future__ import annotations

import errno
import os
from itertools import chain
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.rounding import round_up
from chainmerge.qcow2.compression import decompress_cluster
from chainmerge.qcow2.errors import EncryptedContent
from chainmerge.qcow2.extents import Extents, Kind
from chainmerge.qcow2.header import SECTOR
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import iter_extents
from chainmerge.qcow2.readable import Readable
from chainmerge.qcow2.remembered import Walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RAW_EXTENTS_AT_ONCE = 16 << 10


class Layer(Protocol):
    """One image of a chain, without its backing file."""

    @property
    def name(self) -> str:
        """What messages call the image."""

    @property
    def virtual_size(self) -> int:
        """Bytes of the guest's disk as this image has it."""

    @property
    def source(self) -> Readable:
        """The file that host offsets refer to."""

    def iter_extents(self, start: int, end: int, window: int) -> Iterator[Extents]:
        """As :func:`chainmerge.qcow2.mapping.iter_extents`."""

    def read_data(self, host: int, length: int) -> bytes:
        """Read DATA from the file."""

    def read_compressed(self, host: int, csize: int) -> bytes:
        """Read a COMPRESSED cluster as a whole."""

    @property
    def cluster_size(self) -> int:
        """Bytes; guest offsets of compressed clusters are multiples of it."""


@runtime_checkable
class OpenFile(Protocol):
    """A readable that is a file of the operating system."""

    @property
    def fd(self) -> int:
        """The open file."""

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode, equal for all names of one file."""


class Qcow2Layer(Struct, frozen=True):
    """A qcow2 image as a layer."""

    image: Qcow2Image
    source: Readable
    walk: Walk = iter_extents
    """How the image's tables are read."""

    @property
    def name(self) -> str:
        """What messages call the image."""
        return self.image.name

    @property
    def virtual_size(self) -> int:
        """Bytes of the guest's disk as this image has it."""
        return self.image.header.virtual_size

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.image.header.cluster_size

    def iter_extents(self, start: int, end: int, window: int) -> Iterator[Extents]:
        """What the image's tables say."""
        return self.walk(self.image, start, end, window=window)

    def read_data(self, host: int, length: int) -> bytes:
        """Read uncompressed clusters.

        Raises:
            EncryptedContent: what would be read is not the guest's data.
        """
        self._refuse_encrypted()
        return self.source.read(host, length)

    def read_compressed(self, host: int, csize: int) -> bytes:
        """Read one compressed cluster.

        Raises:
            DecompressionFailed: it is damaged.
            EncryptedContent: what would be read is not the guest's data.
        """
        self._refuse_encrypted()
        return decompress_cluster(self.image, host, self.source.read(host, csize))

    def _refuse_encrypted(self) -> None:
        if self.image.header.encrypted:
            raise EncryptedContent(self.image.name)


class RawLayer(Struct, frozen=True):
    """A raw image as a layer: data where the file has some, zeros where it has holes."""

    source: Readable

    @property
    def name(self) -> str:
        """What messages call the image."""
        return self.source.name

    @property
    def virtual_size(self) -> int:
        """Bytes; QEMU counts the last sector of a raw file as a whole one."""
        return round_up(self.source.size, SECTOR)

    @property
    def cluster_size(self) -> int:
        """Raw images have sectors."""
        return SECTOR

    def iter_extents(self, start: int, end: int, window: int) -> Iterator[Extents]:
        """DATA and ZERO extents; *window* is not used."""
        del window
        end = min(end, self.virtual_size)
        batch: list[tuple[int, int]] = []
        done = start
        for extent_start, extent_end in stored_ranges(self.source, start, end):
            batch.append((extent_start, extent_end))
            if len(batch) == RAW_EXTENTS_AT_ONCE:
                yield _raw_extents(batch, done, extent_end)
                batch, done = [], extent_end
        if done < end:
            yield _raw_extents(batch, done, end)

    def read_data(self, host: int, length: int) -> bytes:
        """Read from the file."""
        return self.source.read(host, length)

    def read_compressed(self, host: int, csize: int) -> bytes:
        """Nothing in a raw image is compressed."""
        raise AssertionError(f"{self.name}: raw images are not compressed ({host}, {csize})")


def layer_of_qcow2(image: Qcow2Image, data: Readable, walk: Walk = iter_extents) -> Layer:
    """A qcow2 image whose clusters are in *data*: its own file, or its external data file."""
    return Qcow2Layer(image, data, walk)


def layer_of_raw(readable: Readable) -> Layer:
    """A raw image."""
    return RawLayer(readable)


def stored_ranges(source: Readable, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and end of what is not known to be a hole of the file, ascending and disjoint.

    Unlike :func:`chainmerge.storage.extents.raw_data_extents` this looks at only a part of the
    file, and takes what is not a file of the operating system for data as a whole.
    """
    end = min(end, source.size)
    while start < end:
        data, hole = start, end
        if isinstance(source, OpenFile):
            try:
                data = os.lseek(source.fd, start, os.SEEK_DATA)
                hole = os.lseek(source.fd, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end of the file
                    return
                # What the file system cannot tell may be data; reading it tells what is wrong.
        if data >= end:
            return
        hole = min(hole, end) if hole > data else end
        yield data, hole
        start = hole


def _raw_extents(data: Sequence[tuple[int, int]], start: int, end: int) -> Extents:
    """DATA at the given ranges, ZERO elsewhere from *start* to *end*."""
    edges = np.array([start, *chain.from_iterable(data), end], np.uint64)
    length = np.diff(edges)
    kind = np.full(len(length), Kind.ZERO, np.uint8)
    kind[1::2] = Kind.DATA
    host = np.where(kind == Kind.DATA, edges[:-1], np.uint64(0))
    extents = Extents(edges[:-1], length, kind, host, np.zeros(len(length), np.uint32))
    return extents.take(np.flatnonzero(length))
