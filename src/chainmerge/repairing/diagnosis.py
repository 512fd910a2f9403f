# SPDX-License-Identifier: Apache-2.0
"""What is wrong with one image, and what can be done about it. Reads only.

What the guest sees is said by the L1 and L2 tables, and nothing here ever changes where they
lead. Where these contradict themselves, a guest's data is lost already, and what of it is
right is not for a program to guess: that is shown and left alone. All the rest, refcounts,
flags, marks and bitmaps, either follows from them or can be done without.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.counting import counted
from chainmerge.bitmaps.rules import BitmapState
from chainmerge.bitmaps.sets import tombstone
from chainmerge.bitmaps.stored import state_of
from chainmerge.documents.repair import KEPT_LEAKS, RepairFinding
from chainmerge.engines.metadata.bitmap_set import AnyBitmap, KeptBitmap, StoredBitmap
from chainmerge.engines.metadata.leaks import EVERYWHERE
from chainmerge.engines.metadata.preconditions import without_bitmaps
from chainmerge.engines.metadata.rebuilding import count_doubles, plan_rebuild
from chainmerge.engines.metadata.salvage import (
    Tables,
    clusters_of_bitmap,
    directory_clusters,
    image_without_refcounts,
    overwritten_metadata,
    tables_of,
    tables_with_bitmaps,
)
from chainmerge.errors import Refused
from chainmerge.planning.leaks import Leaks, find_leaks
from chainmerge.qcow2.bitmaps import BitmapEntry, read_bits, read_table, salvage_directory
from chainmerge.qcow2.check import CheckReport, check, check_with_references
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.runs import NO_RUNS, Runs
from chainmerge.qcow2.table_errors import BadBitmapDirectory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.arithmetic.arrays import I64Array
    from chainmerge.qcow2.readable import Readable
    from chainmerge.qcow2.references import ReferenceCounts

_MOST_MESSAGES: Final = 20


class Treatment(Enum):
    """How an image is repaired."""

    NONE = "nothing is to be done, or nothing can be done"
    MARKS = "clear the dirty bit and the corrupt bit"
    BITMAPS = "replace its bitmaps; its refcounts are right, except for leaks"
    REBUILD = "give it new refcounts, and bitmaps with them"


class Diagnosis(Struct, frozen=True):
    """What is wrong with an image.

    Attributes:
        findings: What is wrong, worst last.
        treatment: What repairs it.
        bitmaps: All bitmaps that it is to have, None if they stay as they are.
        kept: Leaked clusters that stay.
        freed: Where leaked clusters are reclaimed.
        actions: What that comes to, a sentence each.
        consequences: What it means for backups, a sentence each.
    """

    findings: tuple[RepairFinding, ...] = ()
    treatment: Treatment = Treatment.NONE
    bitmaps: tuple[AnyBitmap, ...] | None = None
    kept: Runs = NO_RUNS
    freed: Runs = EVERYWHERE
    actions: tuple[str, ...] = ()
    consequences: tuple[str, ...] = ()


class Circumstances(Struct, frozen=True):
    """What matters of other images.

    Attributes:
        guarded: Bitmaps of images that stand on this one: granularity (bytes) by name.
        merge_pending: Whether a merge into this image is going to be finished. That needs the
            bitmaps as the merge has left them.
        leaked_before: Clusters that were leaked before a merge of ours; None if there was none.
        reclaim: Whether leaked clusters are to go that may be the content of a lost L2 table.
    """

    guarded: Mapping[str, int]
    merge_pending: bool
    leaked_before: Runs | None = None
    reclaim: bool = False


def diagnose(readable: Readable, circumstances: Circumstances) -> Diagnosis:
    """Find out what is wrong with a qcow2 image that nobody else has open.

    Raises:
        FormatError: the header is damaged in a way that leaves nothing to go by.
    """
    tables = tables_of(readable)
    try:
        image = Qcow2Image(readable)
    except FormatError as error:
        # The header without its pointer to the refcounts could be read.
        return _with_lost_refcounts(readable, tables, circumstances, error)
    report, references = check_with_references(image)
    return _Examination(image, tables, report, references, circumstances).diagnosis()


def _with_lost_refcounts(
    readable: Readable, tables: Tables, circumstances: Circumstances, error: FormatError
) -> Diagnosis:
    finding = RepairFinding("wrong-refcounts", error.sentence, repairable=tables.sound)
    if not tables.sound:
        return Diagnosis((finding, *_corruptions(tables.problems)))
    bitmaps = _judge_bitmaps(readable, circumstances, counted=False)
    findings = (finding, *bitmaps.findings, *_doubles(readable, tables))
    return _rebuilding(readable, tables, bitmaps, findings, ())


class _Examination:
    """An image whose header can be read, and what is found of it."""

    def __init__(
        self,
        image: Qcow2Image,
        tables: Tables,
        report: CheckReport,
        references: ReferenceCounts,
        circumstances: Circumstances,
    ) -> None:
        self._image = image
        self._tables = tables
        self._report = report
        self._references = references
        self._circumstances = circumstances

    def diagnosis(self) -> Diagnosis:
        report, header = self._report, self._image.header
        if not report.sound:
            problems = self._tables.problems
            problems = problems or overwritten_metadata(self._image.readable, self._tables)
            if problems:
                return Diagnosis((*self._marks(), *_corruptions(problems)))
        bitmaps = self._bitmaps(self._circumstances)
        leaks = self._leaks
        marked = header.dirty or header.corrupt
        if not report.sound or report.shared_leaks or (marked and (report.leaks or bitmaps.lost)):
            return self._to_be_rebuilt(bitmaps)
        findings = (*bitmaps.findings, *_leak_findings(leaks), *self._marks())
        if marked:
            return Diagnosis(findings, Treatment.MARKS, actions=self._actions_of_marks())
        actions = bitmaps.actions
        if leaks.any_freed:
            actions += (f"reclaim {counted(_freed(leaks), 'leaked cluster')}",)
        return Diagnosis(
            findings,
            Treatment.BITMAPS if bitmaps.lost or leaks.any_freed else Treatment.NONE,
            bitmaps.kept + bitmaps.tombstones if bitmaps.lost else None,
            leaks.kept,
            leaks.freed,
            actions,
            bitmaps.consequences,
        )

    def _to_be_rebuilt(self, bitmaps: _Bitmaps) -> Diagnosis:
        if self._circumstances.merge_pending:
            # A bitmap without content cannot be rewritten, whoever else would deal with it.
            bitmaps = self._bitmaps(replace(self._circumstances, merge_pending=False))
        findings = (
            *bitmaps.findings,
            *_leak_findings(self._leaks),
            *self._marks(),
            *self._wrong_refcounts(),
            *_doubles(self._image.readable, self._tables),
        )
        actions = self._actions_of_marks()
        return _rebuilding(
            self._image.readable, self._tables, bitmaps, findings, actions, self._leaks.kept
        )

    def _bitmaps(self, circumstances: Circumstances) -> _Bitmaps:
        return _judge_bitmaps(self._image.readable, circumstances, counted=self._report.sound)

    @cached_property
    def _leaks(self) -> Leaks:
        """Who asks for a repair wants leaks gone, but not what may be the last copy of data."""
        circumstances = self._circumstances
        noted = circumstances.leaked_before
        leaks = find_leaks(self._image, self._report, self._references, noted)
        if leaks.sign is None or circumstances.reclaim:
            return leaks.all_freed()
        return leaks

    def _marks(self) -> Iterator[RepairFinding]:
        can_be = self._report.sound or self._tables.sound
        if self._image.header.dirty:
            sentence = (
                "it was not closed properly (dirty bit): its refcounts may be stale"
                if self._report.sound
                else "it was not closed properly (dirty bit), and its refcounts are stale"
            )
            yield RepairFinding("dirty-bit", sentence, repairable=can_be)
        if self._image.header.corrupt:
            sentence = "QEMU has marked it corrupt, and does not open it for writing"
            yield RepairFinding("corrupt-bit", sentence, repairable=can_be)

    def _actions_of_marks(self) -> tuple[str, ...]:
        header = self._image.header
        actions = []
        if header.dirty:
            actions.append("clear the dirty bit")
        if header.corrupt:
            actions.append("clear the corrupt bit: its tables are sound")
        return tuple(actions)

    def _wrong_refcounts(self) -> Iterator[RepairFinding]:
        # What is wrong with bitmaps is said of each of them.
        report = check(without_bitmaps(self._image))
        if report.sound:
            return
        for message in report.messages[:_MOST_MESSAGES]:
            yield RepairFinding("wrong-refcounts", message, repairable=True)


def _freed(leaks: Leaks) -> int:
    return leaks.ours + (0 if len(leaks.kept.start) else leaks.count)


def _leak_findings(leaks: Leaks) -> Iterator[RepairFinding]:
    size = leaks.cluster_size
    within = leaks.ours - leaks.hidden
    if within:
        ours = f"{counted(within, 'cluster')} ({within * size} bytes)"
        sentence = f"{ours} still marked as used by a merge that was killed, or by void bitmaps"
        yield RepairFinding("leaked-clusters", sentence, repairable=True)
    if leaks.hidden:
        sentence = f"{counted(leaks.hidden, 'cluster')} behind the end of the file marked as used"
        yield RepairFinding("leaked-clusters", sentence, repairable=True)
    if not leaks.count:
        return
    others = f"{counted(leaks.count, 'leaked cluster')} ({leaks.count * size} bytes)"
    sentence = f"{others}: marked as used, but nothing uses them"
    if leaks.sign is None:
        yield RepairFinding("leaked-clusters", sentence, repairable=True)
        return
    sentence += (
        "; they may be all that is left of the data that a lost L2 table mapped: "
        f"{leaks.sign.clause}"
    )
    if not len(leaks.kept.start):
        yield RepairFinding("leaked-clusters", sentence, repairable=True)
        return
    sentence += "; so they stay; only --reclaim gives the space back, and it destroys them"
    kind = "lost-data" if leaks.sign.is_plain else KEPT_LEAKS
    yield RepairFinding(kind, sentence, repairable=False)


def _doubles(readable: Readable, tables: Tables) -> Iterator[RepairFinding]:
    doubles = count_doubles(readable, tables)
    if doubles:
        sentence = (
            f"{counted(doubles, 'guest cluster')} stored in the same place as another one, which "
            "no internal snapshot explains: the guest reads the same data in both, and the data of "
            "one is lost"
        )
        yield RepairFinding("lost-data", sentence, repairable=False)


def _corruptions(messages: tuple[str, ...]) -> Iterator[RepairFinding]:
    for message in messages[:_MOST_MESSAGES]:
        yield RepairFinding("corruption", message, repairable=False)


def _rebuilding(
    readable: Readable,
    tables: Tables,
    bitmaps: _Bitmaps,
    findings: tuple[RepairFinding, ...],
    actions: tuple[str, ...],
    kept: Runs = NO_RUNS,
) -> Diagnosis:
    stored = tuple(_in_memory(tables, one) for one in bitmaps.kept) + bitmaps.tombstones
    try:
        rewrite = plan_rebuild(readable, tables, stored, kept)
    except Refused as error:
        finding = RepairFinding(error.code, error.sentence, repairable=False)
        return Diagnosis((*findings, finding))
    size = rewrite.allocated.total * rewrite.cluster_size
    rebuild = (
        f"write new refcounts, counted from the tables: {size} bytes; the image must have "
        f"{rewrite.required_size} bytes for that"
    )
    return Diagnosis(
        findings,
        Treatment.REBUILD,
        stored,
        kept=kept,
        actions=(*bitmaps.actions, rebuild, *actions),
        consequences=bitmaps.consequences,
    )


def _in_memory(tables: Tables, bitmap: KeptBitmap) -> StoredBitmap:
    entry = bitmap.entry
    return StoredBitmap(entry.name, read_bits(tables.image, entry), entry.flags)


# Bitmaps


class _Bitmaps(Struct, frozen=True):
    """Which bitmaps an image keeps, and what takes the place of the others."""

    kept: tuple[KeptBitmap, ...] = ()
    tombstones: tuple[StoredBitmap, ...] = ()
    lost: bool = False
    findings: tuple[RepairFinding, ...] = ()
    actions: tuple[str, ...] = ()
    consequences: tuple[str, ...] = ()


def _judge_bitmaps(readable: Readable, circumstances: Circumstances, *, counted: bool) -> _Bitmaps:
    """Judge all bitmaps of an image.

    Args:
        readable: The image; its mapping is sound.
        circumstances: What matters of other images.
        counted: Whether a check has found that the bitmaps contradict nothing.
    """
    image = image_without_refcounts(readable)
    if image.header.bitmaps is None:
        return _Bitmaps()
    try:
        directory = salvage_directory(image)
    except BadBitmapDirectory as error:
        return _all_lost(image, circumstances, error.sentence)
    tables = None if counted else tables_with_bitmaps(readable)
    if tables is not None and _shares_clusters(tables, directory_clusters(image)):
        why = f"{image.name}: the bitmap directory is where something else is"
        return _all_lost(image, circumstances, why)
    broken = dict(directory.lost)
    for entry in directory.entries:
        problem = _problem(image, entry, tables)
        if problem is not None:
            broken[entry.name] = problem
    if circumstances.merge_pending and counted:
        # The merge that will be finished takes care of them.
        broken = {}
    kept = [KeptBitmap(entry) for entry in directory.entries if entry.name not in broken]
    return _some_lost(image, circumstances, broken, tuple(kept))


def _some_lost(
    image: Qcow2Image,
    circumstances: Circumstances,
    broken: Mapping[str, str],
    kept: tuple[KeptBitmap, ...],
) -> _Bitmaps:
    guarded = circumstances.guarded
    size = image.header.virtual_size
    actions, findings, consequences = [], [], []
    for name, problem in sorted(broken.items()):
        findings.append(RepairFinding("broken-bitmap", problem, repairable=True))
        actions.append(
            f"replace the bitmap {name!r} with a tombstone, because an image above has the name"
            if name in guarded
            else f"remove the bitmap {name!r}"
        )
        consequences.append(
            f"the next backup that builds on the checkpoint {name!r} must be a full one"
        )
    marks = [tombstone(name, size, guarded[name]) for name in sorted(broken) if name in guarded]
    return _Bitmaps(
        kept, tuple(marks), bool(broken), tuple(findings), tuple(actions), tuple(consequences)
    )


def _all_lost(image: Qcow2Image, circumstances: Circumstances, problem: str) -> _Bitmaps:
    """No bitmap can be told by its name, so any that an image above has may have been one."""
    guarded = circumstances.guarded
    size = image.header.virtual_size
    finding = RepairFinding("broken-bitmap-directory", problem, repairable=True)
    actions = ["remove all bitmaps: their names can no longer be read"]
    actions += [
        f"leave a tombstone for {name!r}, because an image above has the name"
        for name in sorted(guarded)
    ]
    return _Bitmaps(
        tombstones=tuple(tombstone(name, size, guarded[name]) for name in sorted(guarded)),
        lost=True,
        findings=(finding,),
        actions=tuple(actions),
        consequences=("the next backup of this disk must be a full one, whatever it builds on",),
    )


def _problem(image: Qcow2Image, entry: BitmapEntry, tables: Tables | None) -> str | None:
    """Why a bitmap cannot be relied on; None if it can.

    *tables* has the counts to judge it by, None if a check has found it to contradict nothing.
    """
    name = repr(entry.name)
    if state_of(image, entry) is BitmapState.IN_USE:
        if entry.in_use:
            return (
                f"bitmap {name} is inconsistent (in-use): its writer died before it could store "
                "the bitmap"
            )
        if not image.header.bitmaps_trusted:
            return f"bitmap {name} is void: a program that does not know bitmaps wrote to the image"
        return f"bitmap {name} cannot be used: {entry.unknown or 'its name is not valid'}"
    if tables is None:
        return None
    try:
        read_table(image, entry)
    except FormatError as error:
        return error.sentence
    clusters = clusters_of_bitmap(image, entry)
    if clusters is None or _shares_clusters(tables, clusters):
        return f"bitmap {name} is in clusters that something else uses too"
    return None


def _shares_clusters(tables: Tables, clusters: I64Array) -> bool:
    """Whether any of *clusters* is counted for anything else as well, or is outside the file.

    Where the bitmaps are not trusted they are not counted, and any use of them is another one.
    """
    inside = clusters[clusters < len(tables.counts)]
    own = 1 if tables.image.header.bitmaps_trusted else 0
    return len(inside) < len(clusters) or bool((tables.counts[inside] > own).any())
