# SPDX-License-Identifier: Apache-2.0
"""Carries out a merge that was decided upon."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from chainmerge.chain.opening import open_target
from chainmerge.chain.reading import open_for_writing
from chainmerge.documents.plan import EngineName
from chainmerge.documents.progress import Stage
from chainmerge.engines.metadata.errors import (
    BackingNameUnfit,
    BitmapSetUnfit,
    HeaderFull,
    NotEnoughSpace,
    RefcountTableFull,
)
from chainmerge.engines.metadata.snapshot_removal import remove_snapshots
from chainmerge.errors import Refused
from chainmerge.merging.bitmaps_only import merge_bitmaps
from chainmerge.merging.concluding import conclude
from chainmerge.merging.deciding import decided_job, find_same_target
from chainmerge.merging.errors import MergeUnfinished
from chainmerge.merging.extending import extended
from chainmerge.merging.job import Job, Merged, reclaim, unfinished_where_refused
from chainmerge.merging.resuming import ToBeMerged
from chainmerge.planning.aftermath import snapshots_to_remove
from chainmerge.records.files import StateDirectoryUnusable
from chainmerge.records.remains import read_remains
from chainmerge.storage.volume_errors import CannotGrow, ExtensionRefused
from chainmerge.storage.volume_facts import VolumeKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainmerge.chain.model import ImageInfo
    from chainmerge.documents.merge import MergeReport

_REFUSED_IN_TIME: Final = (
    CannotGrow,
    ExtensionRefused,
    NotEnoughSpace,
    HeaderFull,
    RefcountTableFull,
    BitmapSetUnfit,
    BackingNameUnfit,
    StateDirectoryUnusable,
)
"""What the engines find out before they write, or while what they wrote can be given back."""


def execute(job: Job) -> MergeReport:
    """Do everything that was decided on."""
    removed = snapshots_to_remove(job.facts, job.request.options)
    if not removed:
        return _hide_and_merge(job)
    _remove_snapshots(job, removed)
    with unfinished_where_refused(job), contextlib.ExitStack() as stack:
        return _hide_and_merge(_decided_again(stack, job))


def _hide_and_merge(job: Job) -> MergeReport:
    """Merge and settle, once nothing can show that must not."""
    if job.plan.hides is None:
        return _merge_and_settle(job)
    # Imported where it is used: few overlays are larger than what is below them.
    from chainmerge.merging.hiding import hide  # noqa: PLC0415

    job.request.announce(Stage.HIDE)
    hide(job)
    with unfinished_where_refused(job), contextlib.ExitStack() as stack:
        return _merge_and_settle(_decided_again(stack, job))


def _decided_again(stack: contextlib.ExitStack, job: Job) -> Job:
    """The same merge once images of the chain were changed before it.

    Tables of theirs lie elsewhere now, clusters that were shared are not, and what moves is
    another.
    """
    target = find_same_target(job.target, job.request)
    opened = stack.enter_context(open_target(target, job.locks))
    remains = read_remains(target.base.real_path, target.chain.top.real_path)
    ending = ToBeMerged((), job.facts.end_before)
    again = decided_job(job.request, target, opened, job.locks, remains, ending)
    plan = job.plan
    said = replace(again.plan, snapshots=plan.snapshots, hides=plan.hides, warnings=plan.warnings)
    return replace(again, plan=said)


def _remove_snapshots(job: Job, removed: Sequence[tuple[ImageInfo, frozenset[int]]]) -> None:
    """Take snapshots out of their images, before anything changes what they show."""
    job.request.announce(Stage.SNAPSHOTS)
    # A file's new clusters are reserved one by one.
    grows = job.facts.volume.kind is not VolumeKind.FILE and any(
        image.identity == job.result.identity for image, _ in removed
    )
    with extended(job) if grows else contextlib.nullcontext():
        for number, (image, positions) in enumerate(removed):
            refused = unfinished_where_refused(job) if number else contextlib.nullcontext()
            with refused, open_for_writing(image) as port:
                remove_snapshots(port, positions)


def _merge_and_settle(job: Job) -> MergeReport:
    """Merge and settle; what refuses that when something has changed is no refusal."""
    try:
        merged = _do(job)
    except _REFUSED_IN_TIME:
        raise
    except Refused as error:
        raise MergeUnfinished(str(job.facts.top.path), error.sentence) from error
    try:
        return conclude(job, merged)
    except Refused as error:
        raise MergeUnfinished(str(job.facts.top.path), error.sentence) from error


def _do(job: Job) -> Merged:
    if job.facts.merged:
        reclaim(job)
        return Merged(0, ("base already holds all of top's data and bitmaps",))
    if job.facts.content_merged and job.base.supports_bitmaps:
        verified = merge_bitmaps(job)
        if verified is not None:
            return Merged(0, verified)
    return _writer(job.plan.engine)(job)


def _writer(engine: EngineName) -> Callable[[Job], Merged]:
    """The engine, the only one imported: importing QEMU's takes as long as a small merge."""
    if engine is EngineName.NATIVE:
        from chainmerge.merging.by_native import merge_natively  # noqa: PLC0415

        return merge_natively
    from chainmerge.merging.by_qemu import merge_by_qemu  # noqa: PLC0415

    return merge_by_qemu
