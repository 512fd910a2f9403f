# SPDX-License-Identifier: Apache-2.0
"""``chainmerge merge``."""

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
from chainmerge.cli.signals import stopped_by_signals
from chainmerge.report.tables import merge_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access, MergeOptions


@click.command(cls=Command)
@top_argument
@base_option
@merge_options
@access_options
@json_option
def merge(
    *, top: str, base: str | None, options: MergeOptions, access: Access, output: Output
) -> None:
    """Merge TOP, and all images between, into BASE.

    Ends with status 0 only when the result was read back and verified. A merge that was
    interrupted or killed is finished by the same command.
    """
    with stopped_by_signals() as should_stop, output.progress() as progress:
        report = api.merge(
            top, base, access, options, on_progress=progress.update, should_stop=should_stop
        )
    output.last_event(report, merge_report)
