# SPDX-License-Identifier: Apache-2.0
"""What a live merge did, as its report says it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.chain.reading import begins_as_qcow2
from chainmerge.documents.bitmaps import BitmapResult
from chainmerge.documents.merge import MergeOutcome, MergeReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.merging.reporting import verified_before
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from chainmerge.documents.plan import MergePlan
    from chainmerge.live.driver import Caller, LiveDriver
    from chainmerge.live.port import InspectedVm
    from chainmerge.records.merged_record import MergedRecord


class LiveOutcome(Struct, frozen=True):
    """What there is to report of a merge that took effect.

    Attributes:
        bitmaps: Base's, as the VM has them.
        verified: What was checked, a sentence each.
        deleted: Files that were deleted.
    """

    bitmaps: tuple[BitmapResult, ...]
    verified: tuple[str, ...]
    deleted: tuple[str, ...]


def report_merged(
    driver: LiveDriver[Any], outcome: LiveOutcome, planned: MergePlan | None
) -> MergeReport:
    """The report of a merge that took effect, and was settled by this run."""
    journal = driver.journal
    verified = list(outcome.verified)
    if journal.is_active and driver.held_seconds:
        verified.append(f"the guest's requests waited {driver.held_seconds * 1000:.0f} ms for it")
    if driver.extensions:
        verified.append(
            f"the volume was extended {counted(driver.extensions, 'time')} while data was copied"
        )
    with FileReadable(journal.result.path) as readable:
        size = end = readable.size
        # Nobody can check the tables of an image that the guest writes to.
        if not journal.is_active and begins_as_qcow2(readable):
            end = check(Qcow2Image(readable)).image_end_offset
    return MergeReport(
        version=REPORT_VERSION,
        outcome=MergeOutcome.MERGED,
        plan=planned,
        bitmaps=outcome.bitmaps,
        bytes_copied=_copied(driver, planned),
        seconds=time.monotonic() - driver.caller.started,
        image_end=end,
        volume_size=size,
        verified=tuple(verified),
        repointed=() if journal.above is None or journal.pulls else (journal.above.path,),
        deleted=outcome.deleted,
        renamed=None,
        warnings=(*(planned.warnings if planned is not None else ()), *driver.warnings),
    )


def _copied(driver: LiveDriver[Any], planned: MergePlan | None) -> int:
    """Guest bytes that moved. The jobs of other than active commits count what they pass over."""
    if driver.journal.pulls and planned is not None:
        return planned.directions.pull.bytes_to_copy
    if driver.journal.is_active or planned is None:
        return driver.copied
    moved = planned.movement
    return moved.data_bytes + moved.zero_bytes + moved.compressed_bytes


def report_done_before(vm: InspectedVm, record: MergedRecord, caller: Caller) -> MergeReport:
    """The report of a merge that an earlier run has settled, and whose result the VM reads."""
    result, graph = Path(record.result), vm.graph()
    node = next((one for one in graph.chain() if graph.path_of(one) == result), None)
    size = result.stat().st_size
    images = (record.top, record.base) if record.pulled is None else (record.base, record.top)
    return MergeReport(
        version=REPORT_VERSION,
        outcome=MergeOutcome.ALREADY_MERGED,
        plan=None,
        bitmaps=node.bitmap_results() if node is not None else (),
        bytes_copied=0,
        seconds=time.monotonic() - caller.started,
        image_end=size,
        volume_size=size,
        verified=(verified_before(*images),),
        repointed=(),
        deleted=(),
        renamed=None,
        warnings=(),
    )
