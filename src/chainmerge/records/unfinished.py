# SPDX-License-Identifier: Apache-2.0
"""Finds unfinished merges by the small files that they leave. Reads only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.counting import counted
from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import SearchPathUnusable
from chainmerge.chain.model import ChainPolicy
from chainmerge.documents.plan import EngineName
from chainmerge.documents.status import MergeProcess, StatusReport, UnfinishedMerge
from chainmerge.documents.versions import STATUS_VERSION
from chainmerge.errors import ChainmergeError
from chainmerge.records import files as state_files
from chainmerge.records.changes import is_there, what_stands_at
from chainmerge.records.disks import DiskEntry
from chainmerge.records.identity import BlockDevices, Sameness
from chainmerge.records.live_journal import LiveJournal, LiveState
from chainmerge.records.merge_journal import (
    Journal,
    JournalState,
    MergeJournalDamaged,
    first_sector_of,
)
from chainmerge.records.merged_record import (
    MERGED_RECORD,
    MergedRecord,
    Pulled,
    is_pulled,
    merged_record_file,
)
from chainmerge.records.remains import KINDS, kind_of, read_leftover
from chainmerge.records.request import command_of, resume_command_of, shell_line
from chainmerge.records.saved_bitmaps import SavedBitmaps, load_saved_bitmaps
from chainmerge.records.thinning import Thinning
from chainmerge.records.ways_out import (
    NOT_KNOWN,
    WaysOut,
    of_disk,
    of_journal,
    of_live_journal,
    of_pull,
    of_record,
    of_saved_bitmaps,
    of_thinning,
)
from chainmerge.storage.errors import ImageMissing, reason_of
from chainmerge.storage.locks import LockMode, contentions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chainmerge.records.doing import CopiedSoFar, Doer
    from chainmerge.records.identity import ImageIdentity
    from chainmerge.records.request import RecordedRequest

UNKNOWN: Final = "unknown"
# A tree of images has a few; a search of "/" has to end.
_MOST_DIRECTORIES: Final = 50_000
_MOST_SENTENCES: Final = 20
# What stands for no storage.
_OF_THE_KERNEL: Final = frozenset({"/proc", "/sys", "/dev"})
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


def status(paths: Sequence[str | Path] = ()) -> StatusReport:
    """Find interrupted merges, and those in progress.

    Args:
        paths: directories to look at, with everything below, and images: of an image, what is
            found of merges in which it takes part. By default the current directory, and
            everything that merges into block devices have left; with paths, what of the latter
            has its top there.

    Raises:
        ImageMissing: there is no such image or directory, and no merge is known of it.
        SearchPathUnusable: a directory cannot be read.
    """
    searches = [_search(Path(path)) for path in (paths or (".",))]
    searches.append(_search_of_devices(searches) if paths else _search_of_all_devices())
    found: dict[str, UnfinishedMerge] = {}
    devices = BlockDevices()
    for search in searches:
        wanted = [merge for merge in _found_in(search, devices) if search.wants(merge)]
        if search.missing is not None and not wanted:
            raise ImageMissing(search.missing)
        for merge in wanted:
            found.setdefault(f"{merge.base}\0{merge.top}", merge)
    searched = dict.fromkeys(str(one) for search in searches for one in search.named)
    return StatusReport(
        version=STATUS_VERSION,
        searched=tuple(searched),
        merges=tuple(sorted(found.values(), key=lambda merge: (merge.base, merge.top or ""))),
        not_searched=tuple(sentence for search in searches for sentence in search.left_out),
    )


class _Search(Struct, frozen=True):
    """Directories, and the images of which merges are wanted; None for all.

    ``named`` are the directories that a report names, which can stand for all below. ``missing``
    is an image that is not there. ``left_out`` says what was not looked at.
    """

    directories: tuple[Path, ...]
    named: tuple[Path, ...]
    images: frozenset[str] | None
    tops_in: frozenset[Path] = frozenset()
    missing: str | None = None
    left_out: tuple[str, ...] = ()

    def wants(self, merge: UnfinishedMerge) -> bool:
        if self.images is None or merge.base in self.images or merge.top in self.images:
            return True
        return merge.top is not None and Path(merge.top).parent in self.tops_in


def _search_of_all_devices() -> _Search:
    return _Search((state_files.STATE_DIRECTORY,), (state_files.STATE_DIRECTORY,), None)


def _search_of_devices(searches: Sequence[_Search]) -> _Search:
    """What merges into block devices have left that has to do with what is searched."""
    images = frozenset(image for search in searches for image in search.images or ())
    whole = [search for search in searches if search.images is None]
    directories = frozenset(directory for search in whole for directory in search.directories)
    place = (state_files.STATE_DIRECTORY,)
    return _Search(place, place, images, directories)


def _search(path: Path) -> _Search:
    if os.path.isdir(path):  # noqa: PTH112 (any name will do)
        return _search_below(Path(os.path.realpath(path)))
    images = {os.path.realpath(path)}
    # Top may be gone already. Its directory is where base most likely stands.
    with contextlib.suppress(ChainmergeError):
        images |= {str(image.real_path) for image in discover(path, ChainPolicy()).images}
    directories = dict.fromkeys(Path(image).parent for image in sorted(images))
    here = Path(os.path.realpath(path)).parent
    places = tuple(dict.fromkeys((here, *directories)))
    return _Search(places, places, frozenset(images), missing=_missing(path))


def _missing(path: Path) -> str | None:
    """The image, where it is not there, and no record says that a merge has deleted it."""
    try:
        known = os.path.lexists(path) or merged_record_file(path).exists()
    except (OSError, ValueError):
        known = False
    return None if known else str(path)


def _search_below(root: Path) -> _Search:
    """A directory with everything below. Links are not followed."""
    found, left_out = [root], []
    for directory in found:
        try:
            with os.scandir(directory) as entries:
                below = sorted(
                    entry.path for entry in entries if entry.is_dir(follow_symlinks=False)
                )
        except OSError as error:
            if directory != root:
                left_out.append(f"{directory} was not searched: {reason_of(error)}")
                continue
            raise SearchPathUnusable(str(directory), reason_of(error)) from error
        below = [path for path in below if path not in _OF_THE_KERNEL]
        room = _MOST_DIRECTORIES - len(found)
        if len(below) > room:
            left_out.append(
                f"{directory}, and the directories that follow it, were not searched completely: "
                f"there are more than {_MOST_DIRECTORIES} directories below {root}"
            )
        found += [Path(path) for path in below[:room]]
    more = len(left_out) - _MOST_SENTENCES
    if more > 0:
        left_out[_MOST_SENTENCES:] = [f"{counted(more, 'more directory')} not searched"]
    return _Search(tuple(found), (root,), None, left_out=tuple(left_out))


def _found_in(search: _Search, devices: BlockDevices) -> Iterator[UnfinishedMerge]:
    """All unfinished merges of which there are files in the directories of a search.

    Raises SearchPathUnusable if one that the report names cannot be read.
    """
    by_base: dict[str, UnfinishedMerge] = {}
    files = [file for directory in search.directories for file in _files(directory, search.named)]
    for file in sorted(files, key=_rank):
        merge = _read(file, devices)
        if merge is not None:
            key = _base_of(file, merge)
            before = by_base.get(key)
            by_base[key] = merge if before is None else _together(before, merge)
    for merge in by_base.values():
        yield _in_use(merge) if _is_locked(Path(merge.base)) else _idle(merge)


def _in_use(merge: UnfinishedMerge) -> UnfinishedMerge:
    """The same merge, with base open somewhere: it still runs, or a VM does."""
    process = merge.process
    who = "base is open in another process: the merge or a VM may be running"
    if process is not None and process.running:
        who = f"the merge is running (pid {process.pid})"
    cancel_reason = merge.cancel_reason if merge.cancel_command is None else who
    return replace(
        merge,
        base_is_locked=True,
        vm_may_start=False,
        vm_reason=who,
        cancel_command=None,
        cancel_reason=cancel_reason,
    )


def _idle(merge: UnfinishedMerge) -> UnfinishedMerge:
    """The same merge, with base closed: a process that has begun it does something else by now."""
    process = None if merge.process is None else replace(merge.process, running=False)
    return replace(merge, process=process)


def _base_of(file: Path, merge: UnfinishedMerge) -> str:
    """What files that tell of merges into the same base have in common.

    Two volumes that are not there now may have had the same name, one after the other.
    """
    if file.parent != state_files.STATE_DIRECTORY or MERGED_RECORD.is_called(file.name):
        return merge.base
    return file.stem


def _rank(file: Path) -> int:
    return next(rank for rank, kind in enumerate(KINDS) if kind.is_called(file.name))


def _files(directory: Path, named: Sequence[Path]) -> list[Path]:
    """The small files in a directory."""
    try:
        # Names alone: there can be a great many.
        everything = os.listdir(directory)  # noqa: PTH208
    except OSError as error:
        # One below those has gone in the meantime, or it is said that it was left out.
        if directory == state_files.STATE_DIRECTORY or directory not in named:
            return []
        raise SearchPathUnusable(str(directory), reason_of(error)) from error
    return [directory / name for name in sorted(everything) if kind_of(name)]


def _together(first: UnfinishedMerge, second: UnfinishedMerge) -> UnfinishedMerge:
    """One merge of which two files tell; *first* has the say."""
    holds = first.base_holds_data
    return replace(
        first,
        top=first.top or second.top,
        progress=second.progress if first.state == second.state == UNKNOWN else first.progress,
        base_holds_data=second.base_holds_data if holds is None else holds,
        # What finishes all of several merges finishes this one too.
        command=second.command if second.is_one_of_several else first.command or second.command,
        disks=first.disks or second.disks,
        leaf=first.leaf or second.leaf,
        files=(*first.files, *second.files),
        warnings=(*first.warnings, *second.warnings),
        noted_at=max(first.noted_at or 0, second.noted_at or 0) or None,
        process=first.process or second.process,
    )


def _read(file: Path, devices: BlockDevices) -> UnfinishedMerge | None:
    """The unfinished merge that *file* tells of; None if it tells of none."""
    try:
        match read_leftover(file, devices):
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
    except ChainmergeError as error:
        return _unreadable(file, error)


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
    there = where is not None
    base, top = _base_name(journal.base, where, journal.request), _top_name(journal)
    resume = resume_command_of(journal.known_request)
    cold = command_of(journal.known_request) if there else None
    command, warnings = cold, (f"if the VM still runs, continue with `{resume}`",)
    if there and _is_locked(Path(base)):
        command, warnings = resume, (f"if the VM does not run, finish with `{cold}`",)
    holds, progress = journal.took_effect if there else None, _LIVE_PROGRESS[journal.state]
    told = _told_by(
        file,
        base,
        top,
        progress,
        command,
        holds=holds,
        state=journal.state,
        ways=of_live_journal(journal, where),
        by=_doer_of(journal.request),
    )
    return replace(told, warnings=warnings)


def _of_saved(file: Path, saved: SavedBitmaps) -> UnfinishedMerge:
    request = saved.request
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
    command = entry.finishing_command
    told = _told_by(file, entry.base, entry.top, progress, command, ways=ways, by=by)
    return replace(told, disks=tuple(entry.disks))


def _of_thinning(file: Path, thinning: Thinning) -> UnfinishedMerge | None:
    """The merge that is next where snapshots are thinned out; its own files say more of it."""
    if not thinning.pending or not thinning.is_of_its_leaf():
        return None
    current = thinning.pending[0]
    told = _told_by(
        file,
        current.base_identity.path,
        current.top_identity.path,
        thinning.progress,
        thinning.command,
        ways=of_thinning(thinning),
        by=_doer_of(thinning.request),
    )
    return replace(told, leaf=thinning.leaf)


def _unreadable(file: Path, error: ChainmergeError) -> UnfinishedMerge:
    """A file of which not even the image can be told, but by its own name."""
    name = file.name.removesuffix(f".{KINDS[_rank(file)].suffix}")
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


def _is_locked(base: Path) -> bool:
    if not base.exists():
        return False
    return any(True for _ in contentions([(base, LockMode.WRITER)]))
