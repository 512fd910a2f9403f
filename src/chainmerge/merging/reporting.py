# SPDX-License-Identifier: Apache-2.0
"""What a merge did, for its report."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from chainmerge.bitmaps.stored import bitmap_results
from chainmerge.documents.merge import MergeOutcome, MergeReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.refcounts import end_of_use
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from chainmerge.documents.plan import MergePlan


def verified_before(source: str, target: str) -> str:
    """What a report says of an image whose data an earlier run moved to another one."""
    return f"an earlier run merged {source} into {target} and verified it"


def build_report(
    result: Path,
    result_format: str,
    started: float,
    *,
    verified: Iterable[str],
    plan: MergePlan | None = None,
    copied: int = 0,
    copy_seconds: float = 0.0,
    repointed: Iterable[str] = (),
    deleted: Iterable[str] = (),
    renamed: tuple[str, str] | None = None,
    warnings: Iterable[str] = (),
) -> MergeReport:
    """The report of a merge into *result*, which is read once more.

    Args:
        result: the image that holds everything now.
        result_format: its format.
        started: when the merge was begun, by :func:`time.monotonic`.
        verified: as in :class:`~chainmerge.documents.merge.MergeReport`.
        plan: see there; None if an earlier run has merged.
        copied: guest bytes.
        copy_seconds: see there.
        repointed: see there, and so are the others.
        deleted: see there.
        renamed: see there.
        warnings: see there.

    Raises what opening and reading an image raises.
    """
    already = plan is None or plan.progress == "merged"
    with FileReadable(result) as readable:
        image = Qcow2Image(readable) if result_format == "qcow2" else None
        return MergeReport(
            version=REPORT_VERSION,
            outcome=MergeOutcome.ALREADY_MERGED if already else MergeOutcome.MERGED,
            plan=plan,
            bitmaps=bitmap_results(image) if image is not None else (),
            bytes_copied=copied,
            seconds=time.monotonic() - started,
            image_end=readable.size if image is None else _end_of(image),
            volume_size=readable.size,
            verified=tuple(verified),
            repointed=tuple(repointed),
            deleted=tuple(deleted),
            renamed=renamed,
            warnings=tuple(warnings),
            copy_seconds=copy_seconds,
        )


def _end_of(image: Qcow2Image) -> int:
    """Where the image ends; that of its file if its refcounts cannot be read."""
    try:
        return end_of_use(image)
    except FormatError:
        # Somebody may have damaged it since an earlier run has merged and verified it.
        return image.readable.size
