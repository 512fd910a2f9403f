# SPDX-License-Identifier: Apache-2.0
"""``chainmerge report``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import history_option, named_places_options, outcome_options
from chainmerge.cli.output import JsonOutput
from chainmerge.cli.params import IMAGE
from chainmerge.options import Access, ScanOptions
from chainmerge.report.pictures_table import pictures_report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chainmerge.cli.output import Output


@click.command(cls=Command)
@click.argument("places", metavar="[PATH]...", type=IMAGE, nargs=-1)
@click.option(
    "-o",
    "--output",
    "report_file",
    type=click.Path(),
    metavar="FILE",
    help="The HTML file to write; an older report of that name is replaced.",
)
@click.option(
    "--chains",
    "most",
    type=click.IntRange(0, 1000),
    metavar="N",
    default=20,
    show_default=True,
    help="Draw the N chains whose merge frees most; all are listed.",
)
@history_option
@named_places_options
@outcome_options
def report(
    *,
    places: tuple[str, ...],
    report_file: str | None,
    most: int,
    history: bool,
    formats: Mapping[str, str],
    allow_backing: tuple[str, ...],
    output: Output,
) -> None:
    """Draw the chains of each PATH in one HTML file.

    A PATH is a directory with everything below, an image, or a volume group. Images are only
    read, also while virtual machines use them. The file needs no network and has no scripts.
    [default: the current directory]
    """
    if report_file is None and not isinstance(output, JsonOutput):
        raise click.UsageError("name the file to write: --output chains.html")
    access = Access(formats=dict(formats), allow_backing=allow_backing)
    with output.progress() as display:
        options = ScanOptions(history=history)
        found = api.picture_chains(places, access, most, display.update, options)
    if report_file is not None:
        # Imported where they are used: templates take longer to import than a small merge takes.
        from chainmerge.cli.report_file import write_report_file  # noqa: PLC0415
        from chainmerge.report.html.pages import html_of_chains  # noqa: PLC0415

        write_report_file(report_file, html_of_chains(found))
    output.last_event(found, partial(pictures_report, file=report_file or ""))
