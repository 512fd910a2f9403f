# SPDX-License-Identifier: Apache-2.0
"""Jobs for the chains of an inventory, by a policy. Pure: what is known in, a plan out.

Nobody looks at an image for this, so a job says by which digest its chain is known again. Its host
plans it when its turn has come, and merges only if the chain is what the inventory had.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.counting import counted
from chainmerge.arithmetic.sizes import bytes_of
from chainmerge.documents.fleet_inventory import HostInventory, InventoryChain
from chainmerge.fleet.policy import DEFAULT_BANDWIDTH
from chainmerge.fleet.record import (
    Action,
    FleetPlan,
    JobDisk,
    JobFigures,
    JobOptions,
    LeftOut,
    PlannedJob,
    host_key,
    image_key,
    storage_key,
)
from chainmerge.fleet.sharing import shared_places
from chainmerge.report.fleet_plan_view import FleetPlanRow, FleetPlanView, LeftOutReason

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.documents.fleet_policy import FleetPolicy
    from chainmerge.fleet.inventory_store import StoredInventory

_DAY: Final = 86_400
_OLD_DAYS: Final = 7
_PLENTY: Final = 2**63 - 1


class _Candidate(Struct, frozen=True):
    """A chain that may be merged, and whose it is."""

    host: HostInventory
    chain: InventoryChain

    @property
    def rank(self) -> tuple[int, int, int, str, str]:
        """Sorts what is to be done first to the front.

        That is the longest chain; of two of the same length the one that frees most; of these the
        one whose storage has least room left.
        """
        free = self.chain.free_bytes
        return (
            -(self.chain.images or 0),
            -(self.chain.freed_bytes or 0),
            _PLENTY if free is None else free,
            self.host.host,
            self.chain.leaf,
        )


def propose(
    stored: StoredInventory, policy: FleetPolicy, options: JobOptions, now: float
) -> FleetPlan:
    """Plan a job for each chain that the policy lets be merged and that can be.

    Args:
        stored: what is known of the hosts.
        policy: which chains, when and how.
        options: how to merge; the bandwidth is the policy's if that has one.
        now: seconds since 1970.
    """
    left_out: list[LeftOut] = []
    elsewhere = _Elsewhere(_refused_groups(stored), _open_images(stored))
    candidates = []
    for host in stored.hosts:
        for chain in host.chains:
            candidate = _Candidate(host, chain)
            reason = next(_obstacles(candidate, policy, elsewhere), None)
            if reason is None:
                candidates.append(candidate)
            else:
                left_out.append(LeftOut(host.host, chain.leaf, *reason))
    chosen = list(_one_host_each(sorted(candidates, key=lambda one: one.rank)))
    most = policy.most_jobs or len(chosen)
    left_out += [
        LeftOut(one.host.host, one.chain.leaf, "most-jobs", "others come first")
        for one in chosen[most:]
    ]
    return FleetPlan(
        version=1,
        jobs=tuple(_job(one, policy, options) for one in chosen[:most]),
        limits=policy.limits,
        left_out=tuple(sorted(left_out, key=lambda one: (one.host, one.leaf))),
        warnings=tuple(_warnings(stored, now)),
    )


class _Elsewhere(Struct, frozen=True):
    """What a chain's own host does not know.

    Attributes:
        refused_groups: By host and name, volume groups in which nothing is merged, and why.
        open_images: By what an image is known by on all hosts, the host that has its leaf open.
    """

    refused_groups: Mapping[tuple[str, str], str]
    open_images: Mapping[str, str]


def _open_images(stored: StoredInventory) -> dict[str, str]:
    return {
        chain.base_id: host.host
        for host in stored.hosts
        for chain in host.chains
        if chain.in_use and chain.base_id is not None
    }


def _one_host_each(candidates: Sequence[_Candidate]) -> Iterator[_Candidate]:
    """Yield each chain once, in the same order: several hosts report what lies where all reach it.

    The host that knows its virtual machine does it, else the one that has fewest jobs so far.
    """
    by_image: dict[str | None, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_image[candidate.chain.base_id].append(candidate)
    jobs: Counter[str] = Counter()
    for group in by_image.values():
        chosen = min(
            group,
            key=lambda one: (one.chain.domain is None, jobs[one.host.host], one.host.host),
        )
        jobs[chosen.host.host] += 1
        yield chosen


def _obstacles(
    candidate: _Candidate, policy: FleetPolicy, elsewhere: _Elsewhere
) -> Iterator[tuple[str, str]]:
    """Why no job is planned for a chain: a code and a sentence each."""
    host, chain = candidate.host, candidate.chain
    yield from _left_alone(candidate, policy)
    if chain.freed_bytes is None:
        yield "unreadable", chain.problem or "it cannot be read"
    if chain.base is None:
        yield "nothing-to-merge", "no image of it is used by its leaf alone"
        return
    if (chain.images or 0) < policy.least_images:
        yield "short-chain", f"it has {counted(chain.images or 0, 'image')}"
    if (chain.freed_bytes or 0) < (bytes_of(policy.least_freed) or 0):
        yield "little-to-gain", f"merging it frees less than {policy.least_freed}"
    for place in chain.places:
        if (host.host, place) in elsewhere.refused_groups:
            yield "shared-volume-group", elsewhere.refused_groups[host.host, place]
    if chain.unfinished:
        yield "unfinished-merge", "a merge of it was not finished: `chainmerge status` there"
    for refusal in chain.refusals:
        yield refusal.code, refusal.sentence
    if chain.in_use:
        yield "in-use", "a process has it open"
    if chain.digest is None or chain.base_id is None:
        yield "unreadable", "an image of it could not be looked at"
    elif chain.base_id in elsewhere.open_images:
        yield "in-use", f"a process of {elsewhere.open_images[chain.base_id]} has it open"


def _left_alone(candidate: _Candidate, policy: FleetPolicy) -> Iterator[tuple[str, str]]:
    exceptions = policy.leave_alone
    for patterns, name in (
        (exceptions.hosts, candidate.host.host),
        (exceptions.images, candidate.chain.leaf),
        (exceptions.vms, candidate.chain.domain or ""),
    ):
        for pattern in patterns:
            if name and fnmatchcase(name, pattern):
                yield "left-alone", f"{name} is to be left alone ({pattern})"


def _refused_groups(stored: StoredInventory) -> dict[tuple[str, str], str]:
    """By host and name, the volume groups in which nothing is merged, and why."""
    return {
        (host, name): place.reason
        for place in shared_places(stored.hosts)
        if place.is_refused
        for host, name in zip(place.hosts, place.names, strict=True)
    }


def _job(candidate: _Candidate, policy: FleetPolicy, options: JobOptions) -> PlannedJob:
    host, chain = candidate.host, candidate.chain
    assert chain.base is not None
    assert chain.base_id is not None
    assert chain.digest is not None
    return PlannedJob(
        v=1,
        host=host.host,
        machine_id=host.machine_id,
        action=Action.MERGE,
        disks=(JobDisk(top=chain.leaf, base=chain.base, base_id=chain.base_id),),
        keys=(
            host_key(host.host),
            *map(storage_key, sorted(chain.storages)),
            image_key(chain.base_id),
        ),
        options=_paced(options, chain, policy),
        plan_digest=chain.digest,
        judged_by="chain",
        figures=JobFigures(
            vm=chain.domain,
            images=chain.images or 0,
            hidden_bytes=chain.freed_bytes or 0,
            bytes_to_copy=chain.bytes_to_copy or 0,
            free_bytes=chain.free_bytes,
        ),
    )


def _paced(options: JobOptions, chain: InventoryChain, policy: FleetPolicy) -> JobOptions:
    """With the bandwidth that the slowest of its storages has."""
    names = [name for name in chain.storages if name in policy.bandwidth] or [DEFAULT_BANDWIDTH]
    rates = [bytes_of(policy.bandwidth[name]) for name in names if name in policy.bandwidth]
    slowest = min((rate for rate in rates if rate), default=None)
    return options if slowest is None else replace(options, bandwidth=slowest)


def _warnings(stored: StoredInventory, now: float) -> Iterator[str]:
    for host in stored.never_scanned:
        yield f"{host} has not been scanned: `chainmerge fleet scan {host}`"
    for one in stored.hosts:
        days = int((now - one.scanned_at) // _DAY)
        if days >= _OLD_DAYS:
            yield f"the last scan of {one.host} is {counted(days, 'day')} old"
    for place in shared_places(stored.hosts):
        if place.is_refused or place.is_doubtful:
            yield place.sentence


def view_of(plan: FleetPlan, made_at: int) -> FleetPlanView:
    """Return what people are shown of a plan that was made then."""
    by_code: dict[str, list[LeftOut]] = defaultdict(list)
    for one in plan.left_out:
        by_code[one.code].append(one)
    reasons = (
        LeftOutReason(code, len(those), f"{those[0].host}: {those[0].leaf}", those[0].reason)
        for code, those in by_code.items()
    )
    return FleetPlanView(
        made_at=made_at,
        jobs=tuple(map(_row, plan.jobs)),
        left_out=tuple(sorted(reasons, key=lambda one: (-one.chains, one.code))),
        limits=tuple(
            f"{key}: at most {counted(most, 'job')}" for key, most in sorted(plan.limits.items())
        ),
        warnings=plan.warnings,
    )


def _row(job: PlannedJob) -> FleetPlanRow:
    figures, prefix = job.figures, storage_key("")
    return FleetPlanRow(
        host=job.host,
        vm=figures.vm if figures else None,
        action=job.action,
        tops=tuple(disk.top for disk in job.disks),
        images=figures.images if figures else None,
        hidden_bytes=figures.hidden_bytes if figures else None,
        bytes_to_copy=figures.bytes_to_copy if figures else None,
        free_bytes=figures.free_bytes if figures else None,
        storages=tuple(key.removeprefix(prefix) for key in job.keys if key.startswith(prefix)),
    )


def job_options_of(policy: FleetPolicy) -> JobOptions:
    """How jobs merge by a policy."""
    merging = policy.merging
    return JobOptions(**{name: getattr(merging, name) for name in merging.__struct_fields__})
