# SPDX-License-Identifier: Apache-2.0
"""What holds the merges of several disks together until the last of them is done.

``.BASE.chainmerge-disks`` stands beside the base of each disk, where the other small files do
(:mod:`chainmerge.records.files`); that of a pull beside top, as several disks can be pulled from
one base. It names all disks, the request that finishes them, and whether this one is done. The
first merge begins when all of these are durable; they go when all merges are done. How far a merge
came is for its own files to say: these only say that it is one of several, and that one which has
not begun yet is still to be done.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from chainmerge.errors import ChainmergeError
from chainmerge.records.files import (
    StateFile,
    UnusableState,
    is_path,
    read_state,
    write_state,
)
from chainmerge.records.identity import BlockDevices, ImageIdentity
from chainmerge.records.request import RecordedRequest, command_of, live_command_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Tops are called as they were named.
_PLACES: Final = frozenset({"base"})


class DiskEntry(msgspec.Struct, frozen=True):
    """One of several disks. All paths are absolute."""

    base: str
    top: str
    disks: list[str]
    """The tops of all disks, this one included, in the order in which they were named."""
    command: str = ""
    """The command that was recorded by earlier versions, which do not record the request."""
    done: bool = False
    identity: ImageIdentity | None = None
    """Of the image that it stands beside, where that is recorded."""
    request: RecordedRequest | None = None
    """What was asked for of all disks."""
    pulls: bool = False
    """Whether it stands beside top, which data is pulled up into."""

    @property
    def written(self) -> str:
        """The image that the merge of this disk writes to, and that this stands beside."""
        return self.top if self.pulls else self.base

    @property
    def finishing_command(self) -> str | None:
        """What does the merges of all disks, closed, as far as they are not done."""
        if self.request is None:
            return self.command or None
        return command_of(self.request)

    @property
    def live_request(self) -> RecordedRequest | None:
        """What was asked for of all disks of a running VM; None if they are closed images."""
        return self.request if self.request is not None and self.request.is_live else None

    @property
    def live_command(self) -> str | None:
        """What does them in the running VM; None if they were not begun in one."""
        return None if self.live_request is None else live_command_of(self.live_request)


def keep_entry(entry: DiskEntry) -> None:
    """Write an entry durably; replaces that of an earlier run.

    Raises chainmerge.errors.Failed where the file system has no room, StateDirectoryUnusable.
    """
    write_state(DISK_ENTRY.place(Path(entry.written)), entry)


def keep_entries(entries: Sequence[DiskEntry]) -> None:
    """Have the entries of all disks durable, or no more of them than there were.

    Raises what :func:`keep_entry` raises.
    """
    # Those of an interrupted run tell what it was to merge, and which disks are done.
    new = [one for one in entries if load_entry(Path(one.written)) is None]
    try:
        for entry in entries:
            keep_entry(entry)
    except ChainmergeError:
        for entry in new:
            forget_entry(Path(entry.written))
        raise


def note_done(entry: DiskEntry) -> None:
    """Note that a disk is merged. If that cannot be noted, a rerun finds out."""
    with contextlib.suppress(ChainmergeError):
        keep_entry(msgspec.structs.replace(entry, done=True))


def read_entry(file: Path, devices: BlockDevices) -> DiskEntry | None:
    """The entry in *file*; None if absent or unreadable."""
    try:
        return read_state(file, DiskEntry, devices, _PLACES, _problems)
    except UnusableState:
        return None


def _problems(entry: DiskEntry) -> Iterator[str]:
    if not all(is_path(path) for path in (entry.top, *entry.disks)):
        yield "a name in it is not a path"


DISK_ENTRY: Final = StateFile("chainmerge-disks", read_entry, lambda entry: entry.identity)
# Both take the path of the image that the merge of a disk writes to.
disk_file = DISK_ENTRY.found
load_entry = DISK_ENTRY.load


def find_entry(base: Path, top: Path | None) -> DiskEntry | None:
    """The entry of the merge of *top* into *base*, whichever of them it stands beside."""
    entry = None if top is None else load_entry(top)
    return entry if entry is not None and entry.pulls else load_entry(base)


def forget_entry(written: Path) -> None:
    """Remove an entry, durably, if there is one; one that stays says less than it did."""
    with contextlib.suppress(OSError, ChainmergeError):
        DISK_ENTRY.forget(written)
