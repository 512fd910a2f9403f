# SPDX-License-Identifier: Apache-2.0
"""``chainmerge fleet report``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from chainmerge.cli.commands import Command
from chainmerge.cli.fleet.configuration import database_option
from chainmerge.cli.options import json_option
from chainmerge.cli.output import JsonOutput
from chainmerge.fleet.inventory_store import overview_of_pictures, pictures_of_fleet
from chainmerge.report.fleet_plan_tables import inventory_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output


@click.command(cls=Command)
@click.option(
    "-o",
    "--output",
    "report_file",
    type=click.Path(),
    metavar="FILE",
    help="The HTML file to write; an older report of that name is replaced.",
)
@database_option
@json_option
def report(*, report_file: str | None, database: str, output: Output) -> None:
    """Draw what the last scans of all hosts have found, in one HTML file.

    How long chains are, which merges free most, what stale bitmaps take, what is unfinished, what
    would be refused and why, how jobs have ended, and how it all has changed.
    """
    if report_file is None and not isinstance(output, JsonOutput):
        raise click.UsageError("name the file to write: --output fleet.html")
    found = pictures_of_fleet(database, int(time.time()))
    if report_file is not None:
        # Imported where they are used: templates take long to import.
        from chainmerge.cli.report_file import write_report_file  # noqa: PLC0415
        from chainmerge.report.html.fleet_pages import html_of_fleet  # noqa: PLC0415

        write_report_file(report_file, html_of_fleet(found))
    output.document(found, lambda found: inventory_report(overview_of_pictures(found)))
