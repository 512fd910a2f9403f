# SPDX-License-Identifier: Apache-2.0
"""``chainmerge fleet watch``."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final, Protocol

import click

from chainmerge.cli.commands import Command
from chainmerge.cli.fleet.configuration import database_option
from chainmerge.cli.options import json_option
from chainmerge.cli.output import JsonOutput
from chainmerge.cli.streams import console_on, write_report
from chainmerge.fleet import overview
from chainmerge.fleet.errors import FleetUnreachable
from chainmerge.report.fleet_tables import fleet_report
from chainmerge.report.fleet_watch import Rates, watch_line, watch_report

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from rich.live import Live

    from chainmerge.cli.output import Output
    from chainmerge.documents.fleet import FleetStatus

_CLOCK: Final = "%H:%M:%S"


class _View(Protocol):
    """Where people watch."""

    def show(self, status: FleetStatus, rates: Mapping[int, float]) -> None:
        """Show what there is now."""
        ...

    def lost(self, error: FleetUnreachable) -> None:
        """Say that nobody knows now."""
        ...


@click.command(cls=Command)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.2),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait between two looks.",
)
@click.option("--until-idle", is_flag=True, help="End when nothing runs or waits any more.")
@database_option
@json_option
def watch(*, interval: float, until_idle: bool, database: str, output: Output) -> None:
    """Watch what runs: how far it is, how fast, and what is left.

    On a terminal that is a table that changes; elsewhere a line whenever there is something new;
    with --json a document like that of `status` each time.
    """
    rates = Rates()
    view, context = _view_for(output)
    status = overview.status(database)
    with context:
        while True:
            view.show(status, rates.see(status, time.monotonic()))
            if until_idle and not status.jobs:
                return
            status = _next_status(database, interval, view)


def _next_status(database: str, interval: float, view: _View) -> FleetStatus:
    """What there is after a while; if the database is away, once it is back."""
    while True:
        time.sleep(interval)
        try:
            return overview.status(database)
        except FleetUnreachable as error:
            view.lost(error)


def _view_for(output: Output) -> tuple[_View, AbstractContextManager[object]]:
    if isinstance(output, JsonOutput):
        return _Documents(output), nullcontext()
    if not sys.stdout.isatty():
        return _Lines(), nullcontext()
    # Imported where it is used: drawing takes long to import.
    from rich.live import Live  # noqa: PLC0415

    live = Live(console=console_on(sys.stdout), auto_refresh=False)
    return _Table(live), live


class _Table:
    """A table that changes in its place."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, status: FleetStatus, rates: Mapping[int, float]) -> None:
        from chainmerge.report.styled import renderable  # noqa: PLC0415

        self._live.update(renderable(watch_report(status, rates)), refresh=True)

    def lost(self, error: FleetUnreachable) -> None:
        self._live.console.print(error.sentence, style="yellow")


class _Lines:
    """A line for each change."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, status: FleetStatus, rates: Mapping[int, float]) -> None:
        self._say(watch_line(status, rates))

    def lost(self, error: FleetUnreachable) -> None:
        self._say(error.sentence)

    def _say(self, line: str) -> None:
        if line != self._last:
            self._last = line
            write_report(f"{time.strftime(_CLOCK)}  {line}\n")


class _Documents:
    """A document each time."""

    def __init__(self, output: JsonOutput) -> None:
        self._output = output

    def show(self, status: FleetStatus, rates: Mapping[int, float]) -> None:
        del rates
        self._output.document(status, fleet_report)

    def lost(self, error: FleetUnreachable) -> None:
        self._output.error(error)
