# SPDX-License-Identifier: Apache-2.0
"""What this host's history tells of a merge that is planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.documents.plan import Prediction, Progress
from chainmerge.planning.prediction import Measured, predicted_duration
from chainmerge.planning.workload import Effort, effort_of, storages_of

if TYPE_CHECKING:
    from chainmerge.documents.plan import MergePlan
    from chainmerge.options import LiveOptions, MergeOptions


def foretold(
    plan: MergePlan, options: MergeOptions | LiveOptions, *, live: bool
) -> Prediction | None:
    """How long a merge will take.

    Args:
        plan: what it does.
        options: how it was asked for.
        live: whether a running VM merges.

    Returns: None if the history is not to be asked, or an earlier run has done a part of it.
    """
    if not options.history or plan.progress is not Progress.NEW:
        return None
    # Imported where it is used: merges of several disks load this module as well.
    try:
        from chainmerge.records.history import merges_like  # noqa: PLC0415
    except ImportError:
        return None
    storage = storages_of(plan)
    if storage is None:
        return None
    earlier = [
        Measured(Effort(line.bytes_copied, line.clusters), line.seconds)
        for line in merges_like(storage, plan.engine, plan.verify, live=live)
        if line.seconds is not None
    ]
    duration = predicted_duration(effort_of(plan), earlier)
    if duration is None:
        return Prediction(storage, len(earlier))
    # A copy that is held back takes at least that long.
    least = plan.bytes_copied / options.bandwidth if options.bandwidth else 0.0
    return Prediction(
        storage,
        len(earlier),
        seconds=max(duration.likely, least),
        at_least=max(duration.low, least),
        at_most=max(duration.high, least),
    )
