# SPDX-License-Identifier: Apache-2.0
"""What several hosts report as theirs, and whether they keep out of each other's way there. Pure.

QEMU's locks on a volume are known to one kernel, so a host cannot see that another one uses the
same volume group. The fleet can: hosts that report the same UUID share it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.documents.fleet_inventory import PlaceKind, SharedPlace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.documents.fleet_inventory import HostInventory, InventoryPlace

    _Reports = Sequence[tuple[str, InventoryPlace]]


def shared_places(hosts: Sequence[HostInventory]) -> tuple[SharedPlace, ...]:
    """Return the file systems and volume groups that several of the hosts report."""
    found: dict[tuple[PlaceKind, str], dict[str, InventoryPlace]] = defaultdict(dict)
    for host in hosts:
        for place in host.places:
            if place.id:
                found[place.kind, place.id][host.host] = place
    return tuple(
        _judged(kind, identity, tuple(by_host.items()))
        for (kind, identity), by_host in sorted(found.items())
        if len(by_host) > 1
    )


def refused_groups(hosts: Sequence[HostInventory]) -> dict[tuple[str, str], str]:
    """By host and name, the volume groups in which nothing is merged, and why."""
    return {
        (host, name): place.reason
        for place in shared_places(hosts)
        if place.is_refused
        for host, name in zip(place.hosts, place.names, strict=True)
    }


def _judged(kind: PlaceKind, identity: str, reports: _Reports) -> SharedPlace:
    is_group = kind is PlaceKind.VOLUME_GROUP
    verdict = _of_group(reports) if is_group else _of_file_system(reports)
    hosts, places = zip(*reports, strict=True)
    return SharedPlace(
        kind=kind,
        id=identity,
        hosts=hosts,
        names=tuple(one.name for one in places),
        is_refused=verdict.is_refused,
        is_doubtful=verdict.is_doubtful,
        reason=verdict.reason,
    )


class _Verdict(Struct, frozen=True):
    reason: str
    is_refused: bool = False
    is_doubtful: bool = False


def _of_group(reports: _Reports) -> _Verdict:
    """Refused unless every host has locks, or its configuration vouches for the group."""
    without = [host for host, one in reports if not (one.locks or one.fleet_only)]
    if without:
        return _Verdict(
            "no locks keep these hosts apart: use lvmlockd or lock_command, or say fleet_only in "
            f"the configuration of {', '.join(without)} if nothing but this fleet activates its "
            "volumes",
            is_refused=True,
        )
    if all(one.locks for _, one in reports):
        return _Verdict("locks keep these hosts apart")
    return _Verdict("by their configuration nothing but this fleet activates its volumes")


def _of_file_system(reports: _Reports) -> _Verdict:
    """Never refused: locks of files are asked by every merge, and NFS without them is rejected."""
    doubts = []
    unlocked = [host for host, one in reports if not one.locks]
    if unlocked:
        doubts.append(f"no locks are known that keep these hosts apart ({', '.join(unlocked)})")
    names = {one.storage for _, one in reports}
    if len(names) > 1 or "" in names:
        doubts.append(
            "give it the same name in [storages] on each of them, or no limit counts for all"
        )
    return _Verdict("; ".join(doubts) or "its limit counts for all", is_doubtful=bool(doubts))
