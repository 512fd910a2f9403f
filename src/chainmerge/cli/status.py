# SPDX-License-Identifier: Apache-2.0
"""``chainmerge status``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import json_option
from chainmerge.cli.params import IMAGE
from chainmerge.errors import ExitCode
from chainmerge.report.status_table import status_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output


@click.command(cls=Command)
@click.argument("paths", nargs=-1, type=IMAGE, metavar="[PATH]...")
@json_option
def status(*, paths: tuple[str, ...], output: Output) -> ExitCode:
    """List interrupted merges: whether the VM may start, what finishes or undoes each.

    Nothing is changed. A PATH is an image, or a directory with everything below.
    [default: the current directory]

    The exit status is 5 if something is unfinished.
    """
    report = api.status(paths)
    output.document(report, status_report)
    return ExitCode.UNFINISHED if report.merges else ExitCode.DONE
