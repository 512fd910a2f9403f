# SPDX-License-Identifier: Apache-2.0
"""Undoes an interrupted merge that has not taken effect.

The image that it wrote to is the old one then, with some clusters leaked. These are given back
first: only the journal, or the record of a pull, tells whose they are, so it goes last of all, and
a kill leaves what the same command ends.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.documents.plan import EngineName
from chainmerge.documents.repair import CancelReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.native.commit import cut_to_image_end, punch_free
from chainmerge.errors import ChainmergeError
from chainmerge.merging.deleting import give_back
from chainmerge.merging.verifying import verify_metadata
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.leaks import find_leaks, leaked_before
from chainmerge.qcow2.check import check_with_references
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.disks import find_entry, forget_entry, load_entry
from chainmerge.records.live_journal import LIVE_JOURNAL
from chainmerge.records.merge_journal import (
    Journal,
    forget_journal,
    is_without_effect,
    load_journal,
)
from chainmerge.records.merged_record import (
    MergedRecord,
    forget_merged_record,
    is_pulled,
    load_merged_record,
)
from chainmerge.records.progress import how_far, where_base_is
from chainmerge.records.request import shell_line
from chainmerge.records.saved_bitmaps import forget_saved_bitmaps, load_saved_bitmaps
from chainmerge.records.thinning import forget_thinning
from chainmerge.records.unfinished import status, waits_in_vm
from chainmerge.repairing.errors import CannotCancel, NothingToCancel
from chainmerge.storage.files import FileReadable, WritablePort, drop_cached
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.storage.other_hosts import held_by_this_host
from chainmerge.storage.other_users import require_alone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.status import UnfinishedMerge
    from chainmerge.records.disks import DiskEntry
    from chainmerge.records.request import RecordedRequest


def cancel(
    image: str | Path, access: Access | None = None, *, shrink: bool = False
) -> CancelReport:
    """Undo an interrupted merge that has not taken effect, and give back the space that it took.

    No data changes: top shows what it showed, and so does base. Interrupted itself, the same call
    ends it.

    Args:
        image: top or base of the merge. What is top of one merge and base of another one stands
            for the former. Of snapshots that are thinned out, also the leaf: what has not begun
            is forgotten, what is merged stays.
        access: how long to wait for the image that the merge wrote to.
        shrink: reduce the logical volume of that image to what it needs, and 1 GiB.

    Raises:
        NothingToCancel: no unfinished merge of the image is known.
        CannotCancel: it has taken effect, or half done so, or a running VM does it.
        ImageLocked, ImageInUse: somebody has the image open, such as the merge itself.
        Refused: nothing was changed.
        Failed: some of the space is left; the same call goes on.
    """
    access = access or Access()
    unfinished = _unfinished_of(Path(image))
    # Whoever has base open is named by its lock.
    cannot = unfinished.cancel_command is None and not unfinished.base_is_locked
    if cannot or any(LIVE_JOURNAL.is_called(Path(file).name) for file in unfinished.files):
        raise _refusal(unfinished)
    if unfinished.base_is_locked and waits_in_vm(unfinished):
        return _taken_out(unfinished)
    written = _written_by(unfinished)
    with (
        held_by_this_host([written], access),
        lock_image(written, LockMode.WRITER, access.lock_wait),
    ):
        require_alone([written])
        drop_cached(written)
        undoable = _undoable(unfinished)
        given_back = _give_back(written, shrink=shrink) if undoable.has_begun else _GivenBack()
        removed = tuple(_forget(undoable))
    return CancelReport(
        version=REPORT_VERSION,
        base=unfinished.base,
        top=unfinished.top,
        image=str(written),
        freed_bytes=given_back.freed,
        removed=removed,
        remains=tuple(_remains(undoable, written, shrink=shrink)),
        verified=given_back.verified,
        warnings=given_back.warnings,
    )


def _taken_out(unfinished: UnfinishedMerge) -> CancelReport:
    """Take a merge that has not begun out of those of a VM, which goes on using the images."""
    top = None if unfinished.top is None else Path(unfinished.top)
    removed = tuple(_forget(_Undoable(Path(unfinished.base), top)))
    return CancelReport(
        version=REPORT_VERSION,
        base=unfinished.base,
        top=unfinished.top,
        image=unfinished.base,
        freed_bytes=0,
        removed=removed,
    )


class _Undoable(Struct, frozen=True):
    """What is left of a merge that has not taken effect, read under the lock of its image."""

    base: Path
    top: Path | None
    journal: Journal | None = None
    record: MergedRecord | None = None
    leaf: Path | None = None
    """That of the chain whose snapshots are thinned out by it."""

    @property
    def has_begun(self) -> bool:
        """Whether the merge may have written to an image: not if it only waits among others."""
        return self.journal is not None or self.record is not None

    @property
    def request(self) -> RecordedRequest | None:
        """What was asked for, where that is recorded."""
        of = self.journal or self.record
        return None if of is None else of.request


def _unfinished_of(image: Path) -> UnfinishedMerge:
    merges = status([image]).merges
    as_top = [one for one in merges if one.top is not None and _is_same(Path(one.top), image)]
    as_base = [one for one in merges if _is_same(Path(one.base), image)]
    as_leaf = [one for one in merges if one.leaf is not None and _is_same(Path(one.leaf), image)]
    for merge in (*as_top, *as_leaf, *as_base):
        return merge
    raise NothingToCancel(str(image))


def _written_by(unfinished: UnfinishedMerge) -> Path:
    """The image that a merge writes to."""
    if unfinished.top is not None and _pull_of(unfinished) is not None:
        return Path(os.path.realpath(unfinished.top))
    if unfinished.leaf is not None and not os.path.lexists(unfinished.base):
        return Path(os.path.realpath(unfinished.leaf))
    entry = _entry_of(unfinished)
    if entry is not None:
        return Path(os.path.realpath(entry.written))
    return Path(os.path.realpath(unfinished.base))


def _entry_of(unfinished: UnfinishedMerge) -> DiskEntry | None:
    """The entry that it has as one of several disks."""
    top = None if unfinished.top is None else Path(unfinished.top)
    return find_entry(Path(unfinished.base), top)


def _pull_of(unfinished: UnfinishedMerge) -> MergedRecord | None:
    """The record of the pull that a merge is; None if it is none, or has not begun."""
    record = None if unfinished.top is None else load_merged_record(Path(unfinished.top))
    if record is None or record.pulled is None:
        return None
    # An earlier pull into the same image may have left it.
    is_another = unfinished.leaf is not None and not record.names_base(Path(unfinished.base))
    return None if is_another else record


def _refusal(unfinished: UnfinishedMerge) -> CannotCancel:
    top = unfinished.top or unfinished.base
    command = unfinished.command or shell_line(["chainmerge", "status", unfinished.base])
    return CannotCancel(top, unfinished.base, unfinished.cancel_reason, command)


def _undoable(unfinished: UnfinishedMerge) -> _Undoable:
    """What is left of the merge, now that nobody adds to it.

    Raises CannotCancel, MergeJournalDamaged, SavedBitmapsDamaged.
    """
    base, top = Path(unfinished.base), None if unfinished.top is None else Path(unfinished.top)
    leaf = None if unfinished.leaf is None else Path(unfinished.leaf)
    journal, record = load_journal(base), _pull_of(unfinished)
    saved = load_saved_bitmaps(base)
    if record is not None and record.pulled is not None:
        if is_pulled(record, record.pulled, Path(record.known_request.tops[0])):
            raise _refusal(unfinished)
        return _Undoable(base, top, record=record, leaf=leaf)
    if journal is None:
        if saved is not None or (find_entry(base, top) is None and leaf is None):
            raise _refusal(unfinished)
        return _Undoable(base, top, leaf=leaf)
    where = where_base_is(journal)
    by_qemu = journal.engine == EngineName.QEMU
    holds = None if where is None or by_qemu else how_far(journal, where)[0]
    if not is_without_effect(journal, saved, holds=holds):
        raise _refusal(unfinished)
    return _Undoable(base, top, journal=journal, leaf=leaf)


class _GivenBack(Struct, frozen=True):
    """How many bytes of clusters were given back, and what was verified, in sentences."""

    freed: int = 0
    verified: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _give_back(written: Path, *, shrink: bool) -> _GivenBack:
    """Give back what the merge has taken.

    Raises ImageDirty, ImageCorrupt, ImageDamaged, RewriteFailed, VerificationFailed.
    """
    noted = leaked_before(written)
    with WritablePort(written) as port:
        image = Qcow2Image(port)
        report, references = check_with_references(image)
        leaks = find_leaks(image, report, references, noted)
        freed = reclaim_leaks(port, leaks.freed)
        if not port.is_block_device:
            with contextlib.suppress(ChainmergeError):
                punch_free(port)
            cut_to_image_end(port, Qcow2Image(port))
    with FileReadable(written) as readable:
        verified = verify_metadata(Qcow2Image(readable), leaks.kept)
    options = MergeOptions(shrink=shrink)
    warnings = tuple(give_back(written, "qcow2", options, None))
    return _GivenBack(freed * image.header.cluster_size, (verified,), warnings)


def _forget(undoable: _Undoable) -> Iterator[str]:
    """Remove the files of the merge, what explains it last; yields what each was."""
    base = undoable.base
    # Base has all that it ever had: this only says what it lacks.
    if undoable.journal is not None and load_saved_bitmaps(base) is not None:
        forget_saved_bitmaps(base)
        yield "the note of what base lacks"
    entry = find_entry(base, undoable.top)
    if entry is not None:
        _leave_disks(entry)
        yield "its entry among several disks"
    if undoable.leaf is not None:
        forget_thinning(undoable.leaf)
        yield "the record of the snapshots that were to go"
    if undoable.record is not None:
        forget_merged_record(Path(undoable.record.top))
        yield "the record of the pull"
    if undoable.journal is not None:
        forget_journal(base)
        yield "the journal"


def _leave_disks(entry: DiskEntry) -> None:
    """Take a disk out of several that are merged together; the last one takes all entries along."""
    written, request = Path(entry.written), entry.request
    images = () if request is None else request.tops if entry.pulls else request.bases
    entries = {
        other: load_entry(other) for other in map(Path, images) if not _is_same(other, written)
    }
    if all(one is None or one.done for one in entries.values()):
        for other in entries:
            forget_entry(other)
    forget_entry(written)


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _remains(undoable: _Undoable, written: Path, *, shrink: bool) -> Iterator[str]:
    """What the merge has changed that cannot be undone, a sentence each."""
    if undoable.request is not None and undoable.request.options.get("drop_snapshots"):
        yield "internal snapshots that the merge has removed are gone (--drop-snapshots)"
    if written.is_block_device() and not shrink:
        yield f"{written} keeps the size that it has now; --shrink reduces a logical volume"
