# SPDX-License-Identifier: Apache-2.0
"""Jobs for chains of this host, planned as what they do is. Nothing is written."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from chainmerge import api
from chainmerge.documents.bitmaps import BitmapListing
from chainmerge.documents.repair import RepairReport
from chainmerge.fleet.chain_state import digest_of_chains
from chainmerge.fleet.errors import FleetPlanUnusable
from chainmerge.fleet.places import base_id_of, keys_of, require_allowed
from chainmerge.fleet.planned import work_of
from chainmerge.fleet.record import (
    Action,
    FleetPlan,
    JobDisk,
    JobDomain,
    JobOptions,
    PlannedJob,
    RecordUnusable,
    read_again,
)
from chainmerge.fleet.words import job_access, live_options_of, merge_options_of, retention_of
from chainmerge.inventory.thinning import lowest_own_image
from chainmerge.records.request import lasting_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.documents.plan import MergePlan
    from chainmerge.documents.retention import ThinOutPlan
    from chainmerge.fleet.planned import JobPlan, PlannedWork
    from chainmerge.fleet.settings import HostSettings
    from chainmerge.live.libvirt.domains import RunningDomain
    from chainmerge.options import Access


class JobTiming(Struct, frozen=True):
    """When jobs go; see :class:`PlannedJob`."""

    priority: int = 0
    windows: tuple[str, ...] = ()
    window_end: Literal["go-on", "stop"] = "go-on"


class _Images(Struct, frozen=True):
    """A disk by its images, and what its domain calls it."""

    top: str
    base: str
    target: str | None = None


def plan_actions(
    action: Action, tops: Sequence[str], options: JobOptions, timing: JobTiming, host: HostSettings
) -> FleetPlan:
    """Plan a job for each of *tops*: any action but a live merge.

    Raises:
        FleetPlanUnusable: one of them cannot be a job here, or its merge would be refused.
        ChainmergeError: it cannot be planned.
    """
    if action is Action.MERGE:
        return _plan(*(_cold([top], options, timing, host) for top in tops))
    return _plan(*(_alone(action, top, options, timing, host) for top in tops))


def plan_together(
    tops: Sequence[str], options: JobOptions, timing: JobTiming, host: HostSettings
) -> FleetPlan:
    """Plan one job for all *tops*, the disks of one virtual machine.

    Raises what :func:`plan_actions` raises.
    """
    return _plan(_cold(tops, options, timing, host))


def plan_live_job(
    domain: str,
    tops: Sequence[str],
    options: JobOptions,
    timing: JobTiming,
    host: HostSettings,
) -> FleetPlan:
    """Plan one job for disks of a domain that runs here, each merged into its backing file.

    Args:
        domain: its name.
        tops: an image of each disk; without one, what the guest writes to on each disk.
        options: how to merge.
        timing: when.
        host: this one.

    Raises what :func:`plan_actions` raises.
    """
    # Imported where it is used: libvirt is an optional part.
    from chainmerge import live  # noqa: PLC0415
    from chainmerge.live.libvirt.domains import running_domains  # noqa: PLC0415

    named = [one for one in running_domains(host.fleet.connect) if one.name == domain]
    if not named:
        raise FleetPlanUnusable(domain, "no domain of this name runs here")
    (found,) = named
    disks = _disks_of(found, tops)
    how, access = live_options_of(options), job_access(options, host)
    machine = live.Domain(domain, host.fleet.connect)
    plan: JobPlan
    with machine:
        opened = [machine.disk(str(disk.target)) for disk in disks]
        try:
            if len(disks) == 1:
                plan = live.plan(opened[0], disks[0].top, disks[0].base, access, how)
            else:
                bases = [disk.base for disk in disks]
                plan = live.plan_disks(opened, [one.top for one in disks], bases, access, how)
        finally:
            for disk in opened:
                disk.__exit__()
    job_domain = JobDomain(name=found.name, uuid=found.uuid)
    return _plan(_job(Action.LIVE_MERGE, plan, disks, options, timing, host, job_domain))


def _disks_of(domain: RunningDomain, tops: Sequence[str]) -> list[_Images]:
    chains = {target: chain for target, chain in domain.disks.items() if len(chain) > 1}
    wanted = [lasting_name(top) for top in tops] or [chain[0] for chain in chains.values()]
    disks = [
        _Images(chain[position], chain[position + 1], target)
        for top in wanted
        for target, chain in sorted(chains.items())
        for position in range(len(chain) - 1)
        if chain[position] == top
    ]
    if len(disks) != len(wanted) or not disks:
        reason = "not each TOP is an image of one of its disks with another image below"
        raise FleetPlanUnusable(domain.name, reason if tops else "no disk of it has an overlay")
    return disks


def _cold(
    tops: Sequence[str], options: JobOptions, timing: JobTiming, host: HostSettings
) -> PlannedJob:
    access, how = job_access(options, host), merge_options_of(options)
    if len(tops) == 1:
        plan = api.plan(tops[0], None, access, how)
        disks = [_Images(plan.top, plan.base)]
        return _job(Action.MERGE, plan, disks, options, timing, host)
    together = api.plan_disks(tops, (), access, how)
    disks = [_Images(one.top, one.base) for one in together.disks]
    return _job(Action.MERGE, together, disks, options, timing, host)


def _alone(
    action: Action, top: str, options: JobOptions, timing: JobTiming, host: HostSettings
) -> PlannedJob:
    access, name = job_access(options, host), lasting_name(top)
    plan: JobPlan
    match action:
        case Action.THIN_OUT:
            thinned = api.plan_thin_out(
                name, retention_of(options), access, merge_options_of(options)
            )
            if thinned.feasible and not thinned.ranges:
                raise FleetPlanUnusable(name, "all its snapshots stay")
            plan, base = thinned, _base_of_thinning(name, thinned, access, host)
        case Action.PRUNE:
            plan, base = api.bitmaps_list(name, access), api.plan(name, None, access).base
        case Action.REPAIR:
            plan, base = api.plan_repair(name, access), name
        case Action.MERGE | Action.LIVE_MERGE:
            raise AssertionError(action)
    return _job(action, plan, [_Images(name, base)], options, timing, host)


def _base_of_thinning(leaf: str, plan: ThinOutPlan, access: Access, host: HostSettings) -> str:
    """The image that a job holds which thins out a chain: the one that a merge of all of it holds.

    Which of the images go is found out only when it runs. What jobs may not touch, none holds.
    """
    lowest = lowest_own_image(leaf, access)
    try:
        require_allowed(lowest, host)
    except RecordUnusable:
        return plan.ranges[0].base if plan.ranges else leaf
    return lowest


def _job(
    action: Action,
    plan: JobPlan,
    images: Sequence[_Images],
    options: JobOptions,
    timing: JobTiming,
    host: HostSettings,
    domain: JobDomain | None = None,
) -> PlannedJob:
    for sentence in _refusals(plan):
        raise FleetPlanUnusable(images[0].top, sentence)
    work = work_of(plan, action, [disk.base for disk in images])
    try:
        bases = [disk.base for disk in images] if action is Action.THIN_OUT else work.bases
        for path in (*(disk.top for disk in images), *bases, *work.changed):
            require_allowed(path, host)
        chains = work.chains or [()] * len(images)
        access = job_access(options, host)
        disks = tuple(
            _disk(disk, base, (*held, *_own_part_of(chain, access)))
            for disk, base, held, chain in zip(images, bases, work.held, chains, strict=True)
        )
        job = PlannedJob(
            v=1,
            host=host.name,
            machine_id=host.machine_id,
            action=action,
            disks=disks,
            keys=tuple(keys_of(disks, host)),
            options=options,
            plan_digest=work.digest,
            domain=domain,
            images_digest=_images_digest_of(action, disks, work),
            **msgspec.structs.asdict(timing),
        )
        return read_again(job)
    except (RecordUnusable, ValueError, msgspec.ValidationError) as error:
        raise FleetPlanUnusable(images[0].top, str(error)) from error


def _disk(images: _Images, base: str, held: Sequence[str]) -> JobDisk:
    return JobDisk(
        top=images.top,
        base=base,
        base_id=base_id_of(base),
        # Whatever is done to an image, what it belongs to is not taken apart meanwhile.
        image_ids=tuple(sorted({base_id_of(path) for path in (images.top, *held)})),
        target=images.target,
    )


def _own_part_of(chain: Sequence[str], access: Access) -> Sequence[str]:
    """The images of a chain, from its root up, that nothing but the chain uses.

    A job reads what lies below the images that it changes. Where no locks keep hosts apart, another
    job for the same chain could write to these meanwhile, or remove them.
    """
    if not chain:
        return ()
    lowest = lowest_own_image(chain[-1], access)
    return chain[chain.index(lowest) :] if lowest in chain else ()


def _images_digest_of(action: Action, disks: Sequence[JobDisk], work: PlannedWork) -> str | None:
    chains = work.chains or [(disk.base, disk.top) for disk in disks]
    # A volume that is not active has no device to read.
    with suppress(OSError):
        return digest_of_chains(action, chains)
    return None


def _refusals(plan: JobPlan) -> list[str]:
    if isinstance(plan, BitmapListing | RepairReport):
        return []
    parts: Sequence[MergePlan] = getattr(plan, "disks", ()) or getattr(plan, "ranges", ())
    found = (*plan.refusals, *(refusal for part in parts for refusal in part.refusals))
    return [refusal.sentence for refusal in found]


def _plan(*jobs: PlannedJob) -> FleetPlan:
    return FleetPlan(version=1, jobs=jobs)
