# SPDX-License-Identifier: Apache-2.0
"""What a merge did, for its report."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from chainmerge.bitmaps.stored import bitmap_results
from chainmerge.documents.merge import MergeOutcome, MergeReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.refcounts import end_of_use
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chainmerge.documents.plan import MergePlan
    from chainmerge.merging.job import Request


def verified_before(source: str, target: str) -> str:
    """What a report says of an image whose data an earlier run moved to another one."""
    return f"an earlier run merged {source} into {target} and verified it"


def build_report(
    request: Request,
    plan_done: MergePlan | None,
    result: Path,
    result_format: str,
    copied: int,
    verified: Sequence[str],
    repointed: Sequence[str],
    deleted: Sequence[str],
    warnings: Sequence[str],
) -> MergeReport:
    already = plan_done is None or plan_done.progress == "merged"
    with FileReadable(result) as readable:
        image = Qcow2Image(readable) if result_format == "qcow2" else None
        return MergeReport(
            version=REPORT_VERSION,
            outcome=MergeOutcome.ALREADY_MERGED if already else MergeOutcome.MERGED,
            plan=plan_done,
            bitmaps=bitmap_results(image) if image is not None else (),
            bytes_copied=copied,
            seconds=time.monotonic() - request.started,
            image_end=end_of_use(image) if image is not None else readable.size,
            volume_size=readable.size,
            verified=tuple(verified),
            repointed=tuple(repointed),
            deleted=tuple(deleted),
            renamed=plan_done.rename if plan_done is not None else None,
            warnings=tuple(warnings),
        )
