# SPDX-License-Identifier: Apache-2.0
"""``chainmerge fleet plan``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from chainmerge.cli.commands import Command
from chainmerge.cli.errors import ReportFileUnusable
from chainmerge.cli.fleet.configuration import config_option, database_in, host_in
from chainmerge.cli.options import json_option, merging_option, with_options
from chainmerge.cli.output import JsonOutput
from chainmerge.cli.params import IMAGE, SIZE
from chainmerge.documents.fleet_policy import FleetPolicy
from chainmerge.fleet.inventory_store import stored_inventory
from chainmerge.fleet.policy import policy_in
from chainmerge.fleet.proposing import job_options_of, propose, view_of
from chainmerge.fleet.record import FleetPlan, JobOptions
from chainmerge.options import DataChoice, DirectionChoice, EngineChoice, VerifyLevel
from chainmerge.report.fleet_plan_tables import fleet_plan_report
from chainmerge.report.json import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.cli.output import Output

_DEFAULTS = JobOptions()


def _choice(option: str, kind: Any, default: str, meaning: str) -> Callable[..., Any]:
    choice = click.Choice(get_args(kind))
    return merging_option(option, type=choice, default=default, show_default=True, help=meaning)


_JOB_OPTIONS = (
    _choice("--verify", VerifyLevel, _DEFAULTS.verify, "How much to verify afterwards."),
    merging_option("--delete", is_flag=True, help="Delete the merged images once it is verified."),
    merging_option("--keep-name", is_flag=True, help="Give the result the name of TOP."),
    _choice("--engine", EngineChoice, _DEFAULTS.engine, "Which engine writes the data."),
    _choice("--direction", DirectionChoice, _DEFAULTS.direction, "Which way the data moves."),
    _choice("--data", DataChoice, _DEFAULTS.data, "Where data goes if base has a cluster for it."),
    merging_option("--detect-zeroes", is_flag=True, help="Turn zeros into zero clusters."),
    merging_option("--discard", is_flag=True, help="Discard what was freed on the volume."),
    merging_option("--bandwidth", type=SIZE, metavar="RATE", help="Copy at most so many bytes/s."),
    merging_option(
        "--sole-user", is_flag=True, help="Nobody uses the images but those that were found."
    ),
)


def _job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return with_options(function, _JOB_OPTIONS)


@click.command(cls=Command)
@click.argument("tops", metavar="[TOP]...", type=IMAGE, nargs=-1)
@click.option(
    "--priority",
    type=click.IntRange(-1000, 1000),
    default=0,
    show_default=True,
    help="The highest goes first.",
)
@click.option(
    "--policy",
    type=click.File("rb"),
    metavar="FILE",
    help="Which chains of the inventory are merged, when, and how.",
)
@click.option(
    "-o",
    "--output",
    "plan_file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write the JSON there, and show the table wherever that goes.",
)
@click.option("--html", type=click.Path(), metavar="FILE", help="Also write the plan as a page.")
@_job_options
@config_option
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    *,
    tops: tuple[str, ...],
    priority: int,
    policy: Any,
    plan_file: str | None,
    html: str | None,
    config: Path,
    output: Output,
    **options: Any,
) -> None:
    """Plan jobs, as `submit` reads them: of all hosts, or of this one. Nothing is written.

    Without a TOP the jobs are for what `fleet scan` has found on all hosts. On a terminal that is
    shown as a table; a file or a pipe gets the JSON. With a TOP they are for this host: each TOP is
    merged into its backing file. Options are those of `chainmerge merge`; a policy has its own.
    """
    if tops and (policy or html or plan_file):
        raise click.UsageError(
            "--policy, --output and --html are for a plan of all hosts, without a TOP"
        )
    if policy and (given := _given(ctx, {*options, "priority"})):
        raise click.UsageError(f"with --policy, say in the file what {given} would say")
    if tops:
        # Planning needs most of the program.
        from chainmerge.fleet.planning import plan_jobs  # noqa: PLC0415

        click.echo(encode(plan_jobs(tops, JobOptions(**options), priority, host_in(config))))
        return
    rules = policy_in(policy.read(), policy.name) if policy else FleetPolicy()
    chosen = job_options_of(rules) if policy else JobOptions(**options)
    now = time.time()
    proposed = propose(stored_inventory(database_in(config)), rules, chosen, now)
    if html is not None:
        _write_page(proposed, html, int(now))
    if plan_file is not None:
        _write_plan(plan_file, f"{encode(proposed)}\n")
    if (plan_file or sys.stdout.isatty()) and not isinstance(output, JsonOutput):
        output.document(view_of(proposed, int(now)), fleet_plan_report)
    else:
        click.echo(encode(proposed))


def _given(ctx: click.Context, names: set[str]) -> str:
    """Options among these that were typed; empty if none was."""
    from click.core import ParameterSource  # noqa: PLC0415

    typed = (
        f"--{name.replace('_', '-')}"
        for name in sorted(names)
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    )
    return ", ".join(typed)


def _write_plan(file: str, text: str) -> None:
    """Write a plan over what the file was, as a shell's redirection would.

    Raises:
        ReportFileUnusable: it cannot be written.
    """
    try:
        Path(file).write_text(text, encoding="ascii")
    except OSError as error:
        raise ReportFileUnusable(file, error.strerror or str(error)) from error


def _write_page(proposed: FleetPlan, file: str, made_at: int) -> None:
    # Imported where they are used: templates take long to import.
    from chainmerge.cli.report_file import write_report_file  # noqa: PLC0415
    from chainmerge.report.html.fleet_pages import html_of_fleet_plan  # noqa: PLC0415

    write_report_file(file, html_of_fleet_plan(view_of(proposed, made_at)))
