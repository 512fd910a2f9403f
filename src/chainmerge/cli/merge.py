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
    report_option,
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
    from collections.abc import Callable

    from chainmerge.cli.output import Output
    from chainmerge.documents.disks import DisksReport
    from chainmerge.documents.merge import MergeReport
    from chainmerge.options import Access, MergeOptions


@click.command(cls=ColdMergeCommand)
@tops_argument
@bases_option
@dry_run_option
@merge_options
@access_options
@report_option
@verbose_option
@outcome_options
def merge(
    *,
    tops: tuple[str, ...],
    bases: tuple[str, ...],
    dry_run: bool,
    options: MergeOptions,
    access: Access,
    report_file: str | None,
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

        tables = PLANS_TO_SHOW[verbose]
        return show_plan_of(tops, bases, access, options, output, tables, report_file)
    if len(tops) == 1 and len(bases) > 1:
        raise DisksMismatched(len(tops), len(bases))
    draw_result = (
        _undrawn if report_file is None else _drawing(tops, bases, access, options, report_file)
    )
    if len(tops) > 1:
        with stopped_by_signals() as should_stop, output.progress() as progress:
            disks = api.merge_disks(
                tops, bases, access, options, on_progress=progress.update, should_stop=should_stop
            )
        output.last_event(disks, disks_details if verbose else disks_report, disks.exit_code)
        draw_result(disks)
        return disks.exit_code
    base = bases[0] if bases else None
    with stopped_by_signals() as should_stop, output.progress() as progress:
        report = api.merge(
            tops[0], base, access, options, on_progress=progress.update, should_stop=should_stop
        )
    output.last_event(report, merge_details if verbose else merge_report)
    draw_result(report)
    return ExitCode.DONE


def _undrawn(report: MergeReport | DisksReport) -> None:
    del report


def _drawing(
    tops: tuple[str, ...],
    bases: tuple[str, ...],
    access: Access,
    options: MergeOptions,
    file: str,
) -> Callable[[MergeReport | DisksReport], None]:
    """Draw the disks as they are, and return what draws them beside that once they are merged."""
    # Imported where it is used: few merges are drawn.
    from chainmerge.cli.merge_pictures import draw_after, draw_before  # noqa: PLC0415

    before = draw_before(tops, bases, access, options, file)
    return lambda report: draw_after(before, report, access, file)
