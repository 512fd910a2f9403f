# SPDX-License-Identifier: Apache-2.0
"""Repairs what others, or a kill, left behind in one image.

Look (:mod:`chainmerge.repairing.diagnosis`, :mod:`chainmerge.repairing.interrupted`,
:mod:`chainmerge.repairing.foreign_commit`), then mend the image, each write of it preceded by
one to the backup, then look again, then finish the merges that can be finished.
``docs/repair.md`` says what becomes of which damage.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.counting import counted
from chainmerge.bitmaps.comparing import bitmap_difference
from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import BackingFileMissing, TopFormatUnknown, WrongFormat
from chainmerge.chain.model import Chain, ImageFormat, ImageInfo, identity_of
from chainmerge.chain.target import policy_of, relatives_of
from chainmerge.chain.unseen_users import volumes
from chainmerge.documents.repair import UNUSABLE_BITMAP, RepairFinding, RepairReport, UndoReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.engines.metadata.leaks import everywhere_but, reclaim_leaks
from chainmerge.engines.metadata.rebuilding import clear_marks, rebuild
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.engines.metadata.salvage import tables_of
from chainmerge.engines.native.commit import cut_to_image_end, punch_free
from chainmerge.errors import ChainmergeError, Refused
from chainmerge.merging.merge import merge
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.dry_run import plan
from chainmerge.planning.leaks import counted_as_used, find_leaks, leaked_before
from chainmerge.qcow2.check import check, check_with_references
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.header import MAGIC
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.runs import Runs, without_runs
from chainmerge.repairing.backup import Backup, RecordedPort, new_backup
from chainmerge.repairing.diagnosis import Circumstances, Diagnosis, Treatment, diagnose
from chainmerge.repairing.errors import RepairNotVerified
from chainmerge.repairing.foreign_commit import HalfDoneCommit, half_done_commit
from chainmerge.repairing.interrupted import (
    Ending,
    InterruptedMerge,
    forget_merge,
    interrupted_merges,
)
from chainmerge.repairing.unusable_bitmaps import unusable_bitmaps
from chainmerge.storage.files import FileReadable, WritablePort
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.storage.other_hosts import held_by_this_host
from chainmerge.storage.other_users import require_alone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.relatives import Relatives


def plan_repair(
    image: str | Path, access: Access | None = None, *, reclaim: bool = False
) -> RepairReport:
    """Say what is wrong with an image, and what :func:`repair` would do about it.

    Args:
        image: the image to look at. Others may be reading it.
        access: how images may be found and reached.
        reclaim: as in :func:`repair`.

    Raises:
        Refused: the image cannot be read, or somebody has it open for writing.
    """
    access = access or Access()
    merges = interrupted_merges(Path(image))
    with lock_image(image, LockMode.READER, access.lock_wait):
        case = _examine(Path(image), access, merges, reclaim)
    return _report(str(image), _with_foreseen_refusals(case, access), dry_run=True)


def repair(
    image: str | Path,
    access: Access | None = None,
    backup_directory: str | Path | None = None,
    *,
    reclaim: bool = False,
) -> RepairReport:
    """Repair an image, and finish interrupted merges.

    What the guest sees does not change. What is overwritten is saved in a file, which
    :func:`undo_repair` takes; if interrupted, the same call continues.

    Args:
        image: the image to repair.
        access: how images may be found and reached.
        backup_directory: where to save what is overwritten; None for beside the image, or for
            a block device in ``/var/lib/chainmerge``.
        reclaim: give back leaked clusters even if they may be all that is left of the data that a
            lost L2 table mapped.

    Raises:
        Refused: nothing was changed.
        Failed, OutcomeUnknown: the message says what the disk holds now; the image may be repaired
            in part, and the same call continues.
    """
    access = access or Access()
    merges = interrupted_merges(Path(image))
    with (
        held_by_this_host([Path(image)], access),
        lock_image(image, LockMode.WRITER, access.lock_wait),
    ):
        require_alone([Path(image)])
        case = _examine(Path(image), access, merges, reclaim)
        directory = None if backup_directory is None else Path(backup_directory)
        backup, verified = _mend(case, directory)
        for unfinished in case.to_forget:
            forget_merge(unfinished)
    finished = _finish(case, access)
    report = _report(str(image), finished.case, dry_run=False)
    return replace(
        report,
        backup=None if backup is None else str(backup),
        verified=(*verified, *finished.verified),
        warnings=(*report.warnings, *finished.warnings),
    )


def undo_repair(backup: str | Path, access: Access | None = None) -> UndoReport:
    """Put back what a repair has overwritten, to the last byte.

    Args:
        backup: the file that the repair's report names.
        access: how long to wait for the image.

    Raises:
        Refused: nothing was changed; the image was written to since, or the file is damaged.
        Failed: some of it is put back; the same call continues.
    """
    access = access or Access()
    kept = Backup(Path(backup))
    with (
        held_by_this_host([Path(kept.image)], access),
        lock_image(kept.image, LockMode.WRITER, access.lock_wait),
        WritablePort(kept.image) as port,
    ):
        require_alone([Path(kept.image)])
        kept.restore(port)
    return UndoReport(REPORT_VERSION, str(kept.image), str(backup), kept.bytes_kept)


class _Case(Struct, frozen=True):
    """An image, what is wrong with it, and with merges in which it takes part."""

    info: ImageInfo
    diagnosis: Diagnosis
    merges: tuple[InterruptedMerge, ...]
    commits: tuple[HalfDoneCommit, ...]
    undoing: Undoing | None
    findings: tuple[RepairFinding, ...]
    actions: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def to_forget(self) -> tuple[InterruptedMerge, ...]:
        """The merges of which nothing has taken effect in this image."""
        return tuple(one for one in self.merges if _is_to_forget(one, self.info))

    @property
    def to_finish(self) -> tuple[tuple[Path, Path, MergeOptions], ...]:
        """The merges that are to be done to their end: top, base, and how."""
        ours = tuple(
            (one.top, one.base, one.options)
            for one in self.merges
            if one.ending is Ending.FINISH and one.top is not None
        )
        # That base holds much of top already, and was written later, is what shows such a commit.
        commit = MergeOptions(direction="commit", despite_newer_base=True)
        return ours + tuple((one.top, one.base, commit) for one in self.commits)


class Undoing(Struct, frozen=True):
    """What a merge has taken of an image in which it has not taken effect.

    Attributes:
        freed: Where clusters that it has leaked are given back.
        end: Where the image ends without them, in bytes.
        reserved: Bytes of the file behind that.
    """

    freed: Runs
    end: int
    reserved: int


def _is_to_forget(merge_: InterruptedMerge, info: ImageInfo) -> bool:
    return merge_.ending is Ending.UNDO and _is_at(merge_.written, info)


def _is_at(path: Path, info: ImageInfo) -> bool:
    try:
        return identity_of(path.stat()) == info.identity
    except OSError:
        return False


# Looking


def _examine(
    path: Path,
    access: Access,
    merges: tuple[InterruptedMerge, ...],
    reclaim: bool,  # noqa: FBT001 (what is asked for is handed on)
) -> _Case:
    with FileReadable(path) as readable:
        info = _describe(path, readable, access)
        relatives = _relatives(info, access)
        suspected = () if merges else tuple(_half_done_commits(info, relatives, access))
        commits = tuple(one for one in suspected if one.is_certain)
        written_to = [one.written for one in merges if one.ending is Ending.FINISH]
        written_to += [one.base for one in commits]
        circumstances = Circumstances(
            guarded=_guarded(relatives),
            merge_pending=any(_is_at(one, info) for one in written_to),
            leaked_before=leaked_before(info.real_path),
            reclaim=reclaim,
        )
        diagnosis = Diagnosis() if info.header is None else diagnose(readable, circumstances)
        undoing = None
        if any(_is_to_forget(one, info) for one in merges):
            undoing = _undoing(info, readable, circumstances.leaked_before)
    findings, actions = [*diagnosis.findings], [*diagnosis.actions]
    if not merges:
        findings += _findings_below(info, access)
    if undoing is not None and undoing.reserved:
        actions.append(
            f"give back the {undoing.reserved} bytes that the merge had reserved at the end of the "
            "file"
        )
    for one in merges:
        findings.append(_finding_of(one, info))
        actions += _actions_of(one, info)
    for commit in commits:
        findings.append(_finding_of_commit(commit))
        actions.append(f"finish it: merge {commit.top} into {commit.base}; {commit.top} is kept")
    if diagnosis.treatment is Treatment.NONE and not merges and not commits:
        findings += _unusable(info, relatives, access)
    warnings = [_suspicion(one) for one in suspected if not one.is_certain]
    if diagnosis.bitmaps is not None:
        warnings += _warnings(relatives)
    return _Case(
        info,
        diagnosis,
        merges,
        commits,
        undoing,
        tuple(findings),
        tuple(actions),
        tuple(warnings),
    )


def _findings_below(info: ImageInfo, access: Access) -> Iterator[RepairFinding]:
    """What keeps the image from being used at all, though nothing is wrong with it itself."""
    try:
        discover(info.path, policy_of(access))
    except BackingFileMissing as error:
        yield RepairFinding(error.code, error.sentence, repairable=False)
    except ChainmergeError:
        # Said of the image itself already, or of what may be reached and how.
        return


def _undoing(info: ImageInfo, readable: FileReadable, noted: Runs | None) -> Undoing | None:
    """What is to be given back of a merge that is undone; None if that cannot be told."""
    if info.header is None or info.is_block_device or info.header.dirty or info.header.corrupt:
        return None
    try:
        image = Qcow2Image(readable)
    except FormatError:
        return None
    report, references = check_with_references(image)
    if not report.sound:
        return None
    kept = find_leaks(image, report, references, noted).others
    used = np.flatnonzero(counted_as_used(references, kept).counts)
    end = (int(used[-1]) + 1) * info.header.cluster_size
    return Undoing(everywhere_but(kept), end, max(0, readable.size - end))


def _describe(path: Path, readable: FileReadable, access: Access) -> ImageInfo:
    """The image as it is, whatever is wrong with it; its header without its refcount table."""
    given = policy_of(access).formats
    declared = {os.path.realpath(one): name for one, name in given.items()}
    image_format = declared.get(os.path.realpath(path))
    begins_as_qcow2 = readable.read(0, len(MAGIC)) == MAGIC
    if image_format is None and not begins_as_qcow2:
        raise TopFormatUnknown(str(path))
    if image_format == ImageFormat.QCOW2 and not begins_as_qcow2:
        raise WrongFormat(str(path), "the format given for it")
    header = None
    if image_format in (None, ImageFormat.QCOW2):
        header = tables_of(readable).image.header
    return ImageInfo(
        path=path.absolute(),
        real_path=Path(os.path.realpath(path)),
        identity=identity_of(os.fstat(readable.fd)),
        is_block_device=readable.is_block_device,
        format=image_format or ImageFormat.QCOW2,
        format_declared=image_format is not None,
        header=header,
        file_size=readable.size,
        guest_size=readable.size if header is None else header.virtual_size,
        backing_name=None if header is None else header.backing_name,
    )


def _relatives(info: ImageInfo, access: Access) -> Relatives:
    return relatives_of(Chain((info,)), 0, access)


def _guarded(relatives: Relatives) -> dict[str, int]:
    """Names of bitmaps in the images above, with the finest granularity of each in bytes."""
    found: dict[str, int] = {}
    for above in relatives.above:
        for entry in above.image.bitmaps:
            found[entry.name] = min(entry.granularity, found.get(entry.name, entry.granularity))
    return found


def _half_done_commits(
    info: ImageInfo, relatives: Relatives, access: Access
) -> Iterator[HalfDoneCommit]:
    """Commits of others of which the image is the top or the base."""
    if info.backing_name is not None:
        found = half_done_commit(info.path, access)
        if found is not None:
            yield found
    for child in relatives.children:
        found = half_done_commit(child.path, access)
        if found is not None:
            yield found


def _finding_of(one: InterruptedMerge, info: ImageInfo) -> RepairFinding:
    repairable = one.ending is Ending.FINISH or _is_to_forget(one, info)
    sentence = one.sentence
    if one.ending is Ending.BY_HAND:
        sentence += "; run the same merge again"
    elif not repairable:
        sentence += f"; `chainmerge repair {one.written}` undoes it"
    return RepairFinding("interrupted-merge", sentence, repairable)


def _actions_of(one: InterruptedMerge, info: ImageInfo) -> Iterator[str]:
    if _is_to_forget(one, info):
        yield f"undo the merge of {one.top}: forget it, since it has not taken effect"
    elif one.ending is Ending.FINISH:
        yield f"finish the merge of {one.top} into {one.base}"


def _finding_of_commit(commit: HalfDoneCommit) -> RepairFinding:
    sentence = (
        f"a commit of {commit.top} into {commit.base} by another program was interrupted: "
        f"{_evidence(commit)}. A writer to {commit.base} died: {'; '.join(commit.marks)}"
    )
    return RepairFinding("half-done-commit", sentence, repairable=True)


def _suspicion(commit: HalfDoneCommit) -> str:
    return (
        f"{_evidence(commit)}: if a commit was interrupted, `chainmerge merge` finishes it; a "
        "guest that wrote the same data again would leave the same traces"
    )


def _evidence(commit: HalfDoneCommit) -> str:
    return (
        f"everything that {commit.top} defines up to byte {commit.reached} of the guest's disk is "
        f"also in {commit.base}, and the rest is not; that is at least {commit.copied} of its "
        f"{commit.data} bytes of data, zeros not counted"
    )


def _unusable(info: ImageInfo, relatives: Relatives, access: Access) -> Iterator[RepairFinding]:
    if info.header is None or info.header.bitmaps is None:
        return
    for name, reason in unusable_bitmaps(info, relatives, access).items():
        sentence = (
            f"no chain can use the bitmap {name!r}: it is {reason}; `chainmerge bitmaps repair "
            "LEAF` drops such bitmaps from the whole chain"
        )
        yield RepairFinding(UNUSABLE_BITMAP, sentence, repairable=False)


def _warnings(relatives: Relatives) -> Iterator[str]:
    for path, reason in relatives.unreadable:
        yield (
            f"{path} cannot be read ({reason}): if this image is below it, it must not be used for "
            "an incremental backup before a full one"
        )
    if relatives.inactive:
        yield (
            f"{volumes(relatives)} cannot be read (not active): images on top of this one must not "
            "be used for an incremental backup before a full one"
        )


def _with_foreseen_refusals(case: _Case, access: Access) -> _Case:
    """The same, with what would keep merges from being finished, as far as it shows by now."""
    if case.diagnosis.treatment in (Treatment.MARKS, Treatment.REBUILD):
        return case
    refused = []
    for top, base, options in case.to_finish:
        try:
            reasons = [one.sentence for one in plan(top, base, access, options).refusals]
        except ChainmergeError as error:
            # A merge whose top is gone already has no plan, but can be finished.
            reasons = [error.sentence] if top.exists() else []
        refused += [_finding_of_refusal(top, base, reason) for reason in reasons]
    return replace(case, findings=(*case.findings, *refused))


def _finding_of_refusal(top: Path, base: Path, reason: str) -> RepairFinding:
    sentence = f"the merge of {top} into {base} cannot be finished now: {reason}"
    return RepairFinding("interrupted-merge", sentence, repairable=False)


# Mending


def _give_back(port: WritablePort, undoing: Undoing) -> None:
    """Give back what a merge has taken in vain; no backup has any of it, as it holds nothing.

    Raises RewriteFailed, WriteFailed, ...: some of it is left.
    """
    reclaim_leaks(port, undoing.freed)
    punch_free(port)
    cut_to_image_end(port, Qcow2Image(port))


def _mend(case: _Case, backup_directory: Path | None) -> tuple[Path | None, tuple[str, ...]]:
    """Treat the image; returns the backup, if there is one, and what was verified."""
    diagnosis, image, undoing = case.diagnosis, case.info.real_path, case.undoing
    if diagnosis.treatment is Treatment.NONE:
        if undoing is not None:
            with WritablePort(image) as file:
                _give_back(file, undoing)
        return None, ()
    backup = new_backup(image, backup_directory)
    with WritablePort(image) as file:
        port = RecordedPort(file, backup)
        try:
            if undoing is not None:
                _give_back(file, undoing)
            _treat(port, diagnosis)
            port.seal()
        finally:
            port.close()
    return (backup if port.wrote else None), tuple(_verify(image, diagnosis))


def _treat(port: RecordedPort, diagnosis: Diagnosis) -> None:
    bitmaps = diagnosis.bitmaps
    match diagnosis.treatment:
        case Treatment.MARKS:
            clear_marks(port)
        case Treatment.REBUILD:
            assert bitmaps is not None
            stored = [one for one in bitmaps if isinstance(one, StoredBitmap)]
            rebuild(port, stored, diagnosis.kept)
        case Treatment.BITMAPS:
            if bitmaps is not None:
                replace_bitmaps(port, bitmaps)
            reclaim_leaks(port, diagnosis.freed)


def _verify(path: Path, diagnosis: Diagnosis) -> Iterator[str]:
    """Verify the image by reading it again, and trust nothing else.

    Raises:
        RepairNotVerified
    """
    with FileReadable(path) as readable:
        image = Qcow2Image(readable)
        report = check(image)
        new = without_runs(report.leaked, diagnosis.kept).total
        if not report.sound or new or image.header.dirty or image.header.corrupt:
            first = next(iter(report.messages), "it is still marked dirty or corrupt")
            raise RepairNotVerified(str(path), first)
        but = f" except {counted(report.leaks, 'kept cluster')}" if report.leaks else ""
        yield f"refcounts recomputed from the tables: no corruption, no leaks{but}"
        if diagnosis.bitmaps is None:
            return
        stored = [one for one in diagnosis.bitmaps if isinstance(one, StoredBitmap)]
        if len(stored) == len(diagnosis.bitmaps):
            difference = bitmap_difference(image, stored)
            if difference is not None:
                raise RepairNotVerified(str(path), difference)
        yield f"{counted(len(diagnosis.bitmaps), 'bitmap')} re-read"


class _Finished(Struct, frozen=True):
    """The outcome of finishing merges."""

    case: _Case
    verified: tuple[str, ...]
    warnings: tuple[str, ...]


def _finish(case: _Case, access: Access) -> _Finished:
    """Finish what can be finished; a merge that is refused is left as it is, and reported."""
    verified: list[str] = []
    warnings: list[str] = []
    refused: list[RepairFinding] = []
    for top, base, options in case.to_finish:
        try:
            report = merge(top, base, access, options)
        except Refused as error:
            refused.append(_finding_of_refusal(top, base, error.sentence))
            continue
        verified += report.verified
        warnings += report.warnings
    case = replace(case, findings=(*case.findings, *refused))
    return _Finished(case, tuple(verified), tuple(warnings))


def _report(image: str, case: _Case, *, dry_run: bool) -> RepairReport:
    return RepairReport(
        version=REPORT_VERSION,
        image=image,
        dry_run=dry_run,
        findings=case.findings,
        actions=case.actions,
        consequences=case.diagnosis.consequences,
        warnings=case.warnings,
    )
