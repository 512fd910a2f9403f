# SPDX-License-Identifier: Apache-2.0
"""Thins out the snapshots of a chain: several merges as one operation.

Everything is planned, and each merge prepared once under its locks, before the first image is
written to, so that what would refuse one refuses all. Then one range after the other is merged, the
uppermost first. Each merge holds by itself: it changes nothing that a view which stays shows. One
record names all of them, and the same call does the rest.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.chain.discovery import discover
from chainmerge.chain.target import policy_of
from chainmerge.documents.disks import DiskError, DiskOutcome, DiskReport
from chainmerge.documents.progress import never, unheard
from chainmerge.documents.retention import ThinOutReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.errors import ChainmergeError, Interrupted, Refused
from chainmerge.inventory.errors import ThinningOutdated, ThinningUnfinished
from chainmerge.inventory.thinning import (
    chain_access,
    options_of_range,
    plan_chain,
    range_options,
)
from chainmerge.merging.job import Request
from chainmerge.merging.merge import merge_requested
from chainmerge.merging.preparing import prepare, require_no_others
from chainmerge.merging.rates import RatesFilled
from chainmerge.records.identity import identify, may_be_same
from chainmerge.records.live_journal import LIVE_JOURNAL
from chainmerge.records.merge_journal import MERGE_JOURNAL
from chainmerge.records.merged_record import load_merged_record
from chainmerge.records.request import recorded_thinning
from chainmerge.records.saved_bitmaps import SAVED_BITMAPS
from chainmerge.records.thinning import (
    ThinnedRange,
    Thinning,
    forget_thinning,
    keep_thinning,
    load_thinning,
)
from chainmerge.storage.errors import system_errors_as_ours

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.progress import OnProgress, ProgressEvent, ShouldStop
    from chainmerge.inventory.thinning import PlannedThinning
    from chainmerge.options import Access, MergeOptions, Retention, Seconds


def thin_out(
    leaf: str | Path,
    retention: Retention,
    access: Access | None = None,
    options: MergeOptions | None = None,
    now: Seconds | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> ThinOutReport:
    """Merge away the snapshots below *leaf* that no rule keeps, and verify the results.

    What the leaf shows stays, and so does what every snapshot shows that stays, with their names
    and with every checkpoint that backups can use. A run that was interrupted, in whatever way, is
    finished by the same call, which decides nothing anew.

    Args:
        leaf: the uppermost image of the chain.
        retention: what keeps a snapshot.
        access: how images may be found and reached.
        options: how to merge; the merged images are always deleted, and names are kept.
        now: by what ages are judged, in seconds since 1970; None for the time of the call.
        on_progress: called as the work goes on; its events name the top of the range.
        should_stop: asked as the work goes on; it stops soon after it says yes.

    Returns: What was decided, and what became of each merge, failures included.

    Raises:
        NotLeaf: an image stands on *leaf*.
        NoSnapshotMatches: patterns alone say what stays, and none of them matches.
        ThinningUnfinished: an interrupted run with other rules is to be finished first.
        ThinningOutdated: images are others than those that an interrupted run has decided on.
        UnfinishedMergeBelow: an interrupted merge of the chain is to be finished first.
        Refused: nothing was changed.
        Interrupted: *should_stop* said yes before anything was changed.
    """
    access, options = chain_access(leaf, access), range_options(options)
    report, stop = on_progress or unheard, should_stop or never
    thinning = load_thinning(Path(leaf))
    if thinning is None:
        planned = plan_chain(Path(leaf), retention, access, options, now)
        if not planned.spans:
            document = planned.document
            decided_at, snapshots = document.decided_at, document.snapshots
            return ThinOutReport(REPORT_VERSION, document.leaf, decided_at, snapshots, ())
        _require_all(planned, access, options, report, stop)
        thinning = _begun(planned, retention, access, options)
    elif (
        recorded_thinning(leaf, retention, access, options).retention != thinning.request.retention
    ):
        raise ThinningUnfinished(thinning.leaf, thinning.command or "chainmerge thin-out ...")
    else:
        _require_as_decided(thinning, access)
    ranges = tuple(_carry_out(Path(leaf), thinning, access, options, report, stop))
    if all(one.is_done for one in ranges):
        forget_thinning(Path(leaf))
    snapshots = tuple(thinning.snapshots)
    return ThinOutReport(REPORT_VERSION, thinning.leaf, thinning.decided_at, snapshots, ranges)


def _require_all(
    planned: PlannedThinning,
    access: Access,
    options: MergeOptions,
    report: OnProgress,
    stop: ShouldStop,
) -> None:
    """Raise what would refuse any of the merges, while nothing is changed."""
    if len(planned.spans) == 1:
        # The merge itself is refused, if it is, before it changes anything.
        return
    for span, claims in zip(planned.spans, planned.claims, strict=True):
        base, top = planned.chain.images[span.base].path, planned.chain.images[span.top].path
        request = Request(
            top=top,
            base=base,
            access=access,
            options=options_of_range(planned.chain, span, options),
            report=_of_range(report, str(top)),
            should_stop=stop,
            started=time.monotonic(),
            claims=claims,
        )
        with contextlib.ExitStack() as stack:
            require_no_others(prepare(stack, [request]))


def _require_as_decided(thinning: Thinning, access: Access) -> None:
    """Make sure that nothing is merged of which nothing was decided.

    Raises ThinningOutdated, and what following the chain raises.
    """
    for one in thinning.pending:
        if one.images and _has_not_begun(one) and not _are_as_decided(one, access):
            raise ThinningOutdated(one.base, one.top, thinning.leaf)


def _are_as_decided(one: ThinnedRange, access: Access) -> bool:
    top = Path(one.top)
    images = discover(top, policy_of(access, top, one.base)).images
    now = [identify(image.real_path) for image in images[-len(one.images) :]]
    return len(now) == len(one.images) and all(map(may_be_same, now, one.images))


def _begun(
    planned: PlannedThinning, retention: Retention, access: Access, options: MergeOptions
) -> Thinning:
    """Record all that is to be done, durably."""
    leaf = planned.chain.top
    thinning = Thinning(
        leaf=str(leaf.real_path),
        identity=identify(leaf.real_path),
        decided_at=planned.document.decided_at,
        snapshots=list(planned.document.snapshots),
        ranges=[
            ThinnedRange(
                base=str(planned.chain.images[span.base].path),
                top=str(planned.chain.images[span.top].path),
                base_identity=identify(planned.chain.images[span.base].real_path),
                top_identity=identify(planned.chain.images[span.top].real_path),
                direction=options_of_range(planned.chain, span, options).direction,
                images=[
                    identify(image.real_path)
                    for image in planned.chain.images[span.base : span.top + 1]
                ],
            )
            for span in planned.spans
        ],
        # What thinning out always adds is not said again.
        request=recorded_thinning(
            leaf.path,
            retention,
            replace(access, active=None),
            replace(options, delete=False, keep_name=False),
        ),
    )
    keep_thinning(leaf.path, thinning)
    return thinning


def _carry_out(
    leaf: Path,
    thinning: Thinning,
    access: Access,
    options: MergeOptions,
    report: OnProgress,
    stop: ShouldStop,
) -> Iterator[DiskReport]:
    """Merge one range after the other. After one that fails none is begun: it may tell why.

    Raises what the first merge raises, where it has changed nothing.
    """
    changed = stopped = False
    for one in thinning.ranges:
        if one.done or stopped:
            without = DiskOutcome.ALREADY_MERGED if one.done else DiskOutcome.NOT_BEGUN
            yield DiskReport(one.top, one.base, without)
            continue
        try:
            outcome = _merged(one, access, options, _of_range(report, one.top), stop)
        except (Refused, Interrupted) as error:
            if not changed and _has_not_begun(one):
                # Where some are done already, the others are still to be done.
                if len(thinning.pending) == len(thinning.ranges):
                    forget_thinning(leaf)
                raise
            yield _failed(one, error)
            stopped = True
        except ChainmergeError as error:
            yield _failed(one, error)
            stopped = True
        else:
            changed = True
            thinning = thinning.with_done(one)
            # If it cannot be noted, a rerun finds out.
            with contextlib.suppress(ChainmergeError):
                keep_thinning(leaf, thinning)
            yield outcome


def _merged(
    one: ThinnedRange,
    access: Access,
    options: MergeOptions,
    report: OnProgress,
    stop: ShouldStop,
) -> DiskReport:
    request = Request(
        top=Path(one.top),
        base=Path(one.base),
        access=access,
        # Once base is gone nothing else tells which way it went.
        options=replace(options, direction=one.direction),
        report=RatesFilled(report),
        should_stop=stop,
        started=time.monotonic(),
        claims={},
        # Who had them open until now can have made a snapshot meanwhile. What is begun is finished.
        images=tuple(one.images) if _has_not_begun(one) else (),
    )
    with system_errors_as_ours():
        done = merge_requested(request)
    return DiskReport(one.top, one.base, DiskOutcome(done.outcome), done)


def _failed(one: ThinnedRange, error: ChainmergeError) -> DiskReport:
    interrupted = isinstance(error, Interrupted)
    outcome = DiskOutcome.INTERRUPTED if interrupted else DiskOutcome.of(error)
    why = DiskError(error.code, error.sentence, error.advice)
    return DiskReport(one.top, one.base, outcome, None, why)


def _has_not_begun(one: ThinnedRange) -> bool:
    """Whether nothing of a merge is left: its images are what they were."""
    base, top = Path(one.base_identity.path), Path(one.top_identity.path)
    record = load_merged_record(top)
    # One that does not name base is of a merge that came to its end long ago.
    of_this = record is not None and record.names_base(base)
    kinds = (MERGE_JOURNAL, LIVE_JOURNAL, SAVED_BITMAPS)
    return base.exists() and not of_this and not any(kind.found(base).exists() for kind in kinds)


def _of_range(report: OnProgress, top: str) -> OnProgress:
    def report_of_range(event: ProgressEvent) -> None:
        report(replace(event, top=top))

    return report_of_range
