# SPDX-License-Identifier: Apache-2.0
"""``chainmerge fleet``: merges on many hosts, by jobs that lie in a database."""

from __future__ import annotations

import re
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import click

from chainmerge.cli.commands import Command, LazyGroup
from chainmerge.cli.fleet.configuration import database_option, host_option
from chainmerge.cli.options import json_option
from chainmerge.cli.params import DURATION
from chainmerge.documents.fleet import FleetChange, FleetJobOutcome
from chainmerge.documents.fleet_policy import KEY_PATTERN, LARGEST_LIMIT
from chainmerge.documents.versions import FLEET_VERSION
from chainmerge.fleet import database as fleet_database
from chainmerge.fleet import operating, overview
from chainmerge.report.fleet_tables import change_report, fleet_report, results_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.fleet.settings import HostSettings


def _key_of_jobs(context: click.Context, parameter: click.Parameter, key: str) -> str:
    """Refuse what no job can hold: nobody would notice that it limits nothing."""
    del context, parameter
    if not re.match(KEY_PATTERN, key):
        raise click.BadParameter(f"{key!r} is no key: host/NAME, storage/NAME, fleet")
    return key


_key_argument = click.argument("key", callback=_key_of_jobs)
_host_argument = click.argument("name", metavar="HOST")
_jobs_argument = click.argument("jobs", metavar="JOB...", type=int, nargs=-1, required=True)
_OLDER_THAN_ANY: Final = 86_400 * 36_525
"""Seconds; with more a database does not reckon."""
_COMMANDS: Final = MappingProxyType(
    {
        "scan": ("chainmerge.cli.fleet.scan", "scan"),
        "inventory": ("chainmerge.cli.fleet.scan", "inventory"),
        "look": ("chainmerge.cli.fleet.scan", "look"),
        "plan": ("chainmerge.cli.fleet.plan", "plan"),
        "watch": ("chainmerge.cli.fleet.watch", "watch"),
        "metrics": ("chainmerge.cli.fleet.metrics", "metrics"),
        "report": ("chainmerge.cli.fleet.report", "report"),
    }
)


@click.group(cls=LazyGroup, commands_in=_COMMANDS)
def fleet() -> None:
    """Merge on many hosts: jobs lie in a PostgreSQL database, and a worker on each host does them.

    A KEY is what jobs hold while they run: `host/NAME`, `storage/NAME`, or `fleet` for all.
    """


@fleet.command(cls=Command)
@database_option
@json_option
def init(*, database: str, output: Output) -> None:
    """Make the fleet's tables and roles in the database, or bring them up to date.

    Running it again does no harm.
    """
    done = fleet_database.set_up(database) or ("the fleet is set up and up to date",)
    output.document(FleetChange(FLEET_VERSION, (), done), change_report)


@fleet.command(cls=Command)
@click.argument("file", type=click.File("rb"), metavar="PLAN")
@database_option
@json_option
def submit(*, file: Any, database: str, output: Output) -> None:
    """Queue the jobs of a PLAN, all or none.

    What waits, runs or is done already is not queued again.
    """
    jobs = operating.plan_in(file.read(), file.name)
    output.document(operating.submit(database, jobs), change_report)


@fleet.command(cls=Command)
@click.option("--once", is_flag=True, help="End when nothing can start any more.")
@host_option
def worker(*, once: bool, host: HostSettings) -> None:
    """Do the jobs of this host, until told to end by SIGTERM.

    What runs then stops at the next safe point, and goes on when a worker starts.
    """
    from chainmerge.fleet.worker import work  # noqa: PLC0415

    work(host, once=once)


@fleet.command(cls=Command)
@click.option(
    "--most",
    type=click.IntRange(min=0),
    default=overview.MOST_SHOWN,
    show_default=True,
    help="List at most this many jobs; all are counted.",
)
@database_option
@json_option
def status(*, most: int, database: str, output: Output) -> None:
    """Show what runs, what waits and for what, the hosts and the keys."""
    output.document(overview.status(database, most), fleet_report)


@fleet.command(cls=Command)
@click.argument("jobs", metavar="[JOB]...", type=int, nargs=-1)
@click.option(
    "--outcome",
    "outcomes",
    type=click.Choice([outcome.value for outcome in FleetJobOutcome]),
    multiple=True,
    help="Only jobs that ended like this; may be given several times.",
)
@click.option(
    "--last",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Show at most this many, the last ones.",
)
@database_option
@json_option
def results(
    *, jobs: tuple[int, ...], outcomes: tuple[str, ...], last: int, database: str, output: Output
) -> None:
    """Show what became of jobs, the last one first; with --json, their whole reports."""
    output.document(overview.results(database, jobs, outcomes, last), results_report)


@fleet.command(cls=Command)
@_key_argument
@database_option
@json_option
def pause(*, key: str, database: str, output: Output) -> None:
    """Let nothing start that needs KEY; what runs goes on. `limit` ends the pause."""
    output.document(operating.pause(database, key), change_report)


@fleet.command(cls=Command)
@_key_argument
@click.argument("most", metavar="N", type=click.IntRange(0, LARGEST_LIMIT))
@database_option
@json_option
def limit(*, key: str, most: int, database: str, output: Output) -> None:
    """Let N jobs hold KEY at the same time, and end its pause.

    A key whose limit was never set has the limit 1, but for `fleet`, which has none.
    """
    output.document(operating.limit(database, key, most), change_report)


@fleet.command(cls=Command)
@_host_argument
@click.option("--now", is_flag=True, help="Have running merges stop at the next safe point.")
@database_option
@json_option
def drain(*, name: str, now: bool, database: str, output: Output) -> None:
    """Let nothing start on HOST; what runs there goes on to its end."""
    how = operating.drain_now if now else operating.drain
    output.document(how(database, name), change_report)


@fleet.command(cls=Command)
@_host_argument
@database_option
@json_option
def undrain(*, name: str, database: str, output: Output) -> None:
    """Let jobs start on HOST again."""
    output.document(operating.undrain(database, name), change_report)


@fleet.command(cls=Command)
@_jobs_argument
@database_option
@json_option
def cancel(*, jobs: tuple[int, ...], database: str, output: Output) -> None:
    """Take jobs off the queue; those that run stop at the next safe point."""
    output.document(operating.cancel(database, jobs), change_report)


@fleet.command(cls=Command)
@_jobs_argument
@database_option
@json_option
def retry(*, jobs: tuple[int, ...], database: str, output: Output) -> None:
    """Queue jobs again that ended without success.

    What was cancelled before its host had it is to be submitted again.
    """
    output.document(operating.retry(database, jobs), change_report)


@fleet.command("release", cls=Command)
@_host_argument
@click.option(
    "--fenced",
    is_flag=True,
    help="The host is switched off, or cut off from its storage: it cannot write any more.",
)
@database_option
@json_option
def release_host(*, name: str, fenced: bool, database: str, output: Output) -> None:
    """Free what the merges of a HOST hold that is gone, so that others may start.

    Do this only if the host cannot write any more: a merge that goes on there while another one
    starts would destroy the images. Nothing starts on HOST until it is undrained.
    """
    if not fenced:
        raise click.UsageError(f"say --fenced if {name} cannot write any more")
    output.document(operating.release_fenced(database, name), change_report)


@fleet.command(cls=Command)
@click.option(
    "--older",
    type=DURATION,
    metavar="AGE",
    required=True,
    help="Jobs that ended longer ago than this, such as 12h, 90d or 4w.",
)
@database_option
@json_option
def forget(*, older: int, database: str, output: Output) -> None:
    """Remove jobs that have ended, with their results."""
    age = timedelta(seconds=min(older, _OLDER_THAN_ANY))
    output.document(operating.forget(database, age), change_report)
