# SPDX-License-Identifier: Apache-2.0
"""A merge, from the first lock to the last deleted file. It follows the table in docs/design.md."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.documents.progress import never, unheard
from chainmerge.errors import ChainmergeError
from chainmerge.merging.job import Request
from chainmerge.merging.noting import BegunMerge, begun_merge, note_failed, note_merged
from chainmerge.merging.preparing import prepare, require_no_others
from chainmerge.merging.rates import RatesFilled
from chainmerge.options import Access, MergeOptions
from chainmerge.records.disks import forget_entry

if TYPE_CHECKING:
    from chainmerge.documents.merge import MergeReport
    from chainmerge.documents.progress import OnProgress, ShouldStop


def merge(
    top: str | Path,
    base: str | Path | None = None,
    access: Access | None = None,
    options: MergeOptions | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> MergeReport:
    """Merge *top* into *base* (by default top's backing file), and verify the result.

    A merge that was interrupted, in whatever way, is finished by the same call.

    Args:
        top: the overlay whose data goes down.
        base: the image below it that gets the data; images between are merged too.
        access: how images may be found and reached.
        options: how to merge.
        on_progress: called as the work goes on.
        should_stop: asked as the work goes on; the merge stops soon after it says yes.

    Raises:
        Refused: nothing was changed.
        Interrupted: *should_stop* said yes.
        Failed, OutcomeUnknown: the message says what the disk holds now.
    """
    request = Request(
        top=Path(top),
        base=Path(base) if base is not None else None,
        access=access or Access(),
        options=options or MergeOptions(),
        report=RatesFilled(on_progress or unheard),
        should_stop=should_stop or never,
        started=time.monotonic(),
        claims={},
    )
    return merge_requested(request)


def merge_requested(request: Request) -> MergeReport:
    """As :func:`merge`, which says what it raises."""
    begun: BegunMerge | None = None
    try:
        with contextlib.ExitStack() as stack:
            (prepared,) = prepare(stack, [request])
            (warnings,) = require_no_others([prepared])
            begun = begun_merge(prepared.plan, request.options)
            report = prepared.carry_out()
    except ChainmergeError as error:
        note_failed(begun, error.code)
        raise
    report = replace(report, warnings=(*report.warnings, *warnings))
    forget_entry(request.top if request.options.direction == "pull" else prepared.base)
    note_merged(begun, report)
    return report
