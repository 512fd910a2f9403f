# SPDX-License-Identifier: Apache-2.0
"""What holds the merges of several disks together until the last of them is done.

``.BASE.chainmerge-disks`` stands beside the base of each disk, where the other small files do
(:mod:`chainmerge.records.files`). It names all disks, the command that finishes them, and whether
this one is done. The first merge begins when all of these are durable; they go when all merges
are done. How far a merge came is for its own files to say: these only say that it is one of
several, and that one which has not begun yet is still to be done.
"""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING, Final

import msgspec

from chainmerge.errors import ChainmergeError
from chainmerge.records.files import (
    UnusableState,
    beside,
    read_state,
    remove_durably,
    write_state,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chainmerge.records.merge_journal import Asked

SUFFIX: Final = "chainmerge-disks"


class DiskEntry(msgspec.Struct, frozen=True):
    """One of several disks. All paths are absolute."""

    base: str
    top: str
    disks: list[str]
    """The tops of all disks, this one included, in the order in which they were named."""
    command: str
    done: bool


def disk_file(base: Path) -> Path:
    """Where the entry of the disk that is merged into *base* stands, if there is one."""
    return beside(base, SUFFIX)


def keep_entry(base: Path, entry: DiskEntry) -> None:
    """Write an entry durably; replaces that of an earlier run.

    Raises chainmerge.errors.Failed where the file system has no room, StateDirectoryUnusable.
    """
    write_state(disk_file(base), entry)


def forget_entry(base: Path) -> None:
    """Remove an entry, durably, if there is one; one that stays says less than it did."""
    with contextlib.suppress(OSError, ChainmergeError):
        remove_durably(disk_file(base))


def read_entry(file: Path) -> DiskEntry | None:
    """The entry in *file*; None where there is none that can be read."""
    try:
        return read_state(file, DiskEntry)
    except UnusableState:
        return None


def command_for_disks(tops: Sequence[str], bases: Sequence[str], asked: Asked) -> str:
    """What merges all of the disks, or finishes them, as one types it into a shell."""
    options = ("delete", "keep-name", "shrink", "discard")
    flags = [f"--{name}" for name in options if getattr(asked, name.replace("-", "_"))]
    named = [word for base in bases for word in ("--base", base)]
    return shlex.join(["chainmerge", "merge", *flags, *named, "--", *tops])
