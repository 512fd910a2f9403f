# SPDX-License-Identifier: Apache-2.0
"""``chainmerge measure``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import (
    access_options,
    base_option,
    json_option,
    merge_options,
    top_argument,
)
from chainmerge.report.tables import measurement_report

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.options import Access, MergeOptions


@click.command(cls=Command)
@top_argument
@base_option
@merge_options
@access_options
@json_option
def measure(
    *, top: str, base: str | None, options: MergeOptions, access: Access, output: Output
) -> None:
    """Show how large base must be for a merge of TOP, and how large it will be afterwards."""
    output.document(api.measure(top, base, access, options), measurement_report)
