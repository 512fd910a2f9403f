# SPDX-License-Identifier: Apache-2.0
"""What earlier runs have left: a file of any kind, and all of a base and a top, read once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from msgspec import Struct

from chainmerge.options import Direction
from chainmerge.records.changes import data_changed
from chainmerge.records.disks import DISK_ENTRY, DiskEntry
from chainmerge.records.identity import BlockDevices, identify, may_be_same, same_image
from chainmerge.records.live_journal import LIVE_JOURNAL, LiveJournal, load_live_journal
from chainmerge.records.merge_journal import (
    MERGE_JOURNAL,
    Journal,
    JournalState,
    MergeJournalDamaged,
    is_without_effect,
    load_journal,
)
from chainmerge.records.merged_record import MERGED_RECORD, MergedRecord, load_merged_record
from chainmerge.records.saved_bitmaps import (
    SAVED_BITMAPS,
    SavedBitmaps,
    SavedBitmapsDamaged,
    load_saved_bitmaps,
)
from chainmerge.records.thinning import THINNING, Thinning

if TYPE_CHECKING:
    from pathlib import Path

    from chainmerge.records.files import StateFile

Leftover: TypeAlias = Journal | LiveJournal | MergedRecord | SavedBitmaps | DiskEntry | Thinning
KINDS: Final[tuple[StateFile[Any], ...]] = (
    MERGE_JOURNAL,
    LIVE_JOURNAL,
    MERGED_RECORD,
    SAVED_BITMAPS,
    DISK_ENTRY,
    THINNING,
)
"""All kinds of state files. Journals come first: they say the most."""


def kind_of(name: str) -> StateFile[Any] | None:
    """Which kind of state file is called so; None for another file."""
    return next((kind for kind in KINDS if kind.is_called(name)), None)


def read_leftover(file: Path, devices: BlockDevices) -> Leftover | None:
    """What is in a state file; None if there is none, or it says nothing.

    Raises MergeJournalDamaged, LiveJournalDamaged, SavedBitmapsDamaged, and what opening a file
    raises.
    """
    kind = kind_of(file.name)
    found: Leftover | None = None if kind is None else kind.read(file, devices)
    return found


def is_of_pull(leftover: Leftover | None) -> bool:
    """Whether it is of a pull, and so stands beside top: base may have several."""
    match leftover:
        case LiveJournal() as journal:
            return journal.pulls
        case MergedRecord() as record:
            return record.pulled is not None
        case SavedBitmaps() as saved:
            return saved.is_of_pull
        case DiskEntry() as entry:
            return entry.pulls
    return False


class Remains(Struct, frozen=True):
    """What stands beside a base and a top, whichever merges it is of.

    Attributes:
        record: That a merge of top came to its end, or is about to.
        journal: How far a native merge into base came.
        journal_problem: Why its journal cannot be read, where it cannot: looking at the images
            tells the same.
        live: How far a live commit into base came, if that may be the image there is now.
        live_pull: How far a live pull into top came, likewise.
        saved: Base's checkpoints, as they were before an interrupted merge.
        saved_problem: Why these cannot be read, where they cannot.
    """

    record: MergedRecord | None = None
    journal: Journal | None = None
    journal_problem: MergeJournalDamaged | None = None
    live: LiveJournal | None = None
    live_pull: LiveJournal | None = None
    saved: SavedBitmaps | None = None
    saved_problem: SavedBitmapsDamaged | None = None

    @property
    def usable_saved(self) -> SavedBitmaps | None:
        """Base's checkpoints.

        Raises SavedBitmapsDamaged.
        """
        if self.saved_problem is not None:
            raise self.saved_problem
        return self.saved

    @property
    def pivoted(self) -> LiveJournal | None:
        """The live merge after which the guest may have written to base; None without one."""
        if self.live is None or not (self.live.took_effect and self.live.is_active):
            return None
        return self.live


def may_be_written_over(remains: Remains, first_sector: str) -> bool:
    """Whether base may not be what it was before an earlier merge, of which *remains* tell.

    *first_sector* is the digest of what base begins with.
    """
    if remains.live is not None or remains.journal_problem is not None:
        return True
    journal = remains.journal
    if journal is None:
        return remains.saved is not None or remains.saved_problem is not None
    was_switched = journal.state.rank > JournalState.SWITCHING.rank
    was_switched |= journal.first_sector == first_sector
    return not is_without_effect(journal, remains.saved, holds=was_switched)


def read_remains(base: Path, top: Path) -> Remains:
    """Read all of it. The images are locked by the caller, so that nobody adds to it.

    Raises LiveJournalDamaged, and what opening a file raises.
    """
    journal, journal_problem = None, None
    try:
        journal = load_journal(base)
    except MergeJournalDamaged as error:
        journal_problem = error
    saved, saved_problem = None, None
    try:
        saved = load_saved_bitmaps(base)
    except SavedBitmapsDamaged as error:
        saved_problem = error
    return Remains(
        record=load_merged_record(top),
        journal=journal,
        journal_problem=journal_problem,
        live=_live_journal(base, Direction.COMMIT),
        live_pull=_live_journal(top, Direction.PULL),
        saved=saved,
        saved_problem=saved_problem,
    )


def _live_journal(image: Path, direction: Direction) -> LiveJournal | None:
    """The journal of a live merge that writes to *image*, if it goes that way."""
    journal = load_live_journal(image)
    if journal is None or journal.direction is not direction:
        return None
    return journal if may_be_same(journal.result, identify(image)) else None


def is_left_over(record: MergedRecord | None, base: Path, top: Path) -> bool:
    """Whether all of *top* was merged into *base*, and nobody has written to *top* since.

    Only *base* can have become another one then. No where nothing tells, as of block devices.
    """
    if record is None:
        return False
    if record.left is not None:
        then, since = record.left.identity, record.left.since
    elif record.superseded is not None:
        then, since = record.superseded.images[0].identity, record.superseded.since
    else:
        return False
    if not since or since != data_changed(top):
        return False
    return same_image(identify(top), then) and same_image(identify(base), record.result_identity)


def is_anything_left(base: Path, top: Path) -> bool:
    """Whether an earlier run has left a file that says that it was not finished."""
    of_base = (MERGE_JOURNAL, LIVE_JOURNAL, SAVED_BITMAPS)
    of_top = (MERGED_RECORD, LIVE_JOURNAL)
    files = (*(kind.found(base) for kind in of_base), *(kind.found(top) for kind in of_top))
    return any(file.exists() for file in files)
