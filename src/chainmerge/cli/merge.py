# SPDX-License-Identifier: Apache-2.0
"""``chainmerge merge``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.cold import ColdMergeCommand
from chainmerge.cli.options import (
    access_options,
    bases_option,
    dry_run_option,
    merge_options,
    outcome_options,
    tops_argument,
    verbose_option,
)
from chainmerge.cli.signals import stopped_by_signals
from chainmerge.errors import ExitCode
from chainmerge.merging.errors import DisksMismatched
from chainmerge.report.merge_tables import (
    disks_details,
    disks_report,
    merge_details,
    merge_report,
)

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access, MergeOptions


@click.command(cls=ColdMergeCommand)
@tops_argument
@bases_option
@dry_run_option
@merge_options
@access_options
@verbose_option
@outcome_options
def merge(
    *,
    tops: tuple[str, ...],
    bases: tuple[str, ...],
    dry_run: bool,
    options: MergeOptions,
    access: Access,
    verbose: bool,
    output: Output,
) -> ExitCode:
    """Merge TOP, and all images between, into BASE.

    Ends with status 0 only when the result was read back and verified. The same command finishes a
    merge that was interrupted or killed.

    Several TOPs are the disks of one virtual machine: all are planned before the first image is
    written to, and the report says what happened to each.
    """
    if dry_run:
        # Imported where it is used, as most merges are to be done.
        from chainmerge.cli.plan import PLANS_TO_SHOW, show_plan_of  # noqa: PLC0415

        return show_plan_of(tops, bases, access, options, output, PLANS_TO_SHOW[verbose])
    if len(tops) > 1:
        with stopped_by_signals() as should_stop, output.progress() as progress:
            disks = api.merge_disks(
                tops, bases, access, options, on_progress=progress.update, should_stop=should_stop
            )
        output.last_event(disks, disks_details if verbose else disks_report, disks.exit_code)
        return disks.exit_code
    if len(bases) > 1:
        raise DisksMismatched(len(tops), len(bases))
    base = bases[0] if bases else None
    with stopped_by_signals() as should_stop, output.progress() as progress:
        report = api.merge(
            tops[0], base, access, options, on_progress=progress.update, should_stop=should_stop
        )
    output.last_event(report, merge_details if verbose else merge_report)
    return ExitCode.DONE
