# SPDX-License-Identifier: Apache-2.0
"""What a merge did, and how large base must be for one.

The field names are also the keys of the JSON that the commands print, so they are a
stable interface: a field may be added, but none is renamed, removed or changed in
meaning without :data:`~chainmerge.documents.versions.REPORT_VERSION` going up. All sizes and
counts of ``*_bytes`` are in bytes, all times in seconds, and a ``granularity`` is the number of
guest bytes that one bit of a bitmap stands for. That holds for all modules of this package.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from chainmerge.documents.bitmaps import BitmapResult
from chainmerge.documents.plan import MergePlan


class MergeOutcome(StrEnum):
    """How a merge that succeeded came to its end."""

    MERGED = "merged"
    ALREADY_MERGED = "already-merged"


class MergeReport(Struct, frozen=True):
    """What a merge did; returned only when everything requested was verified.

    Attributes:
        version: Version of this document.
        outcome: Whether this run merged, or found that nothing was left to do.
        plan: What was decided before the first write; None if an earlier run had finished all
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
        copy_seconds: What of ``seconds`` it took to move the data, before it was read back and
            compared; 0 if nothing was moved, or that was not measured.
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
    copy_seconds: float = 0.0


class Measurement(Struct, frozen=True):
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
