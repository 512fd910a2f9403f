# SPDX-License-Identifier: Apache-2.0
"""The other files in which a vmdk image keeps its data.

A vmdk image can be a text that names other files, its *extents*, and QEMU opens whatever is named
there. So the text is read here first. It has to be understood to the last line: what is passed
over here must not be an extent to QEMU (``vmdk_parse_extents`` in block/vmdk.c).
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from chainmerge.errors import Refused
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from chainmerge.qcow2.readable import Readable

_SPARSE_MAGIC: Final = b"KDMV"
_OLD_SPARSE_MAGIC: Final = b"COWD"
_MAGIC_BYTES: Final = 4
# In the header that begins with the first of them: sectors, little-endian.
_CAPACITY_AT: Final = 12
_CAPACITY_BYTES: Final = 8

# What QEMU reads of a text, at most.
_TEXT_BYTES: Final = (1 << 20) - 1

_EXTENT: Final = re.compile(
    rb"[ \t]*RW[ \t]+\d{1,18}[ \t]+(?P<type>FLAT|SPARSE|VMFS|VMFSSPARSE|SESPARSE)[ \t]+"
    rb'"(?P<name>[^"\r\n]{1,511})"(?:[ \t]+\d{1,18})?[ \t]*'
)
_SETTING: Final = re.compile(rb"[ \t]*(?!RW[ \t=])[A-Za-z][\w.]*[ \t]*=.*")
_COMMENT: Final = re.compile(rb"[ \t]*(#.*)?")
# Their header is that of an image, and QEMU goes by a text in there as well.
_TYPES_WITH_HEADER: Final = frozenset({b"SPARSE", b"VMFSSPARSE"})


class NotUnderstood(Exception):
    """Why nobody can tell which other files a vmdk image leads to, in words."""


def extents_of(
    image: Path, readable: Readable, why_not_allowed: Callable[[Path], str | None]
) -> tuple[Path, ...]:
    """The other files that QEMU opens with a vmdk image, each once.

    Args:
        image: its path, which relative names count from.
        readable: the same, open.
        why_not_allowed: why a file may not be used, in words; None if it may. It is asked before
            the file is opened.

    Raises:
        NotUnderstood: the text cannot be read as QEMU reads it, or a file may not be used.
    """
    magic = readable.read(0, _MAGIC_BYTES)
    if magic in {_SPARSE_MAGIC, _OLD_SPARSE_MAGIC}:
        _require_no_text(readable, magic)
        return ()
    found: dict[Path, None] = {}
    for kind, name in _named_in(readable):
        path = image.parent / os.fsdecode(name)
        reason = why_not_allowed(path)
        if reason is not None:
            raise NotUnderstood(f"it keeps data in {path}, {reason}")
        _require_plain(path, has_header=kind in _TYPES_WITH_HEADER)
        found[path] = None
    return tuple(found)


def _named_in(readable: Readable) -> Iterator[tuple[bytes, bytes]]:
    """Type and name of the extents in a text."""
    if readable.size > _TEXT_BYTES:
        raise NotUnderstood("it is neither a sparse vmdk image nor a text that describes one")
    text = readable.read(0, readable.size).split(b"\0", 1)[0]
    for number, ended in enumerate(text.split(b"\n"), start=1):
        line = ended.removesuffix(b"\r")
        extent = _EXTENT.fullmatch(line)
        if extent is not None:
            yield extent["type"], extent["name"]
        elif not (_COMMENT.fullmatch(line) or _SETTING.fullmatch(line)):
            raise NotUnderstood(f"line {number} of its description cannot be understood")


def _require_plain(path: Path, *, has_header: bool) -> None:
    try:
        with FileReadable(path) as extent:
            if has_header:
                _require_no_text(extent, extent.read(0, _MAGIC_BYTES))
    except Refused as error:
        raise NotUnderstood(f"it keeps data in another file. {error.sentence}") from error


def _require_no_text(readable: Readable, magic: bytes) -> None:
    """An image without sectors is only a place for a text, says QEMU."""
    if magic == _SPARSE_MAGIC and not any(readable.read(_CAPACITY_AT, _CAPACITY_BYTES)):
        raise NotUnderstood(f"{readable.name} holds no data, but a description of other files")
