# SPDX-License-Identifier: Apache-2.0
"""``chainmerge info``."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import access_options, image_argument, json_option
from chainmerge.cli.strip import map_for_strip
from chainmerge.records.request import words_of
from chainmerge.report.chains_table import chains_report
from chainmerge.report.tables import chain_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access


@click.command(cls=Command)
@image_argument
@access_options
@json_option
def info(*, image: str, access: Access, output: Output) -> None:
    """Show IMAGE, the images below it, and other images that use them.

    If IMAGE is a directory, its chains are listed, as `chainmerge list` does.
    """
    # Unlike Path.is_dir, it has an answer for names that no file can have.
    if os.path.isdir(image):  # noqa: PTH112
        table = partial(chains_report, options=words_of(access))
        output.document(api.list_chains(image, access), table)
        return
    output.document(
        api.inspect(image, access),
        lambda report: chain_report(report, map_for_strip(image, access)),
    )
