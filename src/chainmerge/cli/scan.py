# SPDX-License-Identifier: Apache-2.0
"""``chainmerge scan``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from chainmerge import api
from chainmerge.cli.commands import Command, PanelOption
from chainmerge.cli.options import named_places_options, outcome_options
from chainmerge.cli.params import IMAGE, SIZE
from chainmerge.documents.scan import Severity
from chainmerge.errors import ExitCode
from chainmerge.options import Access, ScanOptions
from chainmerge.report.scan_table import scan_report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chainmerge.cli.output import Output

_DEFAULTS: Final = ScanOptions()
_from_when_on: Final = partial(
    click.option, cls=PanelOption, panel="From when on something is said", show_default=True
)
_COUNT: Final = click.IntRange(min=1)
_PERCENT: Final = click.IntRange(0, 100)
_THRESHOLDS: Final = (
    ("length_info", _COUNT, "Images of a chain that are many."),
    ("length_warning", _COUNT, "Images of a chain that deserve a warning."),
    ("length_critical", _COUNT, "Images of a chain that are critical."),
    ("length_limit", _COUNT, "Images of a chain of which libvirt takes no more."),
    ("old_days", _COUNT, "Days that an overlay may be old."),
    ("hidden", SIZE, "Bytes that a merge must free to be worth while, such as 500M."),
    ("free_warning", _PERCENT, "Percent free that a file system or a volume should have."),
    ("free_critical", _PERCENT, "Percent free below which it is critical."),
)


def _threshold_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for name, kind, text in reversed(_THRESHOLDS):
        option = _from_when_on(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=getattr(_DEFAULTS, name),
            help=text,
        )
        function = option(function)
    return function


@click.command(cls=Command)
@click.argument("paths", nargs=-1, type=IMAGE, metavar="[PATH]...")
@click.option("--domains", is_flag=True, help="Also the disks of all domains of libvirt.")
@click.option(
    "--connect", metavar="URI", default="qemu:///system", show_default=True, help="Which libvirt."
)
@click.option(
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
@click.option(
    "--fail-on",
    type=click.Choice([Severity.WARNING.value, Severity.CRITICAL.value]),
    help="End with exit status 5 if a finding is that severe.",
)
@click.option("--sqlite", metavar="FILE", type=click.Path(), help="Also write it as tables.")
@_threshold_options
@named_places_options
@outcome_options
def scan(
    *,
    paths: tuple[str, ...],
    domains: bool,
    connect: str,
    fail_on: str | None,
    sqlite: str | None,
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
    disks = api.domain_disks(connect) if domains else None
    with output.progress() as display:
        report = api.scan(paths, access, ScanOptions(**chosen), disks, display.update)
    if sqlite is not None:
        api.save_scan(report, sqlite)
    fails = fail_on is not None and report.has_at_least(Severity(fail_on))
    status = ExitCode.UNFINISHED if fails else ExitCode.DONE
    output.last_event(report, scan_report, status)
    return status
