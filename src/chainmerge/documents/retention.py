# SPDX-License-Identifier: Apache-2.0
"""Which snapshots of a chain go and which stay, and what became of those that were to go."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import force_setattr

from chainmerge.documents.disks import DiskReport, DisksReport
from chainmerge.documents.plan import Finding, MergePlan

if TYPE_CHECKING:
    from chainmerge.errors import ExitCode


class RetentionRule(StrEnum):
    """What decided about a snapshot."""

    NO_RULE = "no-rule"
    """Nothing keeps it: it goes."""
    KEEP_LAST = "keep-last"
    KEEP_WITHIN = "keep-within"
    KEEP = "keep"
    KEEP_CHECKPOINTS = "keep-checkpoints"
    AGE_UNKNOWN = "age-unknown"
    OTHER_BRANCH = "other-branch"
    IN_USE = "in-use"
    BITMAPS = "bitmaps"
    NOT_REMOVABLE = "not-removable"


class SnapshotFate(Struct, frozen=True):
    """What becomes of a snapshot: of what the guest's disk was when the next image was made.

    Attributes:
        image: The path of its image.
        written_at: When its data was last written, in seconds since 1970 (UTC); where a later merge
            has changed that, when the next image above was. None if nothing tells.
        occupied_bytes: What the file takes of its file system, or a logical volume of its volume
            group; None for another device.
        stays: Whether it stays.
        rule: What decided: ``keep-last``, ``keep-within``, ``keep``, ``keep-checkpoints``; whatever
            the rules are, ``other-branch``, ``in-use``, ``bitmaps``, ``not-removable`` keep it, and
            ``age-unknown`` where a rule asks for its age. It goes by ``no-rule``.
        reason: The same, in words.
    """

    image: str
    written_at: int | None
    occupied_bytes: int | None
    stays: bool
    rule: RetentionRule
    reason: str


class ThinOutPlan(Struct, frozen=True):
    """What thinning out the snapshots of a chain would do.

    Attributes:
        version: Version of this document.
        leaf: The uppermost image of the chain, which keeps its name and shows the same.
        decided_at: The time by which ages were judged, in seconds since 1970 (UTC).
        snapshots: What becomes of each, the lowest first.
        ranges: The plans of the merges that take away those that go, in the order in which they
            are done. Each is one pass; its result shows what its top shows, and has its name.
        refusals: What keeps all of it from being done, what is in the plans included.
        bytes_to_copy: Bytes that all of them copy; what file systems share is left out.
        freed_bytes: What file systems and volume groups get back.
        feasible: Whether it would start.
    """

    version: int
    leaf: str
    decided_at: int
    snapshots: tuple[SnapshotFate, ...]
    ranges: tuple[MergePlan, ...]
    refusals: tuple[Finding, ...]
    bytes_to_copy: int = 0
    freed_bytes: int = 0
    feasible: bool = True

    def __post_init__(self) -> None:
        """Have what is said of all ranges follow from their plans."""
        force_setattr(self, "bytes_to_copy", sum(plan.bytes_copied for plan in self.ranges))
        force_setattr(self, "freed_bytes", sum(plan.freed_bytes for plan in self.ranges))
        force_setattr(self, "feasible", not self.refusals)


class ThinOutReport(Struct, frozen=True):
    """What thinning out the snapshots of a chain did.

    Attributes:
        version: Version of this document.
        leaf: The uppermost image of the chain.
        decided_at: The time by which ages were judged, in seconds since 1970 (UTC).
        snapshots: What was decided on each, the lowest first; by an interrupted run, if this one
            has finished that.
        ranges: What became of each merge, in the order in which they are done.
    """

    version: int
    leaf: str
    decided_at: int
    snapshots: tuple[SnapshotFate, ...]
    ranges: tuple[DiskReport, ...]

    @property
    def exit_code(self) -> ExitCode:
        """0 if everything that was to go is gone; otherwise the worst status of any merge."""
        return DisksReport(self.version, self.ranges).exit_code
