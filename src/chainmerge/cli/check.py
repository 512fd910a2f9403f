# SPDX-License-Identifier: Apache-2.0
"""``chainmerge check``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import access_options, image_argument, json_option
from chainmerge.errors import ExitCode
from chainmerge.report.tables import check_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access


@click.command(cls=Command)
@image_argument
@access_options
@json_option
def check(*, image: str, access: Access, output: Output) -> ExitCode:
    """Check IMAGE for corruption and leaked clusters. Nothing is changed.

    The exit status is 1 if the image is corrupt. Leaked clusters only waste space and
    leave the status at 0.
    """
    result = api.check_image(image, access)
    output.document(result, check_report)
    return ExitCode.FAILED if result.corruptions else ExitCode.DONE
