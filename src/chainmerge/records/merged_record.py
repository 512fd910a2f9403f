# SPDX-License-Identifier: Apache-2.0
"""Which merges came to their end: ``.TOP.chainmerge-merged``.

Written before top's file is deleted or replaced, so that the same command, run again, says that
the merge is done instead of reporting a missing file, or worse, taking the renamed base for a
new overlay. In a pull it is written before the switch after which top stands on base's backing
file: the same command would pull that next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from chainmerge.records.files import UnusableState, beside, read_state, remove_durably, write_state
from chainmerge.records.identity import ImageIdentity

if TYPE_CHECKING:
    from pathlib import Path


class DoomedImage(msgspec.Struct, frozen=True):
    """An image that is to be deleted, if it is still the same."""

    path: str
    identity: ImageIdentity


class Pulled(msgspec.Struct, frozen=True):
    """That the merge is a pull, and the backing file that top has once it is done.

    The name is as top's header has it, None for none. Nothing else tells as well: a guest that
    goes on writing to top between a kill and the rerun makes QEMU change the rest of the header.

    ``leaked_before`` are the clusters of top that were leaked already when it began (ranges:
    first cluster, number of clusters): what else is leaked since is its own. None once nothing
    of its own is leaked any more, and in a record of a version that did not record that.
    """

    backing: str | None
    leaked_before: list[tuple[int, int]] | None = None


class Superseded(msgspec.Struct, frozen=True):
    """Images that a live merge has left in place, and that nothing may be merged from any more.

    The guest writes to base, or to an image on base. ``since`` is what the times of change of
    top said when the VM had closed it, empty where they say nothing.
    """

    images: list[DoomedImage]
    since: str


class MergedRecord(msgspec.Struct, frozen=True):
    """A merge whose top is about to be deleted or replaced, or of no use any more."""

    top: str
    base: str
    result: str
    result_format: str
    result_identity: ImageIdentity
    keep_name: bool
    delete: list[DoomedImage]
    pulled: Pulled | None = None
    superseded: Superseded | None = None


def merged_record_file(top: Path) -> Path:
    """Where the record of a merge of *top* stands."""
    return beside(top, "chainmerge-merged")


def record_merged(top: Path, record: MergedRecord) -> None:
    """Record, durably, that *top* has been merged, before its file goes."""
    write_state(merged_record_file(top), record)


def load_merged_record(top: Path) -> MergedRecord | None:
    """The record of a finished merge of *top*; None where there is none that can be read."""
    try:
        return read_merged_record(merged_record_file(top))
    except OSError:
        # A name that no file can have.
        return None


def read_merged_record(file: Path) -> MergedRecord | None:
    """The record in *file*; None where there is none that can be read."""
    try:
        return read_state(file, MergedRecord)
    except (OSError, UnusableState):
        return None


def forget_merged_record(top: Path) -> None:
    """Remove the record of a merge of *top*."""
    remove_durably(merged_record_file(top))
