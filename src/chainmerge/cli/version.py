# SPDX-License-Identifier: Apache-2.0
"""``chainmerge version``."""

from __future__ import annotations

import click

from chainmerge.__about__ import __version__
from chainmerge.cli.commands import Command
from chainmerge.cli.streams import write_report


@click.command(cls=Command)
def version() -> None:
    """Print the version."""
    write_report(f"chainmerge {__version__}\n")
