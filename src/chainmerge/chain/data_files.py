# SPDX-License-Identifier: Apache-2.0
"""Who uses an external data file: like a backing file, it does not know its users."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chainmerge.chain.names import path_from_header, working_directory
from chainmerge.chain.reading import begins_as_qcow2, identity_at
from chainmerge.chain.relatives import find_users
from chainmerge.chain.surroundings import surroundings_of
from chainmerge.errors import ChainmergeError
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.header import parse_header
from chainmerge.storage.errors import ImageMissing, WrongFileType
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chainmerge.chain.model import Identity


def find_data_file_users(data_file: Path, search: Sequence[Path] = ()) -> tuple[Path, ...]:
    """Find the images that keep their guest data in *data_file*, or stand on it.

    Args:
        data_file: an external data file that exists.
        search: directories to look into, besides that of the file.

    Returns:
        Their paths, in order; also those of files that cannot be read, which could be one.

    Raises:
        SearchPathUnusable, TooManyFiles
    """
    identity = identity_at(data_file)
    found = set(find_users([data_file], search))
    surroundings = surroundings_of([data_file], search)
    for path in surroundings.near():
        try:
            if identity in _data_files_of(path):
                found.add(path)
        except (OSError, ChainmergeError) as error:
            # Damaged images do not count: QEMU does not open them either.
            if not isinstance(error, FormatError | WrongFileType | ImageMissing):
                found.add(path)
    for path in surroundings.around():
        with contextlib.suppress(OSError, ChainmergeError):
            if identity in _data_files_of(path):
                found.add(path)
    return tuple(sorted(found))


def _data_files_of(path: Path) -> set[Identity | None]:
    """What the name of an external data file in an image's header can lead to."""
    if not path.is_file():
        return set()
    with FileReadable(path) as readable:
        name = parse_header(readable).data_file_name if begins_as_qcow2(readable) else None
    if not name or "\0" in name:
        return set()
    stored = path_from_header(name)
    return {identity_at(place / stored) for place in (path.parent, *working_directory())} - {None}
