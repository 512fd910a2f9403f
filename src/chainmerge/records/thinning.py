# SPDX-License-Identifier: Apache-2.0
"""What holds the merges together that thin out the snapshots of a chain: ``.LEAF.chainmerge-thin``.

It stands beside the leaf, whose name stays; that of a logical volume is called after the volume's
name, as that is another volume's once base has it. It names all merges, the request that finishes
them, and which of them are done. It is durable before the first of them begins, and goes when all
are done. How far a merge came is for its own files to say.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from chainmerge.documents.retention import SnapshotFate
from chainmerge.errors import ChainmergeError
from chainmerge.options import DirectionChoice
from chainmerge.records.changes import what_stands_at
from chainmerge.records.files import (
    StateFile,
    UnusableState,
    is_path,
    read_state,
    remove_durably,
    write_state,
)
from chainmerge.records.identity import BlockDevices, ImageIdentity, Sameness
from chainmerge.records.request import RecordedRequest, command_of
from chainmerge.storage.lvm_volumes import lasting_path
from chainmerge.storage.volume_names import mapper_name_in

if TYPE_CHECKING:
    from collections.abc import Iterator

_PLACES: Final = frozenset({"leaf"})


class ThinnedRange(msgspec.Struct, frozen=True):
    """Images that become one. Their names are those by which the chain reaches them.

    ``images`` are all of them, from base up to top. A volume is found by its name alone, not by
    what it is: once base has the name of top, nothing has its own any more.
    """

    base: str
    top: str
    base_identity: ImageIdentity
    top_identity: ImageIdentity
    direction: DirectionChoice = "auto"
    done: bool = False
    images: list[ImageIdentity] = []

    @property
    def base_place(self) -> Path:
        """Where base is, or was."""
        return _place_of(self.base, self.base_identity)

    @property
    def top_place(self) -> Path:
        """Where top is, or was."""
        return _place_of(self.top, self.top_identity)


def _place_of(name: str, identity: ImageIdentity) -> Path:
    return Path(identity.path if identity.kind == "file" else os.path.realpath(name))


class Thinning(msgspec.Struct, frozen=True):
    """Snapshots of a chain that are being thinned out.

    ``snapshots`` is what was decided on each, at the time ``decided_at`` (seconds since 1970);
    ``ranges`` are in the order in which they are merged.
    """

    leaf: str
    identity: ImageIdentity
    decided_at: int
    snapshots: list[SnapshotFate]
    ranges: list[ThinnedRange]
    request: RecordedRequest

    @property
    def command(self) -> str | None:
        """What does the rest; None if the request has what is not known here."""
        return command_of(self.request)

    @property
    def progress(self) -> str:
        """How far it came, in a sentence."""
        number = 1 + len(self.ranges) - len(self.pending)
        return (
            f"snapshots of {self.leaf} are being thinned out, and merge {number} of "
            f"{len(self.ranges)} is not finished"
        )

    @property
    def pending(self) -> tuple[ThinnedRange, ...]:
        """The merges that are not known to be done."""
        return tuple(one for one in self.ranges if not one.done)

    def is_of_its_leaf(self) -> bool:
        """Whether nothing says that another image has the leaf's name by now.

        The leaf has the file of the base that it was merged into. As a volume takes over the name
        of another one, there is a moment when nothing has it.
        """
        if mapper_name_in(Path(self.leaf)) is not None and not os.path.lexists(self.leaf):
            return True
        uppermost = (one for one in self.ranges if one.top_identity.key == self.identity.key)
        known = (self.identity, *(one.base_identity for one in uppermost))
        return any(what_stands_at(self.leaf, one) is not Sameness.OTHER for one in known)

    def with_done(self, finished: ThinnedRange) -> Thinning:
        """The same, with one more merge that is done."""
        ranges = [
            msgspec.structs.replace(one, done=one.done or one == finished) for one in self.ranges
        ]
        return msgspec.structs.replace(self, ranges=ranges)


def read_thinning(file: Path, devices: BlockDevices) -> Thinning | None:
    """What is in *file*; None if absent or unreadable."""
    try:
        return read_state(file, Thinning, devices, _PLACES, _problems)
    except UnusableState:
        return None


def _problems(thinning: Thinning) -> Iterator[str]:
    if not all(is_path(path) for one in thinning.ranges for path in (one.base, one.top)):
        yield "a name in it is not a path"


THINNING: Final = StateFile("chainmerge-thin", read_thinning, lambda thinning: thinning.identity)


def keep_thinning(leaf: Path, thinning: Thinning) -> None:
    """Write it durably; replaces that of an earlier run.

    Raises chainmerge.errors.Failed where the file system has no room, StateDirectoryUnusable.
    """
    write_state(_file_of(leaf), thinning)


def load_thinning(leaf: Path) -> Thinning | None:
    """What an interrupted run has left for *leaf*; None if that is of another image."""
    thinning = read_thinning(_file_of(leaf), BlockDevices()) or THINNING.load(leaf)
    return thinning if thinning is not None and thinning.is_of_its_leaf() else None


def forget_thinning(leaf: Path) -> None:
    """Remove it, durably, if there is one; one that stays says less than it did."""
    with contextlib.suppress(OSError, ChainmergeError):
        remove_durably(_file_of(leaf))
        THINNING.forget(leaf)


def _file_of(leaf: Path) -> Path:
    real = Path(os.path.realpath(leaf))
    return THINNING.place_of_volume(lasting_path(real)) or THINNING.place(real)
