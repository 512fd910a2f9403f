# SPDX-License-Identifier: Apache-2.0
"""The journal of a native merge: how far it got, so that a rerun need not find out.

``.BASE.chainmerge-journal`` stands where :mod:`chainmerge.records.files` says, and holds a
:class:`Journal`. Its state only ever moves down this list, and may leave out any but the first:

===========  ===================================================================
prepared     before anything is written
switching    durable right before the switch of base: the only state in which base
             may be the old image or the new one. ``first_sector`` tells which
switched     base is the new image, verified, and has no leaks
repoint      children, and top where it stays above a range, are given base as their
             backing file
record       what is to be renamed and deleted is recorded
rename       base is given the name of top
delete       the merged images are deleted
tidy         tombstones that only top needed are taken out of base
give-back    the volume is reduced, or what is free on it discarded
===========  ===================================================================

Each state is recorded before what it names begins. Then the file is removed. It is also
removed where a merge ends before the switch.

A journal is believed only as far as it can be checked. Base is the new image if it is the
same file or device and the SHA-256 digest of its first 512 bytes is the recorded one. Base
holds all of the overlays' *data* if these are the same files and were not written to since.
Guests may well have written to top between a kill and the rerun, into clusters that it had, so
each overlay's size and times of change are recorded with it. Nothing is compared with the time
of day. Times of change say nothing of a block device, and after a power cut they may be older
than the last write that was synced, so a journal counts for files and until the next boot.
It is not needed either: where it cannot be written, a merge goes on without.
What cannot be believed costs a look at the disk: a rerun then compares content, as it does
without any journal.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from chainmerge.errors import ChainmergeError, RecordsUnusable, Refused
from chainmerge.options import Placement
from chainmerge.qcow2.header import SECTOR
from chainmerge.records.changes import last_change
from chainmerge.records.doing import CopiedSoFar
from chainmerge.records.files import StateFile, UnusableState, read_state, write_state
from chainmerge.records.identity import BlockDevices, ImageIdentity, identify
from chainmerge.records.request import RecordedRequest
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.records.saved_bitmaps import SavedBitmaps

JOURNAL_VERSION: Final = 1
_PLACES: Final = frozenset({"child", "delete", "rename"})


class MergeJournalDamaged(RecordsUnusable, Refused):
    """The journal of an interrupted merge cannot be read."""

    code: ClassVar[str] = "merge-journal-damaged"
    template: ClassVar[str] = "{file}: the journal of an interrupted merge cannot be used: {why}"
    hint: ClassVar[str] = "remove {file}, and run the same merge again"
    explanation: ClassVar[str] = (
        "While a merge goes on, a small file beside base says how far it got. A rerun that finds "
        "it need not compare base with the overlays again. The journal is not needed for anything "
        "else: without it the rerun looks at the images, which takes longer."
    )
    file: str
    why: str


class JournalState(StrEnum):
    """How far a merge got; in the order in which it happens."""

    PREPARED = "prepared"
    SWITCHING = "switching"
    SWITCHED = "switched"
    REPOINT = "repoint"
    RECORD = "record"
    RENAME = "rename"
    DELETE = "delete"
    TIDY = "tidy"
    GIVE_BACK = "give-back"

    @property
    def rank(self) -> int:
        """Its place in the order."""
        return tuple(JournalState).index(self)


class JournalledImage(msgspec.Struct, frozen=True):
    """An image that is merged, and what shows whether it was written to since.

    ``unchanged_since`` is empty if nothing can show that.
    """

    identity: ImageIdentity
    unchanged_since: str


class JournalledRepoint(msgspec.Struct, frozen=True):
    """An image that gets another backing file."""

    child: str
    new_backing: str
    new_format: str


class Asked(msgspec.Struct, frozen=True):
    """What is to be done once base holds everything."""

    delete: bool
    keep_name: bool
    shrink: bool
    discard: bool


class Journal(msgspec.Struct, frozen=True):
    """A merge and how far it came.

    ``overlays`` are the merged images, lowest first; ``children`` those that stand on top.
    ``spent`` are the names of tombstones that only top needs. ``first_sector`` is the SHA-256
    digest, in hexadecimal digits, of the first 512 bytes of the new base; empty before they are
    known. ``old_sector`` is that of base before the switch, empty if it is not recorded.
    ``boot`` tells one run of the machine from another. ``placement`` says where data goes that
    base has a cluster for (:class:`chainmerge.options.Placement`), and is empty if that is not
    recorded. ``request`` is what was asked for, where that is recorded. ``volume_size`` is what the
    volume of a raw base had before the merge, in bytes, and 0 of another base: what it holds behind
    that is nobody's. ``shrink_to`` is what its volume is to be reduced to in the end, and 0 where
    it is not. ``leaked_before`` are the clusters of base that were leaked already when it began
    (ranges: first cluster, number of clusters): what else is leaked since is its own. None in a
    journal of a version that did not record that. ``copied`` says now and then how far the copy has
    come, and is None before that. ``written_over`` says that base may not be what it was
    before an earlier merge, which was not finished.
    """

    version: int
    engine: str
    base: ImageIdentity
    overlays: list[JournalledImage]
    children: list[ImageIdentity]
    asked: Asked
    repoint: list[JournalledRepoint]
    delete: list[str]
    rename: list[str]
    spent: list[str]
    boot: str
    state: JournalState = JournalState.PREPARED
    first_sector: str = ""
    placement: str = ""
    leaked_before: list[tuple[int, int]] | None = None
    volume_size: int = 0
    shrink_to: int = 0
    old_sector: str = ""
    request: RecordedRequest | None = None
    copied: CopiedSoFar | None = None
    written_over: bool = False

    @property
    def known_request(self) -> RecordedRequest:
        """What was requested, as far as it is recorded."""
        if self.request is not None:
            return self.request
        options = {
            name: True for name, value in msgspec.structs.asdict(self.asked).items() if value
        }
        return RecordedRequest([self.top.path], [self.base.path], {}, options)

    @property
    def top(self) -> ImageIdentity:
        """The uppermost image that is merged."""
        return self.overlays[-1].identity


def is_without_effect(journal: Journal, saved: SavedBitmaps | None, *, holds: bool | None) -> bool:
    """Whether base is, for certain, what it was before the merge; some clusters may be leaked.

    *saved* are the bitmaps of base that some merge has saved. If it was another one, with other
    options, it may have been QEMU's engine, which writes over base and takes bitmaps out of it.
    """
    if saved is not None and not _is_the_same(saved.request, journal.request):
        return False
    return holds is False and journal.placement == Placement.COW and not journal.written_over


def _is_the_same(one: RecordedRequest | None, other: RecordedRequest | None) -> bool:
    """Whether the same was requested, by whichever process."""
    if one is None or other is None:
        return False
    by_nobody = msgspec.structs.replace(one, by=None)
    return by_nobody == msgspec.structs.replace(other, by=None)


def save_journal(journal: Journal) -> None:
    """Write the journal durably; replaces the one of an earlier run.

    Raises chainmerge.errors.Failed where the file system has no room, StateDirectoryUnusable.
    """
    write_state(MERGE_JOURNAL.place(Path(journal.base.path)), journal)


def keep_journal(journal: Journal) -> Journal | None:
    """Write the journal durably; None if there is no place for it.

    It then stays what it was, which says less and nothing wrong: a merge does not need it.
    """
    try:
        save_journal(journal)
    except ChainmergeError:
        return None
    return journal


def read_journal(file: Path, devices: BlockDevices) -> Journal | None:
    """The journal in *file*; None if there is no such file.

    Raises MergeJournalDamaged.
    """
    try:
        return read_state(file, Journal, devices, _PLACES, _problems)
    except UnusableState as error:
        raise MergeJournalDamaged(str(file), str(error)) from error


def _problems(journal: Journal) -> Iterator[str]:
    if journal.version != JOURNAL_VERSION:
        yield f"its version {journal.version} is not known"
    if not journal.overlays:
        yield "it names no overlay"
    if len(journal.rename) not in (0, 2):
        yield "its rename is incomplete"


MERGE_JOURNAL: Final = StateFile("chainmerge-journal", read_journal, lambda journal: journal.base)
# Each takes the path of base.
journal_file = MERGE_JOURNAL.found
load_journal = MERGE_JOURNAL.load
forget_journal = MERGE_JOURNAL.forget


def enter_state(journal: Journal | None, state: JournalState) -> Journal | None:
    """Record, durably, that what *state* names begins; returns the journal as it is now.

    A rerun does what was done before once more; that is not recorded again. Nothing happens
    without a journal.
    """
    if journal is None or state.rank <= journal.state.rank:
        return journal
    entered = msgspec.structs.replace(
        journal, state=state, overlays=[_looked_at_again(one) for one in journal.overlays]
    )
    return keep_journal(entered)


def _looked_at_again(image: JournalledImage) -> JournalledImage:
    """The same, after a change of our own: top may have been re-pointed."""
    path = Path(image.identity.path)
    return JournalledImage(image.identity, last_change(path)) if path.exists() else image


def digest_of(sector: bytes) -> str:
    """What ``first_sector`` is of a base that begins with *sector*."""
    return hashlib.sha256(sector).hexdigest()


def first_sector_of(base: Path) -> str:
    """What ``first_sector`` is of *base* as it is on disk.

    Raises what opening and reading a file raises.
    """
    with FileReadable(base) as readable:
        return digest_of(readable.read(0, SECTOR))


def journalled(image: Path) -> JournalledImage:
    """An overlay as the journal names it.

    Raises OSError if there is nothing.
    """
    return JournalledImage(identify(image), last_change(image))
