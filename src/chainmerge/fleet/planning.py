# SPDX-License-Identifier: Apache-2.0
"""Jobs for chains of this host, planned as a merge is. Nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge import api
from chainmerge.fleet.digest import plan_digest_of
from chainmerge.fleet.errors import FleetPlanUnusable
from chainmerge.fleet.places import base_id_of, keys_of, require_allowed
from chainmerge.fleet.record import (
    Action,
    FleetPlan,
    JobDisk,
    PlannedJob,
    RecordUnusable,
)
from chainmerge.options import Access, MergeOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.fleet.record import JobOptions
    from chainmerge.fleet.settings import HostSettings

_OF_ACCESS = frozenset({"sole_user"})


def plan_jobs(
    tops: Sequence[str], options: JobOptions, priority: int, host: HostSettings
) -> FleetPlan:
    """Plan a job for each of *tops*, which is merged into its backing file.

    Raises:
        FleetPlanUnusable: one of them cannot be a job here, or its merge would be refused.
        ChainmergeError: it cannot be planned.
    """
    return FleetPlan(version=1, jobs=tuple(_job(top, options, priority, host) for top in tops))


def _job(top: str, options: JobOptions, priority: int, host: HostSettings) -> PlannedJob:
    asked = {name: getattr(options, name) for name in options.__struct_fields__}
    access = Access(**{name: asked.pop(name) for name in _OF_ACCESS})
    plan = api.plan(top, None, access, MergeOptions(**asked))
    if plan.refusals:
        raise FleetPlanUnusable(plan.top, plan.refusals[0].sentence)
    try:
        for path in (plan.top, plan.base):
            require_allowed(path, host)
    except RecordUnusable as error:
        raise FleetPlanUnusable(plan.top, str(error)) from error
    disks = (JobDisk(top=plan.top, base=plan.base, base_id=base_id_of(plan.base)),)
    return PlannedJob(
        v=1,
        host=host.name,
        machine_id=host.machine_id,
        action=Action.MERGE,
        disks=disks,
        keys=tuple(keys_of(disks, host)),
        options=options,
        plan_digest=plan_digest_of(plan),
        priority=priority,
    )
