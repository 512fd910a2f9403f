# SPDX-License-Identifier: Apache-2.0
"""How far an unfinished merge came, and what finishes it, as each of its small files tells."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.documents.plan import EngineName
from chainmerge.documents.status import MergeProcess, UnfinishedMerge
from chainmerge.errors import ChainmergeError
from chainmerge.records import files as state_files
from chainmerge.records.changes import is_there, what_stands_at
from chainmerge.records.disks import DiskEntry
from chainmerge.records.identity import BlockDevices, Sameness
from chainmerge.records.live_journal import LiveJournal, LiveState
from chainmerge.records.merge_journal import (
    MERGE_JOURNAL,
    Journal,
    JournalState,
    MergeJournalDamaged,
    first_sector_of,
)
from chainmerge.records.merged_record import (
    MergedRecord,
    Pulled,
    is_pulled,
    load_merged_record,
    merged_record_file,
)
from chainmerge.records.remains import KINDS, Leftover, is_of_pull, read_leftover
from chainmerge.records.request import command_of, resume_command_of, shell_line
from chainmerge.records.saved_bitmaps import SavedBitmaps, load_saved_bitmaps
from chainmerge.records.thinning import ThinnedRange, Thinning
from chainmerge.records.ways_out import (
    NOT_KNOWN,
    WaysOut,
    of_disk,
    of_journal,
    of_live_journal,
    of_live_pull,
    of_pull,
    of_record,
    of_saved_bitmaps,
    of_thinning,
)
from chainmerge.storage.locks import LockMode, contentions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chainmerge.records.doing import CopiedSoFar, Doer
    from chainmerge.records.identity import ImageIdentity
    from chainmerge.records.request import RecordedRequest

UNKNOWN: Final = "unknown"
_HOLDS: Final = "base holds everything, verified"
_PROGRESS: Final[Mapping[JournalState, str]] = MappingProxyType(
    {
        JournalState.PREPARED: "data was being copied into base, beside what base holds",
        JournalState.SWITCHING: (
            "base holds everything; clusters that only the old base used may still be marked as "
            "used"
        ),
        JournalState.SWITCHED: f"{_HOLDS}; nothing is cleaned up yet",
        JournalState.REPOINT: f"{_HOLDS}; images were being given their new backing file",
        JournalState.RECORD: f"{_HOLDS}; images have their new backing file",
        JournalState.RENAME: f"{_HOLDS}; base was about to be renamed to top",
        JournalState.DELETE: f"{_HOLDS}; merged images were being deleted",
        JournalState.TIDY: f"{_HOLDS}; tombstones that nothing needs were being removed",
        JournalState.GIVE_BACK: f"{_HOLDS}; space was being given back",
    }
)
_COPIED_BY_QEMU: Final = "data was being copied by QEMU into base, which may be half written"

_LIVE_PROGRESS: Final[Mapping[LiveState, str]] = MappingProxyType(
    {
        LiveState.PREPARING: "a running VM was about to copy data",
        LiveState.COPYING: "a running VM was copying data",
        LiveState.SWITCHING: "base holds everything, and a running VM was about to switch to it",
        LiveState.SETTLING: "base holds everything, and a running VM uses it",
        LiveState.UNDOING: "it was undone in a running VM; base's bitmaps were being put back",
    }
)


_LIVE_PULL_PROGRESS: Final[Mapping[LiveState, str]] = MappingProxyType(
    {
        LiveState.PREPARING: "a running VM was about to copy data up into top",
        LiveState.COPYING: "a running VM was copying data up into top",
        LiveState.SWITCHING: (
            "top holds everything, and a running VM was about to give it its new backing file"
        ),
        LiveState.SETTLING: "top holds everything, and has its new backing file in a running VM",
        LiveState.UNDOING: "it was undone in a running VM",
    }
)


class Told(Struct, frozen=True):
    """An unfinished merge, and whether the file that tells of it is of a pull."""

    merge: UnfinishedMerge
    is_of_pull: bool


def merge_told_by(file: Path, devices: BlockDevices) -> Told | None:
    """The unfinished merge that *file* tells of; None if it tells of none."""
    leftover: Leftover | None = None
    try:
        leftover = read_leftover(file, devices)
        merge = _told_of(file, leftover)
    except ChainmergeError as error:
        merge = _unreadable(file, error)
    return None if merge is None else Told(merge, is_of_pull(leftover))


def _told_of(file: Path, leftover: Leftover | None) -> UnfinishedMerge | None:
    match leftover:
        case Journal() as journal:
            return _of_journal(file, journal)
        case LiveJournal() as journal:
            return _of_live_merge(file, journal)
        case MergedRecord() as record:
            return _of_record(file, record)
        case SavedBitmaps() as saved:
            return _of_saved(file, saved)
        case DiskEntry() as entry:
            return _of_disk(file, entry)
        case Thinning() as thinning:
            return _of_thinning(file, thinning)
        case None:
            return None


def rank_of(file: Path) -> int:
    """Which has the say among the small files of a merge: the one of the lowest rank."""
    return next(rank for rank, kind in enumerate(KINDS) if kind.is_called(file.name))


def _told_by(
    file: Path,
    base: str,
    top: str | None,
    progress: str,
    command: str | None,
    *,
    holds: bool | None = None,
    state: str = UNKNOWN,
    ways: WaysOut = NOT_KNOWN,
    by: Doer | None = None,
    copied: CopiedSoFar | None = None,
) -> UnfinishedMerge:
    """What a file tells of a merge; whether base is locked is looked at once for all files."""
    return UnfinishedMerge(
        base=base,
        top=top,
        state=state,
        progress=progress,
        base_holds_data=holds,
        base_is_locked=False,
        command=command,
        files=(str(file),),
        warnings=(),
        vm_may_start=ways.start.may,
        vm_image=ways.start.image,
        vm_reason=ways.start.reason,
        cancel_command=ways.cancel_command,
        cancel_reason=ways.no_cancel,
        bytes_done=None if copied is None else copied.done,
        bytes_total=None if copied is None else copied.total,
        rate=None if copied is None else copied.rate,
        noted_at=_written_at(file),
        process=None if by is None else _process_of(by),
    )


def _process_of(by: Doer) -> MergeProcess:
    return MergeProcess(by.pid, by.host, shell_line(by.command), running=by.is_alive)


def _written_at(file: Path) -> int | None:
    try:
        return int(file.stat().st_mtime)
    except OSError:
        return None


def _of_journal(file: Path, journal: Journal) -> UnfinishedMerge:
    where = where_base_is(journal)
    base, top = _base_name(journal.base, where, journal.request), _top_name(journal)
    copies = journal.engine == EngineName.QEMU
    warnings: tuple[str, ...] = ()
    holds: bool | None = None
    if where is None:
        progress = "another image has base's name now"
        warnings = (f"{file} does not apply to the image that is at {base} now",)
    else:
        # Of a copy by QEMU, only a look at all of it tells.
        holds, progress = (None, _COPIED_BY_QEMU) if copies else how_far(journal, where)
    command = None if where is None else command_of(journal.known_request)
    told = _told_by(
        file,
        base,
        top,
        progress,
        command,
        holds=holds,
        state=journal.state,
        ways=of_journal(journal, _saved_beside(where), where, holds=holds),
        by=_doer_of(journal.request),
        # What is copied is of interest only until base is switched.
        copied=None if holds else journal.copied,
    )
    return replace(told, warnings=warnings)


def _saved_beside(base: Path | None) -> SavedBitmaps | None:
    """What some merge has saved of the bitmaps of *base*; what cannot be read has its own say."""
    if base is not None:
        with contextlib.suppress(ChainmergeError):
            return load_saved_bitmaps(base)
    return None


def _doer_of(request: RecordedRequest | None) -> Doer | None:
    return None if request is None else request.by


def how_far(journal: Journal, base: Path) -> tuple[bool | None, str]:
    """Whether *base*, where it is now, holds everything, None if nobody knows; and a sentence."""
    if not journal.first_sector:
        return False, _PROGRESS[journal.state]
    try:
        sector = first_sector_of(base)
    except ChainmergeError as error:
        return None, f"{_PROGRESS[journal.state]}; base cannot be read: {error.sentence}"
    if sector == journal.first_sector:
        return True, _PROGRESS[journal.state]
    if journal.state is JournalState.SWITCHING and journal.old_sector in ("", sector):
        return False, "everything was written and verified, and base is the old image"
    if journal.state is JournalState.SWITCHING:
        return None, "base was about to be switched, and its header has been changed since"
    return None, "base held everything, and its header has been changed since"


def where_base_is(journal: Journal) -> Path | None:
    """Where base is: under its name, or under that of top already."""
    return _where_is(journal.base, journal.request, *journal.rename[1:])


def _where_is(image: ImageIdentity, request: RecordedRequest | None, *more: str) -> Path | None:
    """Where an image is now: a device can have got another number since."""
    named = () if request is None else request.bases
    for path in (image.path, *more, *named):
        if _may_be_at(path, image):
            return Path(os.path.realpath(path))
    return None


def _base_name(base: ImageIdentity, where: Path | None, request: RecordedRequest | None) -> str:
    """What base is called: a file as it was when the merge began, whatever its name is by now."""
    if base.kind == "file":
        return base.path
    if where is not None:
        return str(where)
    return base.path if request is None else _name_of(base, request.bases)


def _top_name(journal: Journal | LiveJournal) -> str:
    return _name_of(journal.top, () if journal.request is None else journal.request.tops)


def _name_of(image: ImageIdentity, named: Sequence[str]) -> str:
    """Its path; of a device that is not up the first of *named*: its number may be another's."""
    if image.kind == "file" or not named or _may_be_at(image.path, image):
        return image.path
    return named[0]


def _may_be_at(path: str, identity: ImageIdentity) -> bool:
    try:
        return what_stands_at(path, identity) is not Sameness.OTHER
    except OSError:
        return False


def _of_live_merge(file: Path, journal: LiveJournal) -> UnfinishedMerge:
    where = _where_is(journal.base, journal.request)
    base, top = _base_name(journal.base, where, journal.request), _top_name(journal)
    if journal.pulls:
        # It writes to top, and base may be gone already.
        there, written = _may_be_at(top, journal.top), top
        ways, progress = of_live_pull(journal, there=there), _LIVE_PULL_PROGRESS[journal.state]
    else:
        there, written = where is not None, base
        ways, progress = of_live_journal(journal, where), _LIVE_PROGRESS[journal.state]
    resume = resume_command_of(journal.known_request)
    cold = command_of(journal.known_request) if there else None
    command, warning = _cold_or_live(cold, resume, in_use=there and is_locked(Path(written)))
    told = _told_by(
        file,
        base,
        top,
        progress,
        command,
        holds=journal.took_effect and not journal.pulls if there else None,
        state=journal.state,
        ways=ways,
        by=_doer_of(journal.request),
    )
    return replace(told, warnings=(warning,))


def _cold_or_live(cold: str | None, live: str, *, in_use: bool) -> tuple[str | None, str]:
    """Which command finishes a merge in a VM, and when the other one does, in a sentence."""
    if in_use:
        return live, f"if the VM does not run, finish with `{cold}`"
    return cold, f"if the VM still runs, continue with `{live}`"


def _of_saved(file: Path, saved: SavedBitmaps) -> UnfinishedMerge:
    request = saved.request
    if request is not None and saved.is_of_pull:
        words = "data was being copied up into top by a VM; top's bitmaps are saved"
        return _told_by(
            file,
            request.bases[0],
            saved.base.path,
            words,
            command_of(request),
            by=_doer_of(request),
        )
    copying = f"data was being copied below {saved.overlay.path}; base's bitmaps are saved"
    if request is None:
        copying += ": the interrupted command finishes the merge"
    base = _base_name(saved.base, _where_is(saved.base, request), request)
    top = None if request is None else os.path.realpath(request.tops[0])
    command = None if request is None else command_of(request)
    ways, by = of_saved_bitmaps(saved), _doer_of(request)
    return _told_by(file, base, top, copying, command, ways=ways, by=by)


def _of_record(file: Path, record: MergedRecord) -> UnfinishedMerge | None:
    left = [one.path for one in record.delete if is_there(one.identity)]
    unnamed = record.keep_name and _may_be_at(record.base, record.result_identity)
    # Something that a pull has taken of top may be leaked.
    taken = record.pulled is not None and record.pulled.leaked_before is not None
    taken = taken and is_there(record.result_identity)
    if not (left or unnamed or taken):
        # The record of a merge that came to its end stays: the same command finds it.
        return None
    copied: CopiedSoFar | None = None
    if record.pulled is not None:
        holds, progress = False, _how_far_pulled(record, record.pulled)
        ways, copied = of_pull(record, record.pulled), record.pulled.copied
    else:
        words = "base has yet to be renamed to top" if unnamed else "merged images are left"
        holds = _may_be_at(record.result, record.result_identity) or unnamed
        progress = f"{_HOLDS}; {words}"
        ways = of_record(record, left, holds=holds, unnamed=unnamed)
    source, request = None if record.pulled is None else record.pulled.base, record.known_request
    base = record.base if source is None else _name_of(source, request.bases)
    by, command = _doer_of(record.request), command_of(request)
    return _told_by(
        file, base, record.top, progress, command, holds=holds, ways=ways, by=by, copied=copied
    )


def _how_far_pulled(record: MergedRecord, pulled: Pulled) -> str:
    try:
        switched = is_pulled(record, pulled, Path(record.known_request.tops[0]))
    except ChainmergeError as error:
        return f"data was being pulled into top, which cannot be read: {error.sentence}"
    if switched:
        if pulled.leaked_before is not None:
            return (
                "top holds everything, verified; clusters that only the old top used are still "
                "marked as used"
            )
        return "top holds everything, verified; merged images are left"
    return "data was being pulled into top, beside what top holds"


def _of_disk(file: Path, entry: DiskEntry) -> UnfinishedMerge | None:
    """One of several disks; what its own files say of it counts for more."""
    if entry.done:
        return None
    progress = f"it is one of {len(entry.disks)} disks merged together, and is not finished"
    ways, by = of_disk(entry), _doer_of(entry.request)
    command, in_vm = entry.finishing_command, entry.live_command
    warnings: tuple[str, ...] = ()
    if in_vm is not None:
        in_use = is_locked(Path(entry.written))
        command, warning = _cold_or_live(command, in_vm, in_use=in_use)
        warnings = (warning,)
    told = _told_by(file, entry.base, entry.top, progress, command, ways=ways, by=by)
    return replace(told, disks=tuple(entry.disks), warnings=warnings)


def _of_thinning(file: Path, thinning: Thinning) -> UnfinishedMerge | None:
    """The merge that is next where snapshots are thinned out; its own files say more of it."""
    if not thinning.pending or not thinning.is_of_its_leaf():
        return None
    merged = [one for one in thinning.pending if _has_come_to_its_end(one)]
    is_done = len(merged) == len(thinning.pending)
    for one in merged[: -1 if is_done else None]:
        # A kill can come before that is noted.
        thinning = thinning.with_done(one)
    current = thinning.pending[0]
    base = current.base_identity
    told = _told_by(
        file,
        _base_name(base, _where_is(base, None, current.base, current.top), None),
        _name_of(current.top_identity, (current.top,)),
        thinning.progress,
        thinning.command,
        ways=of_thinning(thinning, is_done=is_done),
        by=_doer_of(thinning.request),
    )
    return replace(told, leaf=thinning.leaf)


def _has_come_to_its_end(one: ThinnedRange) -> bool:
    """Whether a merge is done, with nothing of it left to do."""
    top, base = one.top_place, one.base_place
    record = load_merged_record(top)
    if record is None or os.path.lexists(base) or not record.names_base(base):
        return False
    # That of a file is kept by its old name, that of a volume goes with it to the new one.
    if MERGE_JOURNAL.place(base if one.base_identity.kind == "file" else top).exists():
        return False
    return _of_record(merged_record_file(top), record) is None


def _unreadable(file: Path, error: ChainmergeError) -> UnfinishedMerge:
    """A file of which not even the image can be told, but by its own name."""
    name = file.name.removesuffix(f".{KINDS[rank_of(file)].suffix}")
    beside = file.with_name(name.removeprefix("."))
    is_image = file.parent != state_files.STATE_DIRECTORY
    only_slower = isinstance(error, MergeJournalDamaged)
    progress = (
        "not recorded: the interrupted command finishes the merge"
        if only_slower
        else "what it saved cannot be read"
    )
    base = str(beside) if is_image else name
    return replace(_told_by(file, base, None, progress, None), warnings=(error.sentence,))


def is_locked(image: Path) -> bool:
    """Whether another process has an image open."""
    if not image.exists():
        return False
    return any(True for _ in contentions([(image, LockMode.WRITER)]))
