# SPDX-License-Identifier: Apache-2.0
"""What a merge of several disks would do, and did."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct
from msgspec.structs import force_setattr

from chainmerge.documents.merge import MergeReport
from chainmerge.documents.plan import Finding, MergePlan
from chainmerge.errors import ChainmergeError, ExitCode, OutcomeUnknown


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
        """What happened, according to an error."""
        return cls.UNKNOWN if isinstance(error, OutcomeUnknown) else cls.FAILED


class DiskError(Struct, frozen=True):
    """Why a disk was not merged.

    Attributes:
        code: The error's code, for ``chainmerge explain``.
        message: What is wrong, and what the disk holds now.
        hint: What to do about it.
    """

    code: str
    message: str
    hint: str


class DiskLeftOut(Struct, frozen=True):
    """A disk of a VM that is not merged with the others, although all were asked for.

    Attributes:
        disk: The disk, as the VM calls it.
        reason: Why, in a few words.
    """

    disk: str
    reason: str


class DiskReport(Struct, frozen=True):
    """What became of one of several disks.

    Attributes:
        top: The overlay.
        base: The image that it was to be merged into.
        outcome: ``merged`` and ``already-merged`` (by an earlier run) are verified; ``failed``;
            ``unknown``; ``interrupted``; ``not-begun``.
        report: What the merge did, None if it was not finished.
        error: Why it did not.
    """

    top: str
    base: str
    outcome: DiskOutcome
    report: MergeReport | None = None
    error: DiskError | None = None

    @classmethod
    def of_error(
        cls, top: str, base: str, outcome: DiskOutcome, error: ChainmergeError
    ) -> DiskReport:
        """That of a disk whose merge has ended with an error."""
        return cls(top, base, outcome, None, DiskError(error.code, error.sentence, error.advice))

    @property
    def is_done(self) -> bool:
        """Whether the disk is merged."""
        return self.outcome in (DiskOutcome.MERGED, DiskOutcome.ALREADY_MERGED)


class DisksReport(Struct, frozen=True):
    """What a merge of several disks did.

    Attributes:
        version: Version of this document.
        disks: What became of each, in the order in which they were named.
        left_out: The disks of the VM that were not merged, where all were asked for.
    """

    version: int
    disks: tuple[DiskReport, ...]
    left_out: tuple[DiskLeftOut, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """0 if all are merged; otherwise the worst status of any."""
        outcomes = {disk.outcome for disk in self.disks}
        for outcome, code in (
            (DiskOutcome.UNKNOWN, ExitCode.UNKNOWN),
            (DiskOutcome.FAILED, ExitCode.FAILED),
            (DiskOutcome.INTERRUPTED, ExitCode.INTERRUPTED),
            (DiskOutcome.NOT_BEGUN, ExitCode.INTERRUPTED),
        ):
            if outcome in outcomes:
                return code
        return ExitCode.DONE


class DisksPlan(Struct, frozen=True):
    """What a merge of several disks would do.

    Attributes:
        version: Version of this document.
        disks: The plan of each, in the order in which they were named; space that several take
            from one file system or volume group is counted for all of them together.
        refusals: What keeps the disks from being merged together, besides what is in their plans.
        shared_bytes: That of all disks together.
        freed_bytes: That of all disks together.
        feasible: Whether a merge of all of them would start.
        left_out: The disks of the VM that would not be merged, where all were asked for.
    """

    version: int
    disks: tuple[MergePlan, ...]
    refusals: tuple[Finding, ...]
    shared_bytes: int = 0
    freed_bytes: int = 0
    feasible: bool = True
    left_out: tuple[DiskLeftOut, ...] = ()

    def __post_init__(self) -> None:
        """Have what is said of all disks follow from their plans, in whatever way this was made."""
        force_setattr(self, "shared_bytes", sum(plan.shared_bytes for plan in self.disks))
        force_setattr(self, "freed_bytes", sum(plan.freed_bytes for plan in self.disks))
        all_feasible = not self.refusals and all(plan.feasible for plan in self.disks)
        force_setattr(self, "feasible", all_feasible)
