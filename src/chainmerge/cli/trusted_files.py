# SPDX-License-Identifier: Apache-2.0
"""Files that may say what a command does: those that nobody else can have written.

A configuration names programs that are run and images that are opened. Whoever can write to it has
the rights of all who obey it, so it is judged as ``sudo`` judges its own and ``ssh`` a user's: the
file and every directory on the way to it belong to root or to the user, and nobody else may
write to them. Root obeys root alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.cli.errors import ConfigurationUnreadable, ConfigurationUntrusted

if TYPE_CHECKING:
    from collections.abc import Iterator

_LARGEST: Final = 1 << 20
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def read_trusted(path: str) -> bytes:
    """Return what a file holds.

    Links are followed, and what they lead to is judged.

    Raises:
        ConfigurationUntrusted: somebody else could have written it.
        ConfigurationUnreadable: it cannot be read, is not a regular file, or is too large.
    """
    try:
        real = os.path.realpath(path, strict=True)
        # A pipe would keep us waiting.
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        raise ConfigurationUnreadable(path, _reason(error)) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationUnreadable(path, "it is not a regular file")
        # What is open is what is judged.
        for why in _objections(real, status):
            raise ConfigurationUntrusted(path, why, os.geteuid())
        if status.st_size > _LARGEST:
            raise ConfigurationUnreadable(path, f"it has more than {_LARGEST} bytes")
        return os.pread(fd, _LARGEST, 0)
    except OSError as error:
        raise ConfigurationUnreadable(path, _reason(error)) from error
    finally:
        os.close(fd)


def _objections(real: str, status: os.stat_result) -> Iterator[str]:
    if status.st_uid not in {0, os.geteuid()}:
        yield f"it belongs to the user with the number {status.st_uid}"
    if status.st_mode & _OTHERS_WRITE:
        yield "other users can write to it"
    for directory in Path(real).parents:
        try:
            above = directory.stat()
        except OSError as error:
            yield f"{directory} cannot be judged: {_reason(error)}"
            return
        if above.st_uid not in {0, os.geteuid()}:
            yield f"{directory} belongs to the user with the number {above.st_uid}"
        # Nobody can replace what is not theirs in a directory like /tmp.
        if above.st_mode & _OTHERS_WRITE and not above.st_mode & stat.S_ISVTX:
            yield f"other users can write to {directory}"


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
