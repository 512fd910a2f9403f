# SPDX-License-Identifier: Apache-2.0
"""Which images of a directory are leaves, and which of the images below them have other users."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.chain.model import Identity, identity_of
from chainmerge.chain.names import possible_backing_paths
from chainmerge.chain.reading import begins_as_qcow2, identity_at
from chainmerge.errors import ChainmergeError
from chainmerge.inventory.errors import DirectoryTooLarge, DirectoryUnreadable
from chainmerge.qcow2.header import glance_at_backing_name
from chainmerge.storage.errors import reason_of
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_ENTRIES: Final = 65_536
"""Entries of a directory that are looked at."""


class DirectoryImages(Struct, frozen=True):
    """The qcow2 images of a directory.

    Attributes:
        images: Their paths, in order; each image once, by its first name.
        leaves: Those of them that none of the others stands on.
        users: By image: how many of the directory's images have it as their backing file.
    """

    images: tuple[Path, ...]
    leaves: tuple[Path, ...]
    users: dict[Identity, int]


def images_in(directory: Path, max_entries: int = MAX_ENTRIES) -> DirectoryImages:
    """Read the headers of all qcow2 images in a directory, as far as their backing names.

    A file that begins like a qcow2 image counts as one, however damaged it is.

    Raises:
        DirectoryUnreadable, DirectoryTooLarge
    """
    images: dict[Identity, Path] = {}
    used_by: dict[Identity, set[Identity]] = defaultdict(set)
    for path in _entries(directory, max_entries):
        identity = _identity_of_image(path)
        if identity is None or identity in images:
            continue
        images[identity] = path
        for backing in _backing_of(path):
            used_by[backing].add(identity)
    leaves = tuple(path for identity, path in images.items() if not used_by.get(identity))
    counts = {identity: len(users) for identity, users in used_by.items()}
    return DirectoryImages(tuple(images.values()), leaves, counts)


def _entries(directory: Path, most: int) -> Iterator[Path]:
    names = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > most:
                    raise DirectoryTooLarge(str(directory), most)
    except OSError as error:
        raise DirectoryUnreadable(str(directory), reason_of(error)) from error
    yield from (directory / name for name in sorted(names))


def _identity_of_image(path: Path) -> Identity | None:
    """The identity of a file or device that begins like a qcow2 image; None for anything else."""
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            return None
        with FileReadable(path) as readable:
            return identity_of(status) if begins_as_qcow2(readable) else None
    except (OSError, ChainmergeError):
        # What nobody can read may be anything.
        return None


def _backing_of(path: Path) -> Iterator[Identity]:
    """The image that one stands on; nothing for a root, or where the header does not say."""
    try:
        with FileReadable(path) as readable:
            name = glance_at_backing_name(readable)
        for backing in possible_backing_paths(path, name or "") if name else ():
            identity = identity_at(backing)
            if identity is not None:
                yield identity
    except (OSError, ChainmergeError):
        # The row of this image says what is wrong with it.
        return
