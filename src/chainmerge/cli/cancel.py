# SPDX-License-Identifier: Apache-2.0
"""``chainmerge cancel``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import access_options, image_argument, json_option
from chainmerge.report.status_table import cancel_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access


@click.command(cls=Command)
@image_argument
@click.option(
    "--shrink", is_flag=True, help="Reduce the logical volume that the merge had extended."
)
@access_options
@json_option
def cancel(*, image: str, shrink: bool, access: Access, output: Output) -> None:
    """Undo an interrupted merge that has not taken effect. IMAGE is its top or its base.

    Of snapshots that are thinned out it may be the leaf; what is merged already stays merged.

    Gives back the space that it took. No data changes. A merge that has taken effect is refused,
    with the command that finishes it; `chainmerge status` tells which.
    """
    output.document(api.cancel(image, access, shrink=shrink), cancel_report)
