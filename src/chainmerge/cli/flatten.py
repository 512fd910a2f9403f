# SPDX-License-Identifier: Apache-2.0
"""``chainmerge flatten``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from chainmerge import api
from chainmerge.cli.options import (
    access_options,
    dry_run_option,
    merge_options,
    outcome_options,
    tops_argument,
    verbose_option,
)
from chainmerge.cli.signals import stopped_by_signals
from chainmerge.cli.typed import PlanningCommand, same_with, was_typed
from chainmerge.errors import ExitCode
from chainmerge.report.merge_tables import (
    disks_details,
    disks_report,
    merge_details,
    merge_report,
)

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access, MergeOptions


@click.command(cls=PlanningCommand)
@tops_argument
@dry_run_option
@merge_options
@access_options
@verbose_option
@outcome_options
def flatten(
    *,
    tops: tuple[str, ...],
    dry_run: bool,
    options: MergeOptions,
    access: Access,
    verbose: bool,
    output: Output,
) -> ExitCode:
    """Make TOP independent: pull all that it lacks up from the images below.

    The disk keeps its name, and all snapshots below it are merged. The images below stay as they
    are, unless --delete is given. This is `merge --direction pull` down to the bottom of the chain.
    """
    if options.direction == "commit":
        if was_typed("direction"):
            raise click.UsageError("flatten always pulls: --direction commit makes no sense")
        # A file says it of merges.
        options = replace(options, direction="auto")
    if dry_run:
        return _show(tops, access, options, output, verbose=verbose)
    if len(tops) > 1:
        with stopped_by_signals() as should_stop, output.progress() as progress:
            disks = api.flatten_disks(
                tops, access, options, on_progress=progress.update, should_stop=should_stop
            )
        output.last_event(disks, disks_details if verbose else disks_report, disks.exit_code)
        return disks.exit_code
    with stopped_by_signals() as should_stop, output.progress() as progress:
        report = api.flatten(
            tops[0], access, options, on_progress=progress.update, should_stop=should_stop
        )
    output.last_event(report, merge_details if verbose else merge_report)
    return ExitCode.DONE


def _show(
    tops: tuple[str, ...],
    access: Access,
    options: MergeOptions,
    output: Output,
    *,
    verbose: bool,
) -> ExitCode:
    # Imported where it is used, as most merges are to be done.
    from chainmerge.cli.plan import PLANS_TO_SHOW, show_plan, show_plans  # noqa: PLC0415

    tables = PLANS_TO_SHOW[verbose]
    command = same_with("flatten")
    if len(tops) > 1:
        return show_plans(api.plan_flatten_disks(tops, access, options), command, output, tables)
    return show_plan(api.plan_flatten(tops[0], access, options), command, output, tables)
