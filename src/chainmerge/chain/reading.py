# SPDX-License-Identifier: Apache-2.0
"""One image file: opened safely, and read into an :class:`ImageInfo`."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.arithmetic.rounding import round_up
from chainmerge.chain.errors import DataFileRefused, ImageReplaced, WrongFormat
from chainmerge.chain.model import Identity, ImageFormat, ImageInfo, identity_of
from chainmerge.chain.names import path_from_header, working_directory
from chainmerge.qcow2.bitmaps import BitmapEntry, read_directory
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.features import CryptMethod, Incompatible
from chainmerge.qcow2.header import MAGIC, Header
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.known_headers import KnownHeaders
from chainmerge.storage.files import FileReadable, WritablePort

if TYPE_CHECKING:
    from collections.abc import Iterable

_SECTOR = 512
_TABLES_BYTES = 256 << 10
_NOBODY_CAN_TELL = {errno.EIO, errno.ENOMEM, errno.ESTALE, errno.EINTR, errno.ETIMEDOUT}


class DeclaredFormat(Struct, frozen=True):
    """The format of an image, and who says so (None: its first bytes)."""

    name: str
    declared_by: str | None


def open_image(image: ImageInfo) -> FileReadable:
    """Open an image of a chain for reading, making sure that it is still the same file.

    Raises:
        Refused: it cannot be opened, by an error of the storage layer.
        ImageReplaced: it is not there any more, but something else is.
    """
    readable = FileReadable(image.path)
    if identity_of_opened(readable) != image.identity:
        readable.close()
        raise ImageReplaced(str(image.path))
    return readable


def open_for_writing(image: ImageInfo) -> WritablePort:
    """Open an image of a chain to be written, making sure that it is still the same file.

    Between its being found, or locked, and this, somebody could have put another file or a link
    under its name.

    Raises:
        Refused: it cannot be opened, by an error of the storage layer.
        ImageReplaced: it is not there any more, but something else is.
    """
    port = WritablePort(image.real_path)
    if identity_of_opened(port) != image.identity:
        port.close()
        raise ImageReplaced(str(image.path))
    return port


def identity_of_opened(readable: FileReadable) -> Identity:
    """The identity of an open file or block device."""
    if not readable.is_block_device:
        return readable.identity
    return identity_of(os.fstat(readable.fd))


def identity_at(path: Path) -> Identity | None:
    """The identity of what *path* leads to, None if that is nothing.

    Raises:
        OSError: nobody can tell.
    """
    try:
        return identity_of(path.stat())
    except ValueError:
        return None
    except OSError as error:
        if error.errno in _NOBODY_CAN_TELL:
            raise
        return None


def begins_as_qcow2(readable: FileReadable) -> bool:
    """Whether the file has the magic of a qcow2 image."""
    return readable.read(0, len(MAGIC)) == MAGIC


def describe(path: Path, readable: FileReadable, declared: DeclaredFormat) -> ImageInfo:
    """Read an image opened as *path* by its format; ``backing`` and ``data_file`` stay None.

    A bitmap directory that cannot be read is kept as ``bitmaps_problem``.

    Raises:
        WrongFormat: it was declared as qcow2 and is not.
        FormatError: a qcow2 header that QEMU would not open either.
    """
    return describe_at(Path(os.path.realpath(path)), path, readable, declared, KnownHeaders())


def describe_at(
    real_path: Path,
    path: Path,
    readable: FileReadable,
    declared: DeclaredFormat,
    headers: KnownHeaders,
) -> ImageInfo:
    """As :func:`describe`, where *path* is known to lead to *real_path*, by all symbolic links.

    *headers* are those that have been parsed before.
    """
    header: Header | None = None
    bitmaps: tuple[BitmapEntry, ...] = ()
    problem: FormatError | None = None
    notes: list[str] = []
    guest_size: int | None = None
    if declared.name == ImageFormat.QCOW2:
        if not begins_as_qcow2(readable):
            raise WrongFormat(str(path), declared.declared_by or "the file itself")
        # The header is followed by the tables, which will be read next.
        readable.read_ahead(0, _TABLES_BYTES)
        header = headers.parse(identity_of_opened(readable), readable)
        image = Qcow2Image(readable, header)
        guest_size = header.virtual_size
        try:
            bitmaps = read_directory(image)
        except FormatError as error:
            problem = error
        notes += _header_notes(header, problem)
    elif declared.name == ImageFormat.RAW:
        guest_size = round_up(readable.size, _SECTOR)
        if begins_as_qcow2(readable):
            notes.append("its content begins like a qcow2 image, but it is declared as raw")
    else:
        notes.append(f"its format, {declared.name!r}, is read by QEMU only")
    return ImageInfo(
        path=path,
        real_path=real_path,
        identity=identity_of_opened(readable),
        is_block_device=readable.is_block_device,
        format=_format_named(declared.name),
        format_declared=declared.declared_by is not None,
        header=header,
        file_size=readable.size,
        guest_size=guest_size,
        backing_name=None if header is None else header.backing_name,
        bitmaps=bitmaps,
        bitmaps_problem=problem,
        notes=tuple(notes),
    )


def _format_named(name: str) -> str:
    return ImageFormat(name) if name in set(ImageFormat) else name


def _header_notes(header: Header, problem: FormatError | None) -> list[str]:
    notes = []
    if header.crypt_method is not CryptMethod.NONE:
        notes.append(f"its guest data is encrypted ({header.crypt_method.name})")
    if header.incompatible & Incompatible.DIRTY:
        notes.append("it was not closed properly (dirty bit)")
    if header.incompatible & Incompatible.CORRUPT:
        notes.append("QEMU has marked it corrupt")
    if problem is not None:
        notes.append(f"its bitmaps cannot be read: {problem.sentence}")
    if header.bitmaps is not None and not header.bitmaps_trusted:
        notes.append(
            f"{counted(header.bitmaps.count, 'broken bitmap')}: a program that does not know "
            "bitmaps wrote to the image, or its last writer died"
        )
    return notes


def allowed_data_file(image: ImageInfo, header: Header, allowed: Iterable[Path]) -> Path | None:
    """The external data file of an image, which must be one of those *allowed*.

    QEMU resolves a relative name against the current directory (7.2), people mean the directory of
    the image; since the user must name the file anyway, either will do.

    Returns:
        The file's path as the user gave it, None if the image holds its data itself.

    Raises:
        DataFileRefused
    """
    if not header.incompatible & Incompatible.DATA_FILE:
        return None
    candidates = {
        identity
        for place in _data_file_places(image.path, header)
        if (identity := identity_at(place)) is not None
    }
    for path in allowed:
        if identity_at(path) in candidates:
            return path.absolute()
    raise DataFileRefused(str(image.path), header.data_file_name or "")


def named_data_file(image: ImageInfo) -> Path | None:
    """The external data file that an image's header leads to, allowed or not; None without one."""
    if image.header is None:
        return None
    places = _data_file_places(image.path, image.header)
    return next((place for place in places if identity_at(place) is not None), None)


def data_file_places(image: Path) -> tuple[Path, ...]:
    """Where the external data file of a qcow2 image can be; see :func:`allowed_data_file`.

    Returns:
        Nothing for an image that holds its data itself.

    Raises:
        FormatError: the header is damaged.
    """
    with FileReadable(image) as readable:
        return _data_file_places(image, Qcow2Image(readable).header)


def _data_file_places(image: Path, header: Header) -> tuple[Path, ...]:
    stored = path_from_header(header.data_file_name or "")
    if not stored or not header.incompatible & Incompatible.DATA_FILE:
        return ()
    return tuple(directory / stored for directory in (image.parent, *working_directory()))
