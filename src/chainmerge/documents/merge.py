# SPDX-License-Identifier: Apache-2.0
"""What the public functions of :mod:`chainmerge` return and report.

The field names are also the keys of the JSON that the commands print, so they are a
stable interface: a field may be added, but none is renamed, removed or changed in
meaning without :data:`REPORT_VERSION` going up. All sizes and counts of ``*_bytes``
are in bytes, all times in seconds, and a ``granularity`` is the number of guest bytes
that one bit of a bitmap stands for. What a caller passes in is in
:mod:`chainmerge.options`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from chainmerge.chain import Searched
from chainmerge.errors import ChainmergeError, ExitCode, OutcomeUnknown
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.plan import Finding, MergePlan

__all__ = [
    "REPORT_VERSION",
    "Access",
    "BackingCandidate",
    "BackingReport",
    "BitmapChange",
    "BitmapListing",
    "BitmapResult",
    "BitmapRow",
    "BitmapVerdict",
    "ChainReport",
    "CheckResult",
    "DiskError",
    "DiskOutcome",
    "DiskReport",
    "DisksPlan",
    "DisksReport",
    "ImageReport",
    "LiveMergeStatus",
    "LiveStatusReport",
    "Measurement",
    "MergeOptions",
    "MergeOutcome",
    "MergePlan",
    "MergeReport",
    "ProgressEvent",
    "PruneReport",
    "PrunedBitmap",
    "RelinkReport",
    "RepairFinding",
    "RepairReport",
    "Stage",
    "StatusReport",
    "UndoReport",
    "UnfinishedMerge",
]

REPORT_VERSION = 1
UNUSABLE_BITMAP = "unusable-bitmap"
KEPT_LEAKS = "kept-leaks"
NO_DAMAGE = frozenset({UNUSABLE_BITMAP, KEPT_LEAKS})
"""The kind of a finding that is no damage: a bitmap that no chain can use."""


class Stage(StrEnum):
    """What a merge is doing, in the order in which it happens."""

    LOCK = "lock"
    PLAN = "plan"
    SNAPSHOTS = "snapshots"
    HIDE = "hide"
    PRUNE = "prune"
    EXTEND = "extend"
    COPY = "copy"
    BITMAPS = "bitmaps"
    VERIFY = "verify"
    SETTLE = "settle"


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far a stage has come.

    Attributes:
        stage: What is going on.
        done: Bytes dealt with so far.
        total: Bytes to deal with; 0 for a stage without a measure.
        rate: Bytes a second that were dealt with lately; 0 where nobody measures it. In a running
            VM *total* can grow, so that *done* and *total* alone say little of what remains.
        top: The overlay that is merged, where several disks are; else empty.
    """

    stage: Stage
    done: int = 0
    total: int = 0
    rate: int = 0
    top: str = ""


@dataclass(frozen=True, slots=True)
class BitmapResult:
    """A bitmap of base as it was read back from the closed image.

    Attributes:
        name: The bitmap's name.
        state: ``valid``, ``disabled`` or ``in-use``.
        granularity: Guest bytes that one bit stands for.
        dirty_bytes: Guest bytes that are marked dirty, None where the content is worthless, and
            where it is in the memory of a VM that does not tell.
        tombstone: Whether the name only keeps images above from passing the chain test.
    """

    name: str
    state: str
    granularity: int
    dirty_bytes: int | None
    tombstone: bool = False


class MergeOutcome(StrEnum):
    """How a merge that succeeded came to its end."""

    MERGED = "merged"
    ALREADY_MERGED = "already-merged"


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did; returned only when everything that was asked for was verified.

    Attributes:
        version: Version of this document.
        outcome: Whether this run merged, or found that nothing was left to do.
        plan: What was decided before the first write; None where an earlier run had finished all
            but the deletions.
        bitmaps: Base's bitmaps, re-read from the closed image.
        bytes_copied: Guest bytes that the engine moved into base.
        seconds: Wall-clock time from taking the locks to releasing them.
        image_end: End of the last cluster of base in use, in bytes.
        volume_size: Size of the file or device that holds base, in bytes.
        verified: What was checked, a sentence each.
        repointed: Images whose backing file is now base.
        deleted: Files that were deleted.
        renamed: Base's old and new path, where it was given top's name.
        warnings: What the user should know, a sentence each.
    """

    version: int
    outcome: MergeOutcome
    plan: MergePlan | None
    bitmaps: tuple[BitmapResult, ...]
    bytes_copied: int
    seconds: float
    image_end: int
    volume_size: int
    verified: tuple[str, ...]
    repointed: tuple[str, ...]
    deleted: tuple[str, ...]
    renamed: tuple[str, str] | None
    warnings: tuple[str, ...]


class DiskOutcome(StrEnum):
    """What became of one of several disks."""

    MERGED = "merged"
    ALREADY_MERGED = "already-merged"
    FAILED = "failed"
    UNKNOWN = "unknown"
    INTERRUPTED = "interrupted"
    NOT_BEGUN = "not-begun"

    @classmethod
    def of(cls, error: ChainmergeError) -> DiskOutcome:
        """What an error leaves."""
        return cls.UNKNOWN if isinstance(error, OutcomeUnknown) else cls.FAILED


@dataclass(frozen=True, slots=True)
class DiskError:
    """Why a disk was not merged.

    Attributes:
        code: The error's code, for ``chainmerge explain``.
        message: What is wrong, and what the disk holds now.
        hint: What to do about it.
    """

    code: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class DiskReport:
    """What became of one of several disks.

    Attributes:
        top: The overlay.
        base: The image that it was to be merged into.
        outcome: ``merged`` and ``already-merged`` (by an earlier run) are verified; ``failed``;
            ``unknown``; ``interrupted``; ``not-begun``.
        report: What the merge did, None where it did not come to its end.
        error: Why it did not.
    """

    top: str
    base: str
    outcome: DiskOutcome
    report: MergeReport | None = None
    error: DiskError | None = None

    @property
    def is_done(self) -> bool:
        """Whether the disk is merged."""
        return self.outcome in (DiskOutcome.MERGED, DiskOutcome.ALREADY_MERGED)


@dataclass(frozen=True, slots=True)
class DisksReport:
    """What a merge of several disks did.

    Attributes:
        version: Version of this document.
        disks: What became of each, in the order in which they were named.
    """

    version: int
    disks: tuple[DiskReport, ...]

    @property
    def exit_code(self) -> ExitCode:
        """0 if all are merged; else that of the worst that happened to any."""
        outcomes = {disk.outcome for disk in self.disks}
        for outcome, code in (
            (DiskOutcome.UNKNOWN, ExitCode.UNKNOWN),
            (DiskOutcome.FAILED, ExitCode.FAILED),
            (DiskOutcome.INTERRUPTED, ExitCode.INTERRUPTED),
        ):
            if outcome in outcomes:
                return code
        return ExitCode.DONE


@dataclass(frozen=True, slots=True)
class DisksPlan:
    """What a merge of several disks would do.

    Attributes:
        version: Version of this document.
        disks: The plan of each, in the order in which they were named; space that several take
            from one file system or volume group is counted for all of them together.
        refusals: What keeps the disks from being merged together, besides what is in their plans.
    """

    version: int
    disks: tuple[MergePlan, ...]
    refusals: tuple[Finding, ...]

    @property
    def feasible(self) -> bool:
        """Whether a merge of all of them would start."""
        return not self.refusals and all(plan.feasible for plan in self.disks)


@dataclass(frozen=True, slots=True)
class ImageReport:
    """One image, as ``chainmerge info`` shows it.

    Attributes:
        path: The image's path.
        format: Its format.
        format_declared: Whether somebody said so: the caller, or the image above it.
        in_chain: Whether it is the image asked about or lies below it; else it is a
            sibling or a child.
        parent: The path of its backing file, None for a root.
        virtual_size: Size of the guest's disk in bytes.
        file_size: Size of the file or device in bytes.
        allocated_bytes: Guest bytes that the image itself defines, None where unknown.
        cluster_size: In bytes, None for formats without clusters.
        details: What else there is to say by name, e.g. ``compression`` or ``subclusters``.
        bitmaps: Number of bitmaps stored in it.
        snapshots: Number of internal snapshots.
        notes: What is out of the ordinary, a sentence each.
    """

    path: str
    format: str
    format_declared: bool
    in_chain: bool
    parent: str | None
    virtual_size: int
    file_size: int
    allocated_bytes: int | None
    cluster_size: int | None
    details: dict[str, str]
    bitmaps: int
    snapshots: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChainReport:
    """An image, what lies below it and what else was found to use the same images.

    Attributes:
        version: Version of this document.
        image: The image asked about.
        images: The chain from its root up, then siblings and children.
        warnings: What the user should know, a sentence each.
        searched: Where siblings and children were looked for.
    """

    version: int
    image: str
    images: tuple[ImageReport, ...]
    warnings: tuple[str, ...]
    searched: Searched


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a consistency check of one image found.

    Attributes:
        version: Version of this document.
        image: The image's path.
        corruptions: Number of places where the image contradicts itself.
        leaks: Number of clusters marked used that nothing uses.
        messages: The findings, a sentence each; at most the first 100.
        image_end_offset: End of the last cluster in use, in bytes.
        remarks: What else is wrong, a sentence each: marks of a writer that died, bitmaps that
            are in-use, merges that did not come to their end.
    """

    version: int
    image: str
    corruptions: int
    leaks: int
    messages: tuple[str, ...]
    image_end_offset: int
    remarks: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing at all is wrong with the image."""
        return self.corruptions == 0 and self.leaks == 0 and not self.remarks


@dataclass(frozen=True, slots=True)
class Measurement:
    """How large base must be, in bytes.

    Attributes:
        version: Version of this document.
        base: The image merged into.
        top: The image merged.
        required: What the merge needs at its peak.
        optimal: What the merged image needs once it is done.
        image_end: End of base's last cluster in use today.
        volume_size: Size of the file or device that holds base today.
        breakdown: What ``required`` consists of, by name.
    """

    version: int
    base: str
    top: str
    required: int
    optimal: int
    image_end: int
    volume_size: int
    breakdown: dict[str, int]


@dataclass(frozen=True, slots=True)
class BitmapRow:
    """One bitmap in one image.

    Attributes:
        image: The path of the image that holds it.
        name: The bitmap's name.
        state: ``valid``, ``disabled`` or ``in-use``.
        granularity: Guest bytes that one bit stands for.
        dirty_bytes: Guest bytes marked dirty, None where the content is worthless.
        tombstone: Whether the name only keeps images above from passing the chain test.
    """

    image: str
    name: str
    state: str
    granularity: int
    dirty_bytes: int | None
    tombstone: bool


@dataclass(frozen=True, slots=True)
class BitmapVerdict:
    """Whether a checkpoint can still serve a backup read from the chain's top end.

    Attributes:
        name: The bitmap's name.
        passes: Whether it passes the chain test.
        reason: Why, in words.
    """

    name: str
    passes: bool
    reason: str


@dataclass(frozen=True, slots=True)
class BitmapListing:
    """Every bitmap of a chain, top end first, and the verdict on every name."""

    version: int
    image: str
    rows: tuple[BitmapRow, ...]
    verdicts: tuple[BitmapVerdict, ...]


@dataclass(frozen=True, slots=True)
class BitmapChange:
    """What ``bitmaps add``, ``remove``, ``clear`` or ``merge`` changed in one image.

    Attributes:
        version: Version of this document.
        image: The image's path.
        action: ``add``, ``remove``, ``clear`` or ``merge``.
        names: The bitmaps that were added, removed or written to.
        bitmaps: The image's bitmaps afterwards, re-read from the closed image.
        warnings: What the user should know, a sentence each.
    """

    version: int
    image: str
    action: str
    names: tuple[str, ...]
    bitmaps: tuple[BitmapResult, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PrunedBitmap:
    """A bitmap that was removed from an image, or replaced by a tombstone, and why."""

    image: str
    name: str
    state: str
    tombstone: bool
    reason: str


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What ``bitmaps prune`` did.

    Attributes:
        version: Version of this document.
        base: The lowest image that was looked at.
        top: The highest image that was looked at.
        removed: What was removed or replaced by a tombstone, in the order of removal.
        kept: Names that were left as they are.
        tombstones: Names of which a tombstone is left, because an image above has them.
    """

    version: int
    base: str
    top: str
    removed: tuple[PrunedBitmap, ...]
    kept: tuple[str, ...]
    tombstones: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RepairFinding:
    """Something wrong with an image.

    Attributes:
        kind: ``broken-bitmap``, ``broken-bitmap-directory``, ``unusable-bitmap``,
            ``leaked-clusters``, ``kept-leaks``, ``wrong-refcounts``, ``dirty-bit``,
            ``corrupt-bit``, ``interrupted-merge``, ``half-done-commit``, ``corruption``,
            ``lost-data``, or the code of the error that keeps the image from being used or
            repaired.
        sentence: What is wrong.
        repairable: Whether ``repair`` does something about it.
    """

    kind: str
    sentence: str
    repairable: bool


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What ``repair`` found and did.

    Attributes:
        version: Version of this document.
        image: The image's path.
        dry_run: Whether nothing was written.
        findings: What was wrong.
        actions: What was done about it (with ``dry_run``: what would be), a sentence each.
        consequences: What it means for backups, a sentence each.
        backup: The file that ``repair --undo`` takes to put back what was overwritten, None where
            nothing was. Merges that were finished cannot be undone.
        verified: What was checked afterwards, a sentence each.
        warnings: What the user should know, a sentence each.
    """

    version: int
    image: str
    dry_run: bool
    findings: tuple[RepairFinding, ...]
    actions: tuple[str, ...]
    consequences: tuple[str, ...]
    backup: str | None = None
    verified: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def leaves_damage(self) -> bool:
        """Whether something is wrong that is not repaired here."""
        return any(
            not finding.repairable and finding.kind not in NO_DAMAGE for finding in self.findings
        )


@dataclass(frozen=True, slots=True)
class UndoReport:
    """What ``repair --undo`` put back.

    Attributes:
        version: Version of this document.
        image: The image's path.
        backup: The file that held what was overwritten.
        restored_bytes: How many bytes were put back.
    """

    version: int
    image: str
    backup: str
    restored_bytes: int


@dataclass(frozen=True, slots=True)
class BackingCandidate:
    """A file that could be a lost backing file.

    Attributes:
        path: Where it is.
        format: What it would be read as.
        reasons: What speaks for it, the strongest first.
    """

    path: str
    format: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BackingReport:
    """What an image names as its backing file.

    Attributes:
        version: Version of this document.
        image: The image's path.
        backing: The name in its header, None for none.
        backing_format: The format that its header declares, None where it does not.
        problem: Why the image's chain cannot be read, None where it can.
        candidates: Where it cannot: files that could be the backing file, the likeliest first.
    """

    version: int
    image: str
    backing: str | None
    backing_format: str | None
    problem: str | None
    candidates: tuple[BackingCandidate, ...]


@dataclass(frozen=True, slots=True)
class RelinkReport:
    """An image that has been given another backing file.

    Attributes:
        version: Version of this document.
        image: The image's path.
        old_backing: The name that its header held, None for none.
        backing: The name that it holds now, None for none.
        backing_format: The format that its header declares for it now.
        verified: What was compared, a sentence each; empty where nothing was.
        warnings: What the user should know, a sentence each.
    """

    version: int
    image: str
    old_backing: str | None
    backing: str | None
    backing_format: str | None
    verified: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UnfinishedMerge:
    """A merge that did not come to its end, as far as the files that it left say.

    Attributes:
        base: The image merged into.
        top: The uppermost image that is merged, None where no file names it.
        state: The journal's last entry (``prepared``, ``switching``, ``switched``, ``repoint``,
            ``record``, ``rename``, ``delete``, ``tidy``, ``give-back``; of a live merge
            ``preparing``, ``copying``, ``switching``, ``settling``, ``undoing``), ``unknown`` where
            there is no journal that can be used.
        progress: How far it came, in a sentence.
        base_holds_data: Whether base holds the data of all merged images already, None where only
            a look at all of it could tell.
        base_is_locked: Whether somebody has base open now: perhaps this merge still runs.
        command: What finishes it, for a shell; None where no file says what was asked for. Of a
            live merge it is what carries it on in the VM if somebody has base open, else what
            finishes it without the VM; the other one is in ``warnings``.
        files: The files that tell of it.
        warnings: What the user should know, a sentence each.
        disks: The tops of all disks that are merged together, where it is one of several.
    """

    base: str
    top: str | None
    state: str
    progress: str
    base_holds_data: bool | None
    base_is_locked: bool
    command: str | None
    files: tuple[str, ...]
    warnings: tuple[str, ...]
    disks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StatusReport:
    """Merges that did not come to their end.

    Attributes:
        version: Version of this document.
        searched: The directories that were looked at. Those that were asked for were searched
            with everything below, links left out.
        merges: What was found, in the order of base's path.
        not_searched: What below them was not looked at, and why, a sentence each.
    """

    version: int
    searched: tuple[str, ...]
    merges: tuple[UnfinishedMerge, ...]
    not_searched: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LiveMergeStatus:
    """A live merge that did not come to its end.

    Attributes:
        base: The image merged into.
        top: The uppermost image that is merged.
        active: Whether top is, or was, what the guest writes to.
        state: The journal's last entry (``preparing``, ``copying``, ``switching``, ``settling``,
            ``undoing``).
        job: Where the VM's job is (``running``, ``paused``, ``ready``, ``held``, ``ending``,
            ``done``), None where there is none.
        bytes_done: Guest bytes that the job has copied.
        bytes_total: Guest bytes that it is to copy, as far as it is known.
        merged: Whether the VM's chain lacks the merged images already.
        guest_waits: Whether the guest's requests wait for the merge to be carried on.
        error: Why the job failed, None where it did not.
        command: What carries the merge on, for a shell.
    """

    base: str
    top: str
    active: bool
    state: str
    job: str | None
    bytes_done: int
    bytes_total: int
    merged: bool
    guest_waits: bool
    error: str | None
    command: str


@dataclass(frozen=True, slots=True)
class LiveStatusReport:
    """Live merges of one disk that did not come to their end.

    Attributes:
        version: Version of this document.
        vm: The VM, as messages call it.
        chain: The images of the disk, the active one first.
        merges: What was found.
    """

    version: int
    vm: str
    chain: tuple[str, ...]
    merges: tuple[LiveMergeStatus, ...]
