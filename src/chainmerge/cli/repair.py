# SPDX-License-Identifier: Apache-2.0
"""``chainmerge repair``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import rich_click as click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.errors import ConsentMissing
from chainmerge.cli.options import access_options, image_argument, json_option
from chainmerge.cli.output import JsonOutput, Output
from chainmerge.errors import ExitCode
from chainmerge.report.tables import repair_report

if TYPE_CHECKING:
    from chainmerge.options import Access


@click.command(cls=Command)
@image_argument
@click.option("--dry-run", is_flag=True, help="Show what is wrong and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before changing the image.")
@access_options
@json_option
def repair(*, image: str, dry_run: bool, yes: bool, access: Access, output: Output) -> ExitCode:
    """Remove what is broken in IMAGE: bitmaps nobody can trust, and leaked clusters.

    Shows what it found first, says which backups will be full because of it, and asks.
    """
    if yes or dry_run:
        output.document(api.repair(image, access, dry_run=dry_run), repair_report)
        return ExitCode.DONE
    findings = api.repair(image, access, dry_run=True)
    if not findings.actions:
        output.document(findings, repair_report)
        return ExitCode.DONE
    if isinstance(output, JsonOutput) or not sys.stdin.isatty():
        raise ConsentMissing(image)
    output.document(findings, repair_report)
    click.confirm("Go on?", abort=True, err=True)
    output.document(api.repair(image, access, dry_run=False), repair_report)
    return ExitCode.DONE
