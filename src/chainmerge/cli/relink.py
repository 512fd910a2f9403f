# SPDX-License-Identifier: Apache-2.0
"""``chainmerge relink``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import access_options, image_argument, json_option
from chainmerge.cli.params import IMAGE
from chainmerge.cli.signals import stopped_by_signals
from chainmerge.errors import ExitCode
from chainmerge.report.tables import backing_report, relink_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access


@click.command(cls=Command)
@image_argument
@click.option("--backing", type=IMAGE, metavar="NEW", help="The new backing file of IMAGE.")
@click.option(
    "--no-backing", is_flag=True, help="Remove the backing file: IMAGE no longer needs one."
)
@click.option(
    "--unchecked",
    is_flag=True,
    help="Do not compare: NEW is known to have the same content, bitmaps included.",
)
@access_options
@json_option
def relink(
    *,
    image: str,
    backing: str | None,
    no_backing: bool,
    unchecked: bool,
    access: Access,
    output: Output,
) -> ExitCode:
    """Give IMAGE another backing file: one with the same content, in another place or format.

    First chainmerge compares what IMAGE shows with both, and what its checkpoints cover. Without
    --backing it shows the backing file that IMAGE names, and if that is lost, files that could be
    the one.
    """
    if backing is None and not no_backing:
        if unchecked:
            raise click.UsageError("--unchecked needs --backing or --no-backing")
        output.document(api.find_backing(image, access), backing_report)
        return ExitCode.DONE
    if backing is not None and no_backing:
        raise click.UsageError("--backing and --no-backing contradict each other")
    with stopped_by_signals() as should_stop, output.progress() as progress:
        report = api.relink(
            image,
            backing,
            access,
            unchecked=unchecked,
            on_progress=progress.update,
            should_stop=should_stop,
        )
    output.last_event(report, relink_report)
    return ExitCode.DONE
