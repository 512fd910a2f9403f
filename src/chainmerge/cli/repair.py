# SPDX-License-Identifier: Apache-2.0
"""``chainmerge repair``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import access_options, json_option
from chainmerge.cli.params import DIRECTORY, IMAGE
from chainmerge.cli.typed import was_typed
from chainmerge.errors import ExitCode
from chainmerge.report.tables import repair_report, undo_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access


@click.command(cls=Command)
@click.argument("image", type=IMAGE, required=False)
@click.option(
    "-n",
    "--dry-run",
    is_flag=True,
    help="Show what would be done and change nothing.  [default]",
)
@click.option("-y", "--yes", is_flag=True, help="Do it.")
@click.option(
    "--backup",
    type=DIRECTORY,
    metavar="DIR",
    help="Where to keep what is overwritten.  [default: beside the image]",
)
@click.option(
    "--undo",
    type=click.Path(),
    metavar="BACKUP",
    help="Put back what a repair has overwritten; BACKUP is the file that its report names.",
)
@click.option(
    "--reclaim",
    is_flag=True,
    help="Give back leaked clusters even if they may hold the data that a lost table mapped.",
)
@access_options
@json_option
def repair(
    *,
    image: str | None,
    dry_run: bool,
    yes: bool,
    backup: str | None,
    undo: str | None,
    reclaim: bool,
    access: Access,
    output: Output,
) -> ExitCode:
    """Repair IMAGE: broken bitmaps, wrong refcounts, leaks, interrupted merges.

    Shows what is wrong and what would be done about it; with --yes, does it. What the guest sees
    does not change. With --yes, the exit status is 1 if damage is left.
    """
    if undo is not None:
        if image is not None or yes or dry_run or reclaim or was_typed("backup"):
            raise click.UsageError("--undo takes only the backup, which names the image")
        output.document(api.undo_repair(undo, access), undo_report)
        return ExitCode.DONE
    if image is None:
        raise click.UsageError("name the image to look at, or a backup with --undo")
    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run contradict each other")
    if not yes:
        output.document(api.plan_repair(image, access, reclaim=reclaim), repair_report)
        return ExitCode.DONE
    report = api.repair(image, access, backup, reclaim=reclaim)
    output.document(report, repair_report)
    return ExitCode.FAILED if report.leaves_damage else ExitCode.DONE
