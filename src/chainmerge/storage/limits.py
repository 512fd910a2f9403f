# SPDX-License-Identifier: Apache-2.0
"""How many files may be open at the same time."""

from __future__ import annotations

import os
import resource
from typing import Final

from chainmerge.storage.errors import OpenFilesLimited

# What is opened for a moment besides the images of a chain: journals, volumes, pipes of tools.
_RESERVE: Final = 64


def allow_open_files(count: int) -> None:
    """Make sure that *count* files can be opened in addition to those that are open now.

    Raises:
        OpenFilesLimited: the hard limit does not allow it.
    """
    needed = _open_now() + count + _RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _allows(soft, needed):
        return
    if not _allows(hard, needed):
        raise OpenFilesLimited(needed, hard)
    # A lock lives as long as its open file, so a chain takes a descriptor for each image. The
    # usual soft limit of 1024 is there for programs that use select(2), which knows no higher
    # descriptors; neither we nor qemu-storage-daemon, which inherits the limit, do.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _allows(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or needed <= limit


def _open_now() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    except OSError:  # no /proc in this container: the reserve has to do
        return 0
