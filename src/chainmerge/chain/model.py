# SPDX-License-Identifier: Apache-2.0
"""A chain of images as values."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from msgspec import Struct, field

from chainmerge.chain.errors import ForeignFormat, NoBackingFile, NotInChain
from chainmerge.errors import ChainmergeError
from chainmerge.qcow2.bitmaps import BitmapEntry
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.features import CryptMethod
from chainmerge.qcow2.header import Header

if TYPE_CHECKING:
    import os

Identity = tuple[int, int]
"""A regular file's device and inode; (0, device number) for a block device."""


class ImageFormat(StrEnum):
    """The formats that are read here. Any other format is kept as the string that declares it."""

    QCOW2 = "qcow2"
    RAW = "raw"


_READ_HERE: Final = frozenset(ImageFormat)
_READ_AS_RAW: Final = frozenset({"file", "host_device"})


def format_meant_by(declared: str) -> str:
    """The format of an image that is declared as *declared*.

    Where a header or a user names the protocol by which QEMU reaches a file, QEMU reads it as a
    raw image. Before 9.0 it wrote such names itself, after a job on a node without a format
    node above (see ``backing-mask-protocol`` of ``block-commit``).
    """
    return ImageFormat.RAW if declared in _READ_AS_RAW else declared


def identity_of(status: os.stat_result) -> Identity:
    """What distinguishes a file or block device from others, whatever name it was reached by.

    A device can have several nodes, on several file systems, so the inode of its node does not
    identify it. No file system has device number 0.
    """
    if stat.S_ISBLK(status.st_mode):
        return (0, status.st_rdev)
    return (status.st_dev, status.st_ino)


class ImageInfo(Struct, frozen=True):
    """One image, as it was when it was read."""

    path: Path
    """Absolute, as reached: the user's path, or the name stored in the image above joined to
    that image's directory. Relative backing names count from here."""
    real_path: Path
    """All symbolic links resolved."""
    identity: Identity
    is_block_device: bool
    format: str
    """An :class:`ImageFormat`, or the name of a format that only QEMU knows."""
    format_declared: bool
    """False if nobody declared the format and it was taken from the file's first bytes."""
    header: Header | None
    """None unless the format is qcow2."""
    file_size: int
    """Bytes of the file or device."""
    guest_size: int | None
    """Bytes of the guest's disk as QEMU counts them (raw: whole sectors, rounded up); None
    for a foreign format, unless QEMU was asked."""
    backing_name: str | None = None
    """As stored (UTF-8 with surrogate escapes)."""
    backing: Path | None = None
    """Where the backing name leads, absolute and not normalised."""
    data_file: Path | None = None
    """The external data file, one of those that the policy names."""
    extents: tuple[Path, ...] = ()
    """Other files that hold the data of a foreign image, of those that the policy allows."""
    size_problem: ChainmergeError | None = None
    """Why QEMU could not say how large the disk of a foreign image is."""
    bitmaps: tuple[BitmapEntry, ...] = ()
    """The bitmap directory, trusted or not."""
    bitmaps_problem: FormatError | None = None
    """Why the bitmap directory could not be read, where it could not; never set for a trusted
    one in a chain."""
    notes: tuple[str, ...] = ()
    """What is out of the ordinary, a sentence each."""

    @property
    def virtual_size(self) -> int:
        """Bytes of the guest's disk.

        Raises:
            ForeignFormat: the format is neither read here nor by QEMU for us.
            ForeignUnreadable: QEMU cannot read it.
        """
        if self.size_problem is not None:
            raise self.size_problem
        if self.guest_size is None:
            raise ForeignFormat(str(self.path), self.format)
        return self.guest_size

    @property
    def foreign(self) -> bool:
        """Whether only QEMU knows the format."""
        return self.format not in _READ_HERE

    @property
    def bitmaps_trusted(self) -> bool:
        """Whether every writer since the bitmaps were stored knew of them."""
        return self.header is not None and self.header.bitmaps_trusted

    @property
    def supports_bitmaps(self) -> bool:
        """Whether bitmaps can be stored in the image: qcow2 version 3."""
        return self.header is not None and self.header.version >= 3

    def has_bitmap(self, name: str) -> bool:
        """Whether the bitmap directory has an entry of this name, in whatever state."""
        return any(entry.name == name for entry in self.bitmaps)

    @property
    def encrypted(self) -> bool:
        """Whether guest data is encrypted (LUKS, or the old AES scheme)."""
        return self.header is not None and self.header.crypt_method is not CryptMethod.NONE


class Chain(Struct, frozen=True):
    """An image and the images below it: ``images`` goes from the root to the image asked for."""

    images: tuple[ImageInfo, ...]

    @property
    def top(self) -> ImageInfo:
        """The image asked for."""
        return self.images[-1]

    @property
    def root(self) -> ImageInfo:
        """The image without a backing file."""
        return self.images[0]

    @property
    def base_index(self) -> int:
        """The index of top's own backing file.

        Raises:
            NoBackingFile: top is the root.
        """
        if len(self.images) < 2:
            raise NoBackingFile(str(self.top.path))
        return len(self.images) - 2

    @property
    def base(self) -> ImageInfo:
        """Top's own backing file.

        Raises:
            NoBackingFile: top is the root.
        """
        return self.images[self.base_index]

    def middle(self, base_index: int) -> tuple[ImageInfo, ...]:
        """The images between a base and top, both left out."""
        return self.images[base_index + 1 : -1]

    def index_of(self, path: Path) -> int:
        """The index of an image, by whatever name: its own, or that of a link to it.

        Raises:
            NotInChain
        """
        for index, image in enumerate(self.images):
            if image.path == path:
                return index
        try:
            wanted = identity_of(path.stat())
        except (OSError, ValueError):
            raise NotInChain(str(path), str(self.top.path)) from None
        for index, image in enumerate(self.images):
            if image.identity == wanted:
                return index
        raise NotInChain(str(path), str(self.top.path))


def _no_formats() -> Mapping[Path, str]:
    return MappingProxyType({})


class ChainPolicy(Struct, frozen=True):
    """What the user allows and declares beyond what is always accepted."""

    allow_backing: tuple[Path, ...] = ()
    """Further backing files, or directories that may hold them, with everything below."""
    named: tuple[Path, ...] = ()
    """Images that the user has named: each may be a backing file, wherever it lies. Not so what
    is beside it."""
    allow_data_files: tuple[Path, ...] = ()
    """External data files that may be used."""
    metadata_only: bool = False
    """Nobody is going to read guest data: external data files are not asked for, nor opened."""
    formats: Mapping[Path, str] = field(default_factory=_no_formats)
    """Formats by image path; symbolic links make no difference."""
    max_images: int = 65536
    """The longest chain that is followed."""
