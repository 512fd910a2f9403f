# SPDX-License-Identifier: Apache-2.0
"""``chainmerge plan``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import click
from msgspec import Struct

from chainmerge import api
from chainmerge.cli.cold import ColdMergeCommand, all_with_way_into_vm, with_way_into_vm
from chainmerge.cli.options import (
    access_options,
    bases_option,
    json_option,
    merge_options,
    report_option,
    tops_argument,
    verbose_option,
)
from chainmerge.cli.strip import map_for_strip, upper_end
from chainmerge.cli.typed import same_with
from chainmerge.documents.disk_map import DiskMap
from chainmerge.documents.disks import DisksPlan
from chainmerge.documents.plan import MergePlan, Progress
from chainmerge.errors import ExitCode
from chainmerge.merging.errors import DisksMismatched
from chainmerge.report.layout import Block
from chainmerge.report.plan_details import disks_plan_details, plan_details
from chainmerge.report.plan_tables import disks_plan_report, plan_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access, MergeOptions


@click.command(cls=ColdMergeCommand)
@tops_argument
@bases_option
@merge_options
@access_options
@report_option
@verbose_option
@json_option
def plan(
    *,
    tops: tuple[str, ...],
    bases: tuple[str, ...],
    options: MergeOptions,
    access: Access,
    report_file: str | None,
    verbose: bool,
    output: Output,
) -> ExitCode:
    """Show what a merge of TOP would do. Nothing is changed.

    Several TOPs are the disks of one virtual machine. The exit status is 3 if the merge would be
    refused.
    """
    return show_plan_of(tops, bases, access, options, output, PLANS_TO_SHOW[verbose], report_file)


class PlanTables(Struct, frozen=True):
    """How plans are shown: with what function the plan of one disk, and with which of several."""

    one: Callable[[MergePlan, str, DiskMap | None], Block]
    several: Callable[[DisksPlan, str], Block]


PLANS_TO_SHOW: Final[Mapping[bool, PlanTables]] = MappingProxyType(
    {
        False: PlanTables(plan_report, disks_plan_report),
        True: PlanTables(plan_details, disks_plan_details),
    }
)
"""By whether all is to be shown."""


def show_plan_of(
    tops: tuple[str, ...],
    bases: tuple[str, ...],
    access: Access,
    options: MergeOptions,
    output: Output,
    tables: PlanTables,
    report_file: str | None = None,
) -> ExitCode:
    """Show what a merge would do; the status says whether it would be refused."""
    command = same_with("merge")
    if len(tops) > 1:
        disks = api.plan_disks(tops, bases, access, options)
        _draw(disks.disks, access, command, report_file)
        return show_plans(all_with_way_into_vm(disks), command, output, tables)
    if len(bases) > 1:
        raise DisksMismatched(len(tops), len(bases))
    decided = with_way_into_vm(api.plan(tops[0], bases[0] if bases else None, access, options))
    _draw((decided,), access, command, report_file)
    return _show(decided, output, lambda plan: tables.one(plan, command, _map_of(plan, access)))


def _draw(
    plans: Sequence[MergePlan], access: Access, command: str, report_file: str | None
) -> None:
    if report_file is None:
        return
    # Imported where it is used: few plans are drawn.
    from chainmerge.cli.merge_pictures import draw_plans  # noqa: PLC0415

    draw_plans(plans, access, command, report_file)


def show_plan(decided: MergePlan, command: str, output: Output, tables: PlanTables) -> ExitCode:
    """Show a plan that *command* carries out; the status says whether it would be refused."""
    return _show(decided, output, lambda plan: tables.one(plan, command, None))


def _show(decided: MergePlan, output: Output, table: Callable[[MergePlan], Block]) -> ExitCode:
    status = ExitCode.DONE if decided.feasible else ExitCode.REFUSED
    output.document(decided, table, status)
    return status


def _map_of(plan: MergePlan, access: Access) -> DiskMap | None:
    """The map of the disk that its guest sees, as far as that is known."""
    if plan.progress is Progress.MERGED:
        return None
    return map_for_strip(upper_end(plan), access)


def show_plans(disks: DisksPlan, command: str, output: Output, tables: PlanTables) -> ExitCode:
    """Show the plans of several disks; the status says whether they would be refused."""
    status = ExitCode.DONE if disks.feasible else ExitCode.REFUSED
    output.document(disks, lambda plan: tables.several(plan, command), status)
    return status
