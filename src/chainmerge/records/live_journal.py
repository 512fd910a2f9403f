# SPDX-License-Identifier: Apache-2.0
"""How far a live merge got, in a file that outlives the process that drives it.

``.BASE.chainmerge-live`` stands beside base (see :mod:`chainmerge.records.files`) from before the
first change until base is settled; that of a pull, ``.TOP.chainmerge-live``, beside top. Whoever
finds it looks at the VM, and at the disk where the VM is dead: the journal says what was
intended, not what has happened. One thing only it can say. In an active commit the guest writes
to top until the pivot and to base after it, and an image does not tell which came first. So the
job is held with both equal and the guest waiting, :attr:`LiveState.SWITCHING` is written, and
then the pivot is let go: from that entry on base is right, whether or not the pivot came.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec

from chainmerge.errors import RecordsUnusable, Refused
from chainmerge.options import Direction
from chainmerge.records.files import StateFile, UnusableState, read_state, write_state
from chainmerge.records.identity import BlockDevices, ImageIdentity
from chainmerge.records.request import RecordedRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION: Final = 1


class LiveJournalDamaged(RecordsUnusable, Refused):
    """The journal of a live merge cannot be read."""

    code: ClassVar[str] = "live-journal-damaged"
    template: ClassVar[str] = "{file}: the journal of a live merge cannot be used: {why}"
    hint: ClassVar[str] = (
        "keep {file}, and do not merge anything into this base, or any image on top of it, until "
        "you know which image the guest wrote to last; as long as the VM runs, `query-block` on "
        "its monitor (for libvirt: `virsh domblklist`) shows it"
    )
    explanation: ClassVar[str] = (
        "While images are merged in a running VM, a small file beside base says what is intended. "
        "Without it nobody can tell whether the guest has already written to base, so nothing is "
        "done. If the VM runs and the chain of its disk still contains top, the merge has not "
        "taken effect, and can be started again once the job, if there is one, is cancelled and "
        "the file is moved away. If that chain contains base but no longer top, then top has been "
        "merged: it has older data, and must never be merged again. If the VM does not run, and "
        "nobody knows, copy all images before anything else."
    )
    file: str
    why: str


class LiveState(StrEnum):
    """How far a live merge got; in the order in which it happens."""

    PREPARING = "preparing"
    """Base's bitmaps may be as they were, or as they are to be while data is copied."""
    COPYING = "copying"
    """They are as they are to be while data is copied."""
    SWITCHING = "switching"
    """Base holds everything; what is right is in base from here on."""
    SETTLING = "settling"
    """It has taken effect in the VM."""
    UNDOING = "undoing"
    """It was given up; base's bitmaps are being put back into their places."""


class KeptName(msgspec.Struct, frozen=True):
    """A checkpoint that survives.

    ``in_base`` says whether base had it before, ``sources`` which overlays have it (indexes,
    lowest first).
    """

    name: str
    granularity: int
    in_base: bool
    sources: list[int]


class TombstoneName(msgspec.Struct, frozen=True):
    """A tombstone that base is to have; ``in_base`` says whether base had the name before."""

    name: str
    granularity: int
    in_base: bool


class SavedLimits(msgspec.Struct, frozen=True):
    """How the guest's disk was limited before we limited it."""

    limits: dict[str, int]
    group: str | None


class LiveJournal(msgspec.Struct, frozen=True):
    """A live merge and how far it came.

    ``address`` are the options of ``chainmerge live`` that lead to the disk. ``overlays`` are the
    merged images, lowest first; ``above`` is the one that stands on top, None in an active merge.
    ``stale`` are the names that go from base. ``limits`` are set while the guest is slowed down.

    In a pull the image that is written, and whose bitmaps these are, is top, the uppermost of
    ``overlays``. It stays; base and the other overlays are what it does without afterwards.
    ``onto`` is what it stands on then, and its header calls that ``backing_name``; None for
    nothing.
    """

    version: int
    address: list[str]
    job: str
    base: ImageIdentity
    overlays: list[ImageIdentity]
    above: ImageIdentity | None
    backing_name: str | None
    kept: list[KeptName]
    stale: list[str]
    tombstones: list[TombstoneName]
    delete: bool
    full_verify: bool
    state: LiveState = LiveState.PREPARING
    limits: SavedLimits | None = None
    top_since: str = ""
    """What top's times of change were when the merge was about to take effect; empty if they
    say nothing."""
    guest_to_resume: bool = False
    """Whether the guest was suspended for the merge to take effect, and has to run again."""
    leaked_before: list[tuple[int, int]] | None = None
    """The clusters of base that were leaked already when it began, as ranges (first cluster,
    number of clusters); None in a journal of a version that did not record that."""
    request: RecordedRequest | None = None
    """What was asked for, where that is recorded."""
    direction: Direction = Direction.COMMIT
    onto: ImageIdentity | None = None
    checkpoints: dict[str, str] = {}
    """Checkpoints of other disks that libvirt is to know again, by their names, as it described
    them: while it removes one of their bitmaps from this disk, it has them as this disk's alone."""
    base_format: str = ""
    """As what base is read, of a pull: afterwards neither the VM nor a header tells."""

    @property
    def known_request(self) -> RecordedRequest:
        """What was requested, as far as it is recorded."""
        if self.request is not None:
            return self.request
        options: dict[str, Any] = {"delete": True} if self.delete else {}
        if self.pulls:
            options["direction"] = str(self.direction)
        return RecordedRequest(
            [self.top.path], [self.base.path], {}, dict(options), list(self.address)
        )

    @property
    def is_active(self) -> bool:
        """Whether top is what the guest writes to."""
        return self.above is None

    @property
    def top(self) -> ImageIdentity:
        """The uppermost image that is merged."""
        return self.overlays[-1]

    @property
    def pulls(self) -> bool:
        """Whether data goes up into top."""
        return self.direction is Direction.PULL

    @property
    def result(self) -> ImageIdentity:
        """The image that is written: base, or top in a pull."""
        return self.top if self.pulls else self.base

    @property
    def merged(self) -> list[ImageIdentity]:
        """The images that the chain does without afterwards, lowest first."""
        return [self.base, *self.overlays[:-1]] if self.pulls else self.overlays

    @property
    def written(self) -> list[ImageIdentity]:
        """Whose data, bitmaps or header the merge may change."""
        if self.pulls:
            return [self.top]
        return [self.base, *self.overlays, *(() if self.above is None else (self.above,))]

    @property
    def took_effect(self) -> bool:
        """Whether the result is the image that is right, come what may."""
        return self.state in (LiveState.SWITCHING, LiveState.SETTLING)


def save_live_journal(journal: LiveJournal) -> None:
    """Write the journal durably.

    Raises chainmerge.errors.Failed where the file system has no room, StateDirectoryUnusable.
    """
    write_state(LIVE_JOURNAL.place(Path(journal.result.path)), journal)


def enter(journal: LiveJournal, state: LiveState) -> LiveJournal:
    """Record, durably, that what *state* names begins; returns the journal as it is now."""
    if journal.state is state:
        return journal
    entered = msgspec.structs.replace(journal, state=state)
    save_live_journal(entered)
    return entered


def read_live_journal(file: Path, devices: BlockDevices) -> LiveJournal | None:
    """The journal in *file*; None if there is no such file.

    Raises LiveJournalDamaged.
    """
    try:
        return read_state(file, LiveJournal, devices, problems=_problems)
    except UnusableState as error:
        raise LiveJournalDamaged(str(file), str(error)) from error


def _problems(journal: LiveJournal) -> Iterator[str]:
    if journal.version != VERSION:
        yield f"its version {journal.version} is not known"
    if not journal.overlays:
        yield "it names no overlay"
    last = len(journal.overlays)
    if any(not 0 <= index < last for kept in journal.kept for index in kept.sources):
        yield "it names an overlay that is not in its list"


LIVE_JOURNAL: Final = StateFile(
    "chainmerge-live", read_live_journal, lambda journal: journal.result
)
# Each takes the path of the image that is written.
live_journal_file = LIVE_JOURNAL.found
load_live_journal = LIVE_JOURNAL.load
forget_live_journal = LIVE_JOURNAL.forget
