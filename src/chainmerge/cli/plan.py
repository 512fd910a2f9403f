# SPDX-License-Identifier: Apache-2.0
"""``chainmerge plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import (
    access_options,
    bases_option,
    json_option,
    merge_options,
    tops_argument,
)
from chainmerge.errors import ExitCode
from chainmerge.merging.errors import DisksMismatched
from chainmerge.report.plan_tables import disks_plan_report, plan_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.documents.disks import DisksPlan
    from chainmerge.documents.plan import MergePlan
    from chainmerge.options import Access, MergeOptions


@click.command(cls=Command)
@tops_argument
@bases_option
@merge_options
@access_options
@json_option
def plan(
    *,
    tops: tuple[str, ...],
    bases: tuple[str, ...],
    options: MergeOptions,
    access: Access,
    output: Output,
) -> ExitCode:
    """Show what a merge of TOP would do. Nothing is changed.

    Several TOPs are the disks of one virtual machine. The exit status is 3 if the merge would be
    refused.
    """
    return show_plan_of(tops, bases, access, options, output)


def show_plan_of(
    tops: tuple[str, ...],
    bases: tuple[str, ...],
    access: Access,
    options: MergeOptions,
    output: Output,
) -> ExitCode:
    """Plan a merge of one disk or several, and show the plan."""
    if len(tops) > 1:
        return show_plans(api.plan_disks(tops, bases, access, options), output)
    if len(bases) > 1:
        raise DisksMismatched(len(tops), len(bases))
    return show_plan(api.plan(tops[0], bases[0] if bases else None, access, options), output)


def show_plan(decided: MergePlan, output: Output) -> ExitCode:
    """Show a plan; the status says whether it would be refused."""
    status = ExitCode.DONE if decided.feasible else ExitCode.REFUSED
    output.document(decided, plan_report, status)
    return status


def show_plans(disks: DisksPlan, output: Output) -> ExitCode:
    """Show the plans of several disks; the status says whether they would be refused."""
    status = ExitCode.DONE if disks.feasible else ExitCode.REFUSED
    output.document(disks, disks_plan_report, status)
    return status
