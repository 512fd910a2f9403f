# SPDX-License-Identifier: Apache-2.0
"""Finds unfinished merges by the small files that they leave. Reads only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.counting import counted
from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import SearchPathUnusable
from chainmerge.chain.model import ChainPolicy
from chainmerge.documents.status import StatusReport, UnfinishedMerge
from chainmerge.documents.versions import STATUS_VERSION
from chainmerge.errors import ChainmergeError
from chainmerge.records import files as state_files
from chainmerge.records.disks import DISK_ENTRY, find_entry
from chainmerge.records.identity import BlockDevices
from chainmerge.records.merged_record import (
    MERGED_RECORD,
    merged_record_file,
)
from chainmerge.records.progress import UNKNOWN, is_locked, merge_told_by, rank_of
from chainmerge.records.remains import kind_of
from chainmerge.storage.errors import ImageMissing, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


# A tree of images has a few; a search of "/" has to end.
_MOST_DIRECTORIES: Final = 50_000
_MOST_SENTENCES: Final = 20
# What stands for no storage.
_OF_THE_KERNEL: Final = frozenset({"/proc", "/sys", "/dev"})


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
    for file in sorted(files, key=rank_of):
        told = merge_told_by(file, devices)
        if told is not None:
            merge = told.merge
            # Of a base that is only read there can be several pulls.
            key = f"{merge.base}\0{merge.top}"
            if not (key in by_base or told.is_of_pull):
                key = _base_of(file, merge)
            before = by_base.get(key)
            by_base[key] = merge if before is None else _together(before, merge)
    for merge in by_base.values():
        yield _in_use(merge) if is_locked(Path(merge.base)) else _idle(merge)


def _in_use(merge: UnfinishedMerge) -> UnfinishedMerge:
    """The same merge, with base open somewhere: it still runs, or a VM does."""
    process = merge.process
    who = "base is open in another process: the merge or a VM may be running"
    if process is not None and process.running:
        who = f"the merge is running (pid {process.pid})"
    told = replace(merge, base_is_locked=True, vm_may_start=False, vm_reason=who)
    if waits_in_vm(told):
        return told
    cancel_reason = merge.cancel_reason if merge.cancel_command is None else who
    return replace(told, cancel_command=None, cancel_reason=cancel_reason)


def waits_in_vm(merge: UnfinishedMerge) -> bool:
    """Whether it is one of several in a running VM that has not begun, and nobody is at work."""
    if not all(DISK_ENTRY.is_called(Path(file).name) for file in merge.files):
        return False
    if merge.process is not None and merge.process.running:
        return False
    top = None if merge.top is None else Path(merge.top)
    entry = find_entry(Path(merge.base), top)
    return entry is not None and entry.live_request is not None


def _idle(merge: UnfinishedMerge) -> UnfinishedMerge:
    """The same merge, with base closed: a process that has begun it does something else by now."""
    process = None if merge.process is None else replace(merge.process, running=False)
    return replace(merge, process=process)


def _base_of(file: Path, merge: UnfinishedMerge) -> str:
    """What files that tell of merges into the same base have in common.

    A volume that is there has several names; two that are not there now may have had the same
    name, one after the other.
    """
    base = Path(merge.base)
    if base.is_block_device():
        return os.path.realpath(base)
    if file.parent != state_files.STATE_DIRECTORY or MERGED_RECORD.is_called(file.name):
        return merge.base
    return file.stem


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
    # Then both warn of the command that is for the other case, and one of them is for all disks.
    is_live = bool(second.disks and second.warnings)
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
        warnings=second.warnings if is_live else (*first.warnings, *second.warnings),
        noted_at=max(first.noted_at or 0, second.noted_at or 0) or None,
        process=first.process or second.process,
    )
