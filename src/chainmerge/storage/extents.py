# SPDX-License-Identifier: Apache-2.0
"""Where the data of a sparse file lies."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from chainmerge.storage.errors import ReadFailed, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.storage.locks import AnyFile


def raw_data_extents(readable: AnyFile) -> Iterator[tuple[int, int]]:
    """Offset and length, in bytes, of what is not known to be a hole; ascending and disjoint.

    Everything else up to the file's size reads as zeros. A block device, and a file on a file
    system that knows no holes, is one extent. Moves the descriptor's file offset.

    Raises:
        ReadFailed: the storage reported an error.
    """
    if readable.is_block_device:
        if readable.size:
            yield 0, readable.size
        return
    position = 0
    while position < readable.size:
        start = _seek(readable, position, os.SEEK_DATA)
        if start is None or start >= readable.size:
            return
        hole = _seek(readable, start, os.SEEK_HOLE)
        end = readable.size if hole is None else min(hole, readable.size)
        if end <= start:  # the file changes under us: nothing is known about the rest
            end = readable.size
        yield start, end - start
        position = end


def _seek(readable: AnyFile, position: int, whence: int) -> int | None:
    """The offset found, or None if there is neither data nor a hole behind *position*."""
    try:
        return os.lseek(readable.fd, position, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            # The file system cannot tell: all of it may be data.
            return position if whence == os.SEEK_DATA else None
        length = readable.size - position
        raise ReadFailed(readable.name, position, length, reason_of(error)) from error
