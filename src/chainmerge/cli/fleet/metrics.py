# SPDX-License-Identifier: Apache-2.0
"""``chainmerge fleet metrics``."""

from __future__ import annotations

import time

import click

from chainmerge.cli.commands import Command
from chainmerge.cli.errors import MetricsMissing
from chainmerge.cli.fleet.configuration import database_option
from chainmerge.cli.streams import write_report
from chainmerge.fleet.inventory_store import pictures_of_fleet
from chainmerge.fleet.overview import status


@click.command(cls=Command)
@click.option(
    "--textfile",
    metavar="FILE.prom",
    type=click.Path(),
    help="Write them there, as a whole, for node_exporter's textfile collector.",
)
@database_option
def metrics(*, textfile: str | None, database: str) -> None:
    """Print jobs, hosts, keys and the inventory as metrics for Prometheus."""
    from chainmerge.report.fleet_metrics import metrics_of_fleet  # noqa: PLC0415
    from chainmerge.report.metrics import METRICS_BEGINNING  # noqa: PLC0415

    try:
        text = metrics_of_fleet(status(database), pictures_of_fleet(database, int(time.time())))
    except ImportError as error:
        raise MetricsMissing(str(error)) from error
    if textfile is None:
        write_report(text.decode())
        return
    from chainmerge.cli.report_file import write_whole_file  # noqa: PLC0415

    write_whole_file(textfile, text, METRICS_BEGINNING)
