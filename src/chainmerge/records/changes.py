# SPDX-License-Identifier: Apache-2.0
"""Whether an image is still the one that a record describes, and what has happened to it since."""

from __future__ import annotations

import stat
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.identity import BlockDevices, ImageIdentity, Sameness, compare, identify
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_Document = TypeVar("_Document", bound=msgspec.Struct)
_Part = TypeVar("_Part")

_NO_MOVES: Final[Mapping[str, str]] = MappingProxyType({})


def what_stands_at(path: str | Path, identity: ImageIdentity) -> Sameness:
    """Whether *identity* is that of the file at *path*; OTHER also if there is none.

    Raises OSError if that cannot be looked at.
    """
    try:
        return compare(identify(Path(path)), identity)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return Sameness.OTHER


def is_there(identity: ImageIdentity) -> bool:
    """Whether the image is certainly still where it was; no where that cannot be looked at."""
    try:
        return what_stands_at(identity.path, identity) is Sameness.SAME
    except OSError:
        return False


def moved(identities: Iterable[ImageIdentity], devices: BlockDevices) -> dict[str, str]:
    """What images were called that have another path by now, and what that is.

    These are block devices: their nodes are numbered as they come up. One that is not up is not
    among them, nor one that nothing tells from others.
    """
    return {
        one.path: node
        for one in identities
        if one.kind == "block"
        and one.birth
        and not is_there(one)
        and (node := devices.node_of(one.birth))
    }


def called(identity: ImageIdentity, moves: Mapping[str, str]) -> ImageIdentity:
    """The same identity, with the path that the image has by now according to :func:`moved`."""
    path = moves.get(identity.path, identity.path)
    return msgspec.structs.replace(identity, path=path)


def as_called_now(
    document: _Document, devices: BlockDevices, places: frozenset[str] = frozenset()
) -> _Document:
    """The same document, where volumes have got other numbers since.

    *places* are the fields, wherever in it they are, that hold paths of images: one, or a list.
    """
    moves = moved(_identities(document), devices)
    return _renamed(document, moves, places, _NO_MOVES) if moves else document


def named_in(document: object, places: frozenset[str]) -> Iterator[str]:
    """The paths that stand in a document: those of identities, and those in *places*."""
    yield from (one.path for one in _identities(document))
    for struct in _parts(document, msgspec.Struct):
        for name in places.intersection(struct.__struct_fields__):
            here = getattr(struct, name)
            texts = here if isinstance(here, list) else [here]
            yield from (one for one in texts if isinstance(one, str))


def _identities(document: object) -> Iterator[ImageIdentity]:
    return _parts(document, ImageIdentity)


def _parts(value: object, kind: type[_Part]) -> Iterator[_Part]:
    """All of a kind that stands in a document."""
    if isinstance(value, kind):
        yield value
    if isinstance(value, list):
        for one in value:
            yield from _parts(one, kind)
    elif isinstance(value, msgspec.Struct):
        for one in msgspec.structs.asdict(value).values():
            yield from _parts(one, kind)


def _renamed(
    value: Any, moves: Mapping[str, str], places: frozenset[str], here: Mapping[str, str]
) -> Any:
    """A part of a document; *here* are the *moves*, where its texts are paths of images."""
    match value:
        case str():
            return here.get(value, value)
        case list():
            return [_renamed(one, moves, places, here) for one in value]
        case ImageIdentity():
            return called(value, moves)
        case msgspec.Struct():
            parts = {
                name: _renamed(one, moves, places, moves if name in places else _NO_MOVES)
                for name, one in msgspec.structs.asdict(value).items()
            }
            return msgspec.structs.replace(value, **parts)
    return value


def last_change(image: Path) -> str:
    """A text that differs after every change of *image*; empty if nothing is.

    Changes of its name, owner and the like count too.

    Raises OSError if there is nothing.
    """
    status = image.stat()
    if not stat.S_ISREG(status.st_mode):
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def data_changed(image: Path) -> str:
    """A text that differs after every write to *image*; empty if nothing tells."""
    try:
        status = image.stat()
    except OSError:
        return ""
    return f"{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""


def stands_on(image: Path, backing: str | None) -> bool:
    """Whether the image's header names *backing* as its backing file.

    Raises what opening and reading an image raises.
    """
    with FileReadable(image) as readable:
        return Qcow2Image(readable).header.backing_name == backing
