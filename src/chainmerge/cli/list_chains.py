# SPDX-License-Identifier: Apache-2.0
"""``chainmerge list``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from chainmerge import api
from chainmerge.cli.commands import Command
from chainmerge.cli.options import json_option, named_places_options
from chainmerge.cli.params import DIRECTORY
from chainmerge.options import Access
from chainmerge.records.request import words_of
from chainmerge.report.chains_table import chains_report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chainmerge.cli.output import Output


@click.command(cls=Command)
@click.argument("directory", type=DIRECTORY, default=".", metavar="[DIR]")
@named_places_options
@json_option
def list_chains(
    *,
    directory: str,
    formats: Mapping[str, str],
    allow_backing: tuple[str, ...],
    output: Output,
) -> None:
    """List the chains in DIR: what each takes, and what merging it frees.

    The chain that frees most comes first. What lies below DIR is not looked at.
    [default: the current directory]
    """
    access = Access(formats=dict(formats), allow_backing=allow_backing)
    table = partial(chains_report, options=words_of(access))
    output.document(api.list_chains(directory, access), table)
