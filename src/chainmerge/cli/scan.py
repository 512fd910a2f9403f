# SPDX-License-Identifier: Apache-2.0
"""``chainmerge scan``."""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from chainmerge import api
from chainmerge.cli.commands import Command, PanelOption
from chainmerge.cli.errors import MetricsMissing
from chainmerge.cli.options import history_option, named_places_options, outcome_options
from chainmerge.cli.params import IMAGE, SIZE
from chainmerge.documents.scan import Severity
from chainmerge.errors import ExitCode
from chainmerge.options import Access, ScanOptions
from chainmerge.report.scan_table import scan_report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chainmerge.cli.output import Output
    from chainmerge.documents.scan import ScanReport

_DEFAULTS: Final = ScanOptions()
_looking_option: Final = partial(click.option, cls=PanelOption, panel="Where to look")
_KINDS: Final = {
    "N": click.IntRange(min=1),
    "DAYS": click.IntRange(min=1),
    "PERCENT": click.IntRange(0, 100),
    "SIZE": SIZE,
}
_THRESHOLDS: Final = (
    ("length_info", "N", "Images in a chain that is long."),
    ("length_warning", "N", "Images in a chain that is too long."),
    ("length_critical", "N", "Images in a chain that is critical."),
    ("length_limit", "N", "Images in a chain that libvirt refuses."),
    ("old_days", "DAYS", "Age at which an overlay is old."),
    ("hidden", "SIZE", "What a merge frees at least."),
    ("free_warning", "PERCENT", "What a file system or device should have free."),
    ("free_critical", "PERCENT", "What it must have free."),
)
_GIB: Final = 1 << 30


def _with_thresholds(function: Callable[..., Any]) -> Callable[..., Any]:
    for name, metavar, text in reversed(_THRESHOLDS):
        default = getattr(_DEFAULTS, name)
        option = click.option(
            f"--{name.replace('_', '-')}",
            cls=PanelOption,
            panel="Thresholds",
            type=_KINDS[metavar],
            metavar=metavar,
            default=f"{default // _GIB}G" if metavar == "SIZE" else default,
            show_default=True,
            help=text,
        )
        function = option(function)
    return function


@click.command(cls=Command)
@click.argument("paths", nargs=-1, type=IMAGE, metavar="[PATH]...")
@_looking_option("--domains", is_flag=True, help="Also the disks of all domains of libvirt.")
@_looking_option(
    "--connect", metavar="URI", default="qemu:///system", show_default=True, help="Which libvirt."
)
@_looking_option(
    "--one-file-system/--all-file-systems",
    default=True,
    help="Whether to leave out what is mounted below a PATH.  [default: leave it out]",
)
@click.option("--check", is_flag=True, help="Check the refcounts of all images, which takes time.")
@click.option(
    "--cache/--no-cache",
    default=True,
    help="Whether to use what is known of unchanged images, and keep it.  [default: use it]",
)
@history_option
@click.option(
    "--fail-on",
    type=click.Choice([Severity.WARNING.value, Severity.CRITICAL.value]),
    help="End with exit status 5 if a finding is that severe.",
)
@click.option("--sqlite", metavar="FILE", type=click.Path(), help="Also write it as tables.")
@click.option(
    "--textfile",
    metavar="FILE.prom",
    type=click.Path(),
    help="Also write it as metrics, for node_exporter's textfile collector.",
)
@_with_thresholds
@named_places_options
@outcome_options
def scan(
    *,
    paths: tuple[str, ...],
    domains: bool,
    connect: str,
    fail_on: str | None,
    sqlite: str | None,
    textfile: str | None,
    formats: Mapping[str, str],
    allow_backing: tuple[str, ...],
    output: Output,
    **chosen: Any,
) -> ExitCode:
    """Find all images and chains, and what is wrong with them.

    Nothing is changed or locked. A PATH is a directory with everything below, an image, or a
    volume group.  [default: the current directory; with --domains, their disks]
    """
    access = Access(formats=dict(formats), allow_backing=allow_backing)
    # Before all images are read.
    write_metrics = _no_metrics if textfile is None else _metrics_writer(textfile)
    disks = api.domain_disks(connect) if domains else None
    with output.progress() as display:
        report = api.scan(paths, access, ScanOptions(**chosen), disks, display.update)
    if sqlite is not None:
        api.save_scan(report, sqlite)
    write_metrics(report)
    fails = fail_on is not None and report.has_at_least(Severity(fail_on))
    status = ExitCode.UNFINISHED if fails else ExitCode.DONE
    output.last_event(report, scan_report, status)
    return status


def _no_metrics(report: ScanReport) -> None:
    del report


def _metrics_writer(file: str) -> Callable[[ScanReport], None]:
    """What writes a scan as metrics to a file.

    Raises MetricsMissing.
    """
    try:
        importlib.import_module("prometheus_client")
    except ImportError as error:
        raise MetricsMissing(str(error)) from error
    # Imported where they are used: few scans write metrics.
    from chainmerge.cli.report_file import write_whole_file  # noqa: PLC0415
    from chainmerge.report.metrics import METRICS_BEGINNING, metrics_of_scan  # noqa: PLC0415

    return lambda report: write_whole_file(file, metrics_of_scan(report), METRICS_BEGINNING)
