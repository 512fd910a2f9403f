# SPDX-License-Identifier: Apache-2.0
"""``chainmerge info``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import access_options, image_argument, json_option
from chainmerge.report.tables import chain_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access


@click.command(cls=Command)
@image_argument
@access_options
@json_option
def info(*, image: str, access: Access, output: Output) -> None:
    """Show IMAGE, the images below it, and other images that use them."""
    output.document(api.inspect(image, access), chain_report)
