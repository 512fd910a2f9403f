# SPDX-License-Identifier: Apache-2.0
"""``chainmerge fleet scan``, and what comes of it: ``look`` on a host, ``inventory`` anywhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import click

from chainmerge.cli.commands import Command
from chainmerge.cli.fleet.configuration import database_option, host_option
from chainmerge.cli.options import json_option, outcome_options
from chainmerge.documents.fleet import FleetJobOutcome
from chainmerge.errors import ExitCode
from chainmerge.fleet.inventory_store import (
    StoredInventory,
    overview_of,
    store,
    stored_inventory,
)
from chainmerge.fleet.scan_requests import (
    hindrances,
    outcomes_of,
    request_scans,
    waiting_scans,
)
from chainmerge.report.fleet_plan_tables import inventory_report
from chainmerge.report.fleet_tables import change_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.cli.output import Output
    from chainmerge.documents.fleet_inventory import FleetInventory, HostInventory
    from chainmerge.fleet.settings import HostSettings

_BETWEEN_LOOKS: Final = 1.0


@click.command(cls=Command)
@click.argument("hosts", metavar="[HOST]...", nargs=-1)
@click.option("--wait", is_flag=True, help="Wait until they have ended, and show the inventory.")
@database_option
@json_option
def scan(*, hosts: tuple[str, ...], wait: bool, database: str, output: Output) -> ExitCode:
    """Have each HOST, or all, scan what jobs may touch there, for the inventory.

    Images are only read, and scans wait for no merge. `plan`, `report` and `metrics` are made from
    what the last scan of each host has found. Hosts that are down, drained or paused are not waited
    for: they scan later, and the exit status is 5.
    """
    change = request_scans(database, hosts)
    if not wait:
        output.document(change, change_report)
        return ExitCode.DONE
    # One that waited before is as good as a new one.
    jobs = sorted({*change.jobs, *waiting_scans(database, hosts)})
    outcomes = _awaited(database, jobs)
    good = len(outcomes) == len(jobs) and set(outcomes) <= {FleetJobOutcome.DONE}
    status = ExitCode.DONE if good else ExitCode.UNFINISHED
    output.document(overview_of(stored_inventory(database)), inventory_report, status)
    return status


def _awaited(database: str, jobs: Sequence[int]) -> list[FleetJobOutcome]:
    """How those of the scans have ended that can end; the others are told on standard error."""
    while True:
        found = outcomes_of(database, jobs)
        left = [job for job in jobs if job not in found]
        hindered = hindrances(database, left) if left else {}
        if len(hindered) == len(left):
            for sentence in hindered.values():
                click.echo(f"not scanned: {sentence}", err=True)
            return list(found.values())
        time.sleep(_BETWEEN_LOOKS)


@click.command(cls=Command)
@database_option
@json_option
def inventory(*, database: str, output: Output) -> None:
    """Show what the last scan of each host has found, and what several hosts share."""
    output.document(overview_of(stored_inventory(database)), inventory_report)


@click.command(cls=Command)
@click.option("--store", "stores", is_flag=True, help="Also replace this host's inventory by it.")
@host_option
@outcome_options
def look(*, stores: bool, host: HostSettings, output: Output) -> None:
    """Show what a scan finds on this host; images are only read."""
    # Looking needs most of the program.
    from chainmerge.fleet.looking import look as looked_at  # noqa: PLC0415

    with output.progress() as display:
        found = looked_at(host, display.update)
    if stores:
        store(host.fleet.database, found)
        # The database has the rest, and keeps what is printed here beside the job.
        output.last_event(_overview(found), inventory_report)
    else:
        output.last_event(found, lambda found: inventory_report(_overview(found)))


def _overview(found: HostInventory) -> FleetInventory:
    return overview_of(StoredInventory((found,), ()))
