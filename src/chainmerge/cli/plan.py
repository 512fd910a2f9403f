# SPDX-License-Identifier: Apache-2.0
"""``chainmerge plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import (
    access_options,
    base_option,
    json_option,
    merge_options,
    top_argument,
)
from chainmerge.errors import ExitCode
from chainmerge.report.plan_tables import plan_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access, MergeOptions


@click.command(cls=Command)
@top_argument
@base_option
@merge_options
@access_options
@json_option
def plan(
    *, top: str, base: str | None, options: MergeOptions, access: Access, output: Output
) -> ExitCode:
    """Show what a merge of TOP would do, and change nothing.

    The exit status is 3 if the merge would be refused.
    """
    decided = api.plan(top, base, access, options)
    output.document(decided, plan_report)
    return ExitCode.DONE if decided.feasible else ExitCode.REFUSED
