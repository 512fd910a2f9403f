# SPDX-License-Identifier: Apache-2.0
"""``chainmerge flatten``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import (
    access_options,
    dry_run_option,
    merge_options,
    outcome_options,
    tops_argument,
)
from chainmerge.cli.plan import show_plan, show_plans
from chainmerge.cli.signals import stopped_by_signals
from chainmerge.errors import ExitCode
from chainmerge.report.tables import disks_report, merge_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access, MergeOptions


@click.command(cls=Command)
@tops_argument
@dry_run_option
@merge_options
@access_options
@outcome_options
def flatten(
    *,
    tops: tuple[str, ...],
    dry_run: bool,
    options: MergeOptions,
    access: Access,
    output: Output,
) -> ExitCode:
    """Make TOP independent: pull all that it lacks up from the images below.

    The disk keeps its name, and all snapshots below it are merged. The images below stay as they
    are, unless --delete is given. This is `merge --direction pull` down to the bottom of the chain.
    """
    if options.direction == "commit":
        raise click.UsageError("flatten always pulls: --direction commit makes no sense")
    if dry_run:
        return _show(tops, access, options, output)
    if len(tops) > 1:
        with stopped_by_signals() as should_stop, output.progress() as progress:
            disks = api.flatten_disks(
                tops, access, options, on_progress=progress.update, should_stop=should_stop
            )
        output.last_event(disks, disks_report, disks.exit_code)
        return disks.exit_code
    with stopped_by_signals() as should_stop, output.progress() as progress:
        report = api.flatten(
            tops[0], access, options, on_progress=progress.update, should_stop=should_stop
        )
    output.last_event(report, merge_report)
    return ExitCode.DONE


def _show(tops: tuple[str, ...], access: Access, options: MergeOptions, output: Output) -> ExitCode:
    if len(tops) > 1:
        return show_plans(api.plan_flatten_disks(tops, access, options), output)
    return show_plan(api.plan_flatten(tops[0], access, options), output)
