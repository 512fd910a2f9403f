# SPDX-License-Identifier: Apache-2.0
"""The inventory in the database: a host replaces its own, an operator reads all."""

from __future__ import annotations

import json
import re
import time
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from chainmerge.documents.fleet_inventory import (
    FleetInventory,
    FleetPictures,
    HostInventory,
    HostSummary,
    OutcomeCount,
)
from chainmerge.documents.trends import TrendPoint
from chainmerge.documents.versions import FLEET_VERSION
from chainmerge.fleet.database import transaction
from chainmerge.fleet.errors import FleetUnreachable
from chainmerge.fleet.sharing import shared_places
from chainmerge.report.json import encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from psycopg import Connection

_PATIENCE: Final = 120.0
"""Seconds that a host which has looked waits for a database that is away."""
_BETWEEN_TRIES: Final = 2.0
_MOST_POINTS: Final = 200
_LONG_NUMBER: Final = re.compile(r"[0-9]{19}")
_BEYOND_ALL_SIZES: Final = 2**63
_LATEST: Final = 253_402_300_799
"""Seconds since 1970 until the end of the year 9999, after which no clock shows a time."""


class StoredInventory(Struct, frozen=True):
    """What a database has of all hosts.

    Attributes:
        hosts: By name.
        never_scanned: Hosts of which nothing is there, or nothing that can be read.
        released: Hosts that were given up, and that no worker has come from since.
    """

    hosts: tuple[HostInventory, ...]
    never_scanned: tuple[str, ...]
    released: tuple[str, ...] = ()


def store(database: str, found: HostInventory) -> None:
    """Have a host's inventory replaced, unless a later one is there.

    Raises:
        FleetUnreachable: the database is away for longer than anybody waits, or takes none.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            _store_once(database, found)
        except FleetUnreachable:
            if time.monotonic() > end:
                raise
            time.sleep(_BETWEEN_TRIES)
        else:
            return


def _store_once(database: str, found: HostInventory) -> None:
    with transaction(database) as connection:
        connection.execute(
            "SELECT store_inventory(%s, %s, %s, %s, %s, %s)",
            (
                found.host,
                found.scanned_at,
                # ASCII, whatever the names are.
                encode(found),
                found.longest,
                found.occupied_bytes,
                found.freed_bytes,
            ),
        )


def host_names(connection: Connection[Any]) -> list[str]:
    """All hosts whose worker has started at least once, by name."""
    return [host for (host,) in connection.execute("SELECT host FROM hosts ORDER BY host")]


def stored_inventory(database: str) -> StoredInventory:
    """What the last scan of each host has found."""
    with transaction(database) as connection:
        return inventory_in(connection)


def inventory_in(connection: Connection[Any]) -> StoredInventory:
    """As above, within a transaction."""
    rows = connection.execute("SELECT host, document FROM inventory ORDER BY host").fetchall()
    read = [(host, _read(host, document)) for host, document in rows]
    hosts = tuple(one for _, one in read if one is not None)
    known = {one.host for one in hosts}
    never = tuple(host for host in host_names(connection) if host not in known)
    gone = connection.execute("SELECT host FROM hosts WHERE machine_id = '' ORDER BY host")
    return StoredInventory(hosts, never, tuple(host for (host,) in gone))


def _read(host: str, document: str) -> HostInventory | None:
    """A host's inventory; None if it is one of another version, or speaks for another host.

    Nor is one an inventory that was made when no clock says.
    """
    try:
        found = _decoded(document)
    except (ValueError, msgspec.ValidationError, RecursionError):
        return None
    is_its_own = (found.version, found.host) == (FLEET_VERSION, host)
    return found if is_its_own and 0 <= found.scanned_at <= _LATEST else None


def _decoded(document: str) -> HostInventory:
    try:
        found = msgspec.json.decode(document, type=HostInventory)
    except msgspec.DecodeError:
        # One name that is not UTF-8 must not hide all others of a host.
        return msgspec.convert(json.loads(document, parse_int=_possible_int), HostInventory)
    if _LONG_NUMBER.search(document):
        json.loads(document, parse_int=_possible_int)
    return found


def _possible_int(text: str) -> int:
    """Read a number; raises ValueError for what nothing can be as large as."""
    number = int(text)
    if abs(number) >= _BEYOND_ALL_SIZES:
        raise ValueError(text[:20])
    return number


def overview_of(stored: StoredInventory) -> FleetInventory:
    """A line for each host, and what several of them share."""
    summaries = (*map(_summary, stored.hosts), *map(HostSummary, stored.never_scanned))
    return FleetInventory(
        FLEET_VERSION,
        tuple(sorted(summaries, key=lambda one: one.host)),
        shared_places(stored.hosts),
    )


def _summary(found: HostInventory) -> HostSummary:
    return HostSummary(
        host=found.host,
        scanned_at=found.scanned_at,
        chains=len(found.chains),
        longest=found.longest,
        occupied_bytes=found.occupied_bytes,
        freed_bytes=found.freed_bytes,
        stale_bytes=found.stale_bytes,
        unfinished=sum(chain.unfinished for chain in found.chains),
        refused=sum(bool(chain.refusals) for chain in found.chains),
        left_out=found.left_out,
    )


def pictures_of_fleet(database: str, made_at: int) -> FleetPictures:
    """What a report of a fleet is drawn from; *made_at* is in seconds since 1970."""
    with transaction(database) as connection:
        stored = inventory_in(connection)
        return FleetPictures(
            version=FLEET_VERSION,
            made_at=made_at,
            hosts=stored.hosts,
            never_scanned=stored.never_scanned,
            shared=shared_places(stored.hosts),
            outcomes=outcome_counts(connection),
            trends=trends_in(connection),
        )


def overview_of_pictures(found: FleetPictures) -> FleetInventory:
    """A line for each host of a report."""
    return overview_of(StoredInventory(found.hosts, found.never_scanned))


def outcome_counts(connection: Connection[Any]) -> tuple[OutcomeCount, ...]:
    """How jobs have ended that are not forgotten, by outcome."""
    rows = connection.execute(
        "SELECT outcome, count(*) FROM results WHERE NOT superseded GROUP BY outcome"
        " ORDER BY outcome"
    ).fetchall()
    return tuple(OutcomeCount(outcome, count) for outcome, count in rows)


def trends_in(connection: Connection[Any]) -> tuple[TrendPoint, ...]:
    """What all hosts had together, at each time at which one of them was scanned."""
    rows = connection.execute(
        "SELECT host, at, longest, occupied_bytes, freed_bytes FROM inventory_points"
        " WHERE at BETWEEN 0 AND %s ORDER BY at",
        (_LATEST,),
    ).fetchall()
    return tuple(added_up((host, TrendPoint(*figures)) for host, *figures in rows))


def added_up(points: Iterable[tuple[str, TrendPoint]]) -> Iterator[TrendPoint]:
    """Yield what all hosts had together, at some of these times, which are in order.

    A host counts with what its scan before that time has found; before its first one it is not
    there. No more points are made than a picture shows.
    """
    known = list(points)
    latest: dict[str, TrendPoint] = {}
    step = (known[-1][1].at - known[0][1].at) / _MOST_POINTS if known else 0.0
    due = 0.0
    for (host, point), after in zip_longest(known, known[1:]):
        latest[host] = point
        is_last_of_its_time = after is None or after[1].at != point.at
        if after is None or (is_last_of_its_time and point.at >= due):
            due = point.at + step
            yield TrendPoint(
                at=point.at,
                longest=max(one.longest for one in latest.values()),
                occupied_bytes=sum(one.occupied_bytes for one in latest.values()),
                freed_bytes=sum(one.freed_bytes for one in latest.values()),
            )
