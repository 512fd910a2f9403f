# SPDX-License-Identifier: Apache-2.0
"""Whether an image is still the one that a record describes, and what has happened to it since."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.identity import Sameness, compare, identify, node_of
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chainmerge.records.identity import ImageIdentity


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


def moved(identities: Iterable[ImageIdentity]) -> dict[str, str]:
    """What images were called that have another path by now, and what that is.

    These are block devices: their nodes are numbered as they come up. One that is not up is not
    among them, nor one that nothing tells from others.
    """
    return {
        one.path: node
        for one in identities
        if one.kind == "block" and one.birth and not is_there(one) and (node := node_of(one.birth))
    }


def called(identity: ImageIdentity, moves: Mapping[str, str]) -> ImageIdentity:
    """The same identity, with the path that the image has by now according to :func:`moved`."""
    path = moves.get(identity.path, identity.path)
    return msgspec.structs.replace(identity, path=path)


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
