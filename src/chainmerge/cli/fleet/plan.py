# SPDX-License-Identifier: Apache-2.0
"""``chainmerge fleet plan``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from chainmerge.cli.commands import Command
from chainmerge.cli.errors import ReportFileUnusable
from chainmerge.cli.fleet.configuration import config_option, database_in, host_in
from chainmerge.cli.fleet.job_options import action_options, job_options, timing_options
from chainmerge.cli.options import json_option
from chainmerge.cli.output import JsonOutput
from chainmerge.cli.params import IMAGE
from chainmerge.documents.fleet_policy import FleetPolicy
from chainmerge.fleet.inventory_store import stored_inventory
from chainmerge.fleet.policy import policy_in
from chainmerge.fleet.proposing import job_options_of, propose, view_of
from chainmerge.fleet.record import Action, FleetPlan, JobOptions
from chainmerge.report.fleet_plan_tables import fleet_plan_report
from chainmerge.report.json import encode

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.fleet.planning import JobTiming

_OF_WINDOWS: Final = ("windows", "window_end")


@click.command(cls=Command)
@click.argument("tops", metavar="[TOP]...", type=IMAGE, nargs=-1)
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
    help="Write the JSON to this file, and show the table, on a terminal or not.",
)
@click.option("--html", type=click.Path(), metavar="FILE", help="Also write the plan as a page.")
@action_options
@timing_options
@job_options
@config_option
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    *,
    tops: tuple[str, ...],
    action: str,
    together: bool,
    domain: str | None,
    timing: JobTiming,
    options: JobOptions,
    policy: Any,
    plan_file: str | None,
    html: str | None,
    config: Path,
    output: Output,
) -> None:
    """Plan jobs, as `submit` reads them: of all hosts, or of this one. Nothing is written.

    Without a TOP the jobs are for what `fleet scan` has found on all hosts. On a terminal that is
    shown as a table; a file or a pipe gets the JSON. With a TOP or a --domain they are for images
    of this host; by default each TOP is merged into its backing file. Options are those of
    `chainmerge merge`, `live merge` and `thin-out`; a policy has its own.
    """
    is_of_host = bool(tops) or domain is not None
    if is_of_host and (policy or html or plan_file):
        raise click.UsageError(
            "--policy, --output and --html are for a plan of all hosts, without a TOP"
        )
    if is_of_host:
        click.echo(
            encode(_of_host(tops, Action(action), together, domain, timing, options, config))
        )
        return
    if together or action != Action.MERGE:
        raise click.UsageError("--together and --action are for images of this host: name them")
    if policy and (given := _given(ctx)):
        raise click.UsageError(f"with --policy, say in the file what {given} would say")
    if policy:
        rules = policy_in(policy.read(), policy.name)
    else:
        rules = FleetPolicy(windows=timing.windows, window_end=timing.window_end)
    chosen = job_options_of(rules) if policy else options
    now = time.time()
    proposed = propose(stored_inventory(database_in(config)), rules, chosen, timing.priority, now)
    if html is not None:
        _write_page(proposed, html, int(now))
    if plan_file is not None:
        _write_plan(plan_file, f"{encode(proposed)}\n")
    if (plan_file or sys.stdout.isatty()) and not isinstance(output, JsonOutput):
        output.document(view_of(proposed, int(now)), fleet_plan_report)
    else:
        click.echo(encode(proposed))


def _of_host(
    tops: tuple[str, ...],
    action: Action,
    together: bool,  # noqa: FBT001
    domain: str | None,
    timing: JobTiming,
    options: JobOptions,
    config: Path,
) -> FleetPlan:
    # Planning needs most of the program.
    from chainmerge.fleet import planning  # noqa: PLC0415

    if (together or domain is not None) and action is not Action.MERGE:
        raise click.UsageError("--together and --domain are for merges")
    host = host_in(config)
    if domain is not None:
        return planning.plan_live_job(domain, tops, options, timing, host)
    if together:
        return planning.plan_together(tops, options, timing, host)
    return planning.plan_actions(action, tops, options, timing, host)


def _given(ctx: click.Context) -> str:
    """Options that were typed and that a policy has as well; empty if none was."""
    of_policies = {*JobOptions.__struct_fields__, *_OF_WINDOWS}
    return ", ".join(
        option.opts[0]
        for option in ctx.command.params
        if option.name in of_policies
        and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    )


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
