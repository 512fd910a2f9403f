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

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

from chainmerge.arithmetic.counting import counted
from chainmerge.arithmetic.durations import seconds_of
from chainmerge.arithmetic.sizes import bytes_of
from chainmerge.documents.fleet_inventory import HostInventory, InventoryChain
from chainmerge.fleet.chain_state import joint_digest
from chainmerge.fleet.errors import FleetPlanUnusable
from chainmerge.fleet.policy import DEFAULT_BANDWIDTH
from chainmerge.fleet.record import (
    MOST_DISKS,
    MOST_IMAGES,
    OPTIONS_OF_ACTION,
    Action,
    FleetPlan,
    JobDisk,
    JobDomain,
    JobFigures,
    JobOptions,
    LeftOut,
    PlannedJob,
    keys_needed,
    read_again,
    storages_in,
)
from chainmerge.fleet.sharing import refused_groups, shared_places
from chainmerge.report.fleet_plan_view import FleetPlanRow, FleetPlanView, LeftOutReason

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from chainmerge.documents.fleet_policy import FleetPolicy
    from chainmerge.fleet.inventory_store import StoredInventory

_DAY: Final = 86_400
_OLD_DAYS: Final = 7
_OF_OPEN_IMAGES: Final = frozenset({"image-in-use", "image-locked"})
_PLENTY: Final = 2**63 - 1


class _Candidate(Struct, frozen=True):
    """A chain that may be merged, and whose it is."""

    host: HostInventory
    chain: InventoryChain

    @property
    def identity(self) -> tuple[object, ...]:
        """The same on all hosts that report the chain.

        On storages that keep no time of birth, images of two of them can have the same id.
        """
        places = {place.id for place in self.host.places if place.name in self.chain.places}
        return (self.chain.base_id, frozenset(self.chain.image_ids), frozenset(places))

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
    stored: StoredInventory, policy: FleetPolicy, options: JobOptions, priority: int, now: float
) -> FleetPlan:
    """Plan a job for each virtual machine whose chains the policy lets be merged and that can be.

    A chain whose machine is not known has a job of its own.

    Args:
        stored: what is known of the hosts.
        policy: which chains, when and how.
        options: how to merge; the bandwidth is the policy's if that has one.
        priority: of all jobs.
        now: seconds since 1970.

    Raises:
        FleetPlanUnusable: a job would be done in a way that jobs may not ask for.
    """
    left_out: list[LeftOut] = []
    elsewhere = _Elsewhere(
        refused_groups(stored.hosts), _open_images(stored), frozenset(stored.released)
    )
    candidates = []
    for host in stored.hosts:
        for chain in host.chains:
            candidate = _Candidate(host, chain)
            reason = next(_obstacles(candidate, policy, elsewhere), None)
            if reason is None:
                candidates.append(candidate)
            else:
                left_out.append(_left_out(candidate, *reason))
    groups = _by_machine(_one_host_each(sorted(candidates, key=lambda one: one.rank)), policy)
    most = policy.most_jobs or len(groups)
    left_out += [
        _left_out(one, "most-jobs", "others come first") for group in groups[most:] for one in group
    ]
    jobs = []
    for group in groups[:most]:
        try:
            jobs.append(_job(group, policy, options, priority))
        except _GroupUnusable as error:
            left_out += [_left_out(one, "unusable", str(error)) for one in group]
    return FleetPlan(
        version=1,
        jobs=tuple(jobs),
        limits=policy.limits,
        left_out=tuple(sorted(left_out, key=lambda one: (one.host, one.leaf))),
        warnings=tuple(_warnings(stored, now)),
    )


def _left_out(candidate: _Candidate, code: str, reason: str) -> LeftOut:
    return LeftOut(candidate.host.host, _readable(candidate.chain.leaf), code, _readable(reason))


def _readable(text: str) -> str:
    """Text as every reader of a plan takes it: names of files need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


class _GroupUnusable(Exception):
    """What a host says of some chains makes no job; says why."""


class _Elsewhere(Struct, frozen=True):
    """What a chain's own host does not know.

    Attributes:
        refused_groups: By host and name, volume groups in which nothing is merged, and why.
        open_images: By what an image is known by on all hosts, the host that has its leaf open.
        released: Hosts that were given up. What they report still tells who shares what.
    """

    refused_groups: Mapping[tuple[str, str], str]
    open_images: Mapping[str, str]
    released: frozenset[str]


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
    by_identity: dict[object, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_identity[candidate.identity].append(candidate)
    jobs: Counter[str] = Counter()
    for group in by_identity.values():
        chosen = min(
            group,
            key=lambda one: (one.chain.domain is None, jobs[one.host.host], one.host.host),
        )
        jobs[chosen.host.host] += 1
        yield chosen


def _by_machine(candidates: Iterable[_Candidate], policy: FleetPolicy) -> list[list[_Candidate]]:
    """The chains that one job is for, in the order of the first of each.

    Snapshots are thinned out one disk at a time.
    """
    groups: dict[object, list[_Candidate]] = defaultdict(list)
    for one in candidates:
        machine = (one.host.host, one.chain.domain, one.chain.in_use)
        is_alone = one.chain.domain is None or policy.retention is not None
        groups[(one.host.host, one.chain.leaf) if is_alone else machine].append(one)
    return [portion for group in groups.values() for portion in _portions(group)]


def _portions(group: Iterable[_Candidate]) -> Iterator[list[_Candidate]]:
    """A machine's chains, so many at a time as one job takes."""
    portion: list[_Candidate] = []
    images = 0
    for one in group:
        more = len({one.chain.base_id, *one.chain.image_ids})
        if portion and (len(portion) == MOST_DISKS or images + more > MOST_IMAGES):
            yield portion
            portion, images = [], 0
        portion.append(one)
        images += more
    yield portion


def _obstacles(
    candidate: _Candidate, policy: FleetPolicy, elsewhere: _Elsewhere
) -> Iterator[tuple[str, str]]:
    """Why no job is planned for a chain: a code and a sentence each."""
    host, chain = candidate.host, candidate.chain
    yield from _left_alone(candidate, policy)
    if host.host in elsewhere.released:
        yield "host-released", f"{host.host} was released, and no worker has come from there since"
    if chain.freed_bytes is None:
        yield "unreadable", chain.problem or "it cannot be read"
    if chain.base is None:
        yield "nothing-to-merge", "no image of it is used by its leaf alone"
        return
    if (chain.images or 0) < policy.least_images:
        yield "short-chain", f"it has {counted(chain.images or 0, 'image')}"
    kept = policy.retention.keep_last if policy.retention else None
    if kept is not None and (chain.images or 0) - 1 <= kept:
        yield "all-stay", f"it has no more than {counted(kept, 'snapshot')}"
    if (chain.freed_bytes or 0) < (bytes_of(policy.least_freed) or 0):
        yield "little-to-gain", f"merging it frees less than {policy.least_freed}"
    for place in chain.places:
        if (host.host, place) in elsewhere.refused_groups:
            yield "shared-volume-group", elsewhere.refused_groups[host.host, place]
    if chain.unfinished:
        yield "unfinished-merge", "a merge of it was not finished: `chainmerge status` there"
    merges_live = _merges_live(chain, policy)
    for refusal in chain.refusals:
        # A virtual machine merges what only it has open.
        if not (merges_live and refusal.code in _OF_OPEN_IMAGES):
            yield refusal.code, refusal.sentence
    if chain.in_use and not merges_live:
        yield "in-use", "a process has it open"
    if chain.digest is None or chain.base_id is None:
        yield "unreadable", "an image of it could not be looked at"
    elif chain.base_id in elsewhere.open_images and not chain.in_use:
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


def _merges_live(chain: InventoryChain, policy: FleetPolicy) -> bool:
    """Whether a chain is one of a running machine, which is to merge it itself."""
    wanted = policy.running == "merge" and policy.retention is None
    return wanted and chain.in_use and chain.domain_uuid is not None


def _action_of(chain: InventoryChain, policy: FleetPolicy) -> Action:
    if policy.retention is not None:
        return Action.THIN_OUT
    return Action.LIVE_MERGE if _merges_live(chain, policy) else Action.MERGE


def _job(
    group: Sequence[_Candidate], policy: FleetPolicy, options: JobOptions, priority: int
) -> PlannedJob:
    host, chains = group[0].host, [one.chain for one in group]
    action = _action_of(chains[0], policy)
    disks = tuple(_disk(chain, action) for chain in chains)
    storages = {name for chain in chains for name in chain.storages}
    chosen = _checked_options(action, storages, options, policy)
    try:
        job = PlannedJob(
            v=1,
            host=host.host,
            machine_id=host.machine_id,
            action=action,
            disks=disks,
            keys=tuple(keys_needed(host.host, storages, disks)),
            options=chosen,
            plan_digest=joint_digest([chain.digest or "" for chain in chains]),
            priority=priority,
            domain=_domain_of(chains[0]) if action is Action.LIVE_MERGE else None,
            windows=policy.windows,
            window_end=policy.window_end,
            judged_by="chain",
            figures=_figures_of(chains),
        )
        return read_again(job)
    except (ValueError, msgspec.ValidationError) as error:
        raise _GroupUnusable(f"no job can name it: {error}") from error


def _checked_options(
    action: Action, storages: Collection[str], options: JobOptions, policy: FleetPolicy
) -> JobOptions:
    chosen = _options_for(action, storages, options, policy)
    try:
        return msgspec.json.decode(msgspec.json.encode(chosen), type=JobOptions)
    except (ValueError, msgspec.ValidationError) as error:
        raise FleetPlanUnusable("the policy", str(error)) from error


def _disk(chain: InventoryChain, action: Action) -> JobDisk:
    assert chain.base is not None
    assert chain.base_id is not None
    target = chain.target if action is Action.LIVE_MERGE else None
    return JobDisk(
        top=chain.leaf,
        base=chain.base,
        base_id=chain.base_id,
        image_ids=chain.image_ids,
        target=target,
    )


def _domain_of(chain: InventoryChain) -> JobDomain:
    assert chain.domain is not None
    assert chain.domain_uuid is not None
    return JobDomain(name=chain.domain, uuid=chain.domain_uuid)


def _figures_of(chains: Sequence[InventoryChain]) -> JobFigures:
    free = [chain.free_bytes for chain in chains if chain.free_bytes is not None]
    return JobFigures(
        vm=chains[0].domain,
        images=max(chain.images or 0 for chain in chains),
        hidden_bytes=sum(chain.freed_bytes or 0 for chain in chains),
        bytes_to_copy=sum(chain.bytes_to_copy or 0 for chain in chains),
        free_bytes=min(free, default=None),
    )


def _options_for(
    action: Action, storages: Collection[str], options: JobOptions, policy: FleetPolicy
) -> JobOptions:
    """Those of the options that the action has, with the retention and the pace of the policy."""
    chosen = {
        name: value for name, value in options.given().items() if name in OPTIONS_OF_ACTION[action]
    }
    retention = policy.retention
    if retention is not None:
        chosen |= asdict(retention)
        chosen["keep_within"] = seconds_of(retention.keep_within or "")
    return _paced(JobOptions(**chosen), storages, policy)


def _paced(options: JobOptions, storages: Collection[str], policy: FleetPolicy) -> JobOptions:
    """With the bandwidth that the slowest of the storages has."""
    names = [name for name in storages if name in policy.bandwidth] or [DEFAULT_BANDWIDTH]
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
        if one.left_out:
            rest = len(one.left_out) - 1
            more = f" ({rest} more: `chainmerge fleet inventory`)" if rest else ""
            yield f"{one.host} was not scanned whole: {_readable(one.left_out[0])}{more}"
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
    figures = job.figures
    return FleetPlanRow(
        host=job.host,
        vm=figures.vm if figures else None,
        action=job.action,
        tops=tuple(disk.top for disk in job.disks),
        images=figures.images if figures else None,
        hidden_bytes=figures.hidden_bytes if figures else None,
        bytes_to_copy=figures.bytes_to_copy if figures else None,
        free_bytes=figures.free_bytes if figures else None,
        storages=storages_in(job.keys),
    )


def job_options_of(policy: FleetPolicy) -> JobOptions:
    """How jobs merge by a policy."""
    return JobOptions(**asdict(policy.merging))
