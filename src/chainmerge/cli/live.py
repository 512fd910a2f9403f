# SPDX-License-Identifier: Apache-2.0
"""``chainmerge live``: merges in a running VM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar, get_args

import click

from chainmerge import live as api
from chainmerge.cli.commands import Command, Group, PanelOption
from chainmerge.cli.errors import DiskNotNamed
from chainmerge.cli.options import (
    access_options,
    base_option,
    json_option,
    lock_command_option,
    merging_option,
    outcome_options,
    top_argument,
    verbose_option,
)
from chainmerge.cli.params import SIZE
from chainmerge.cli.plan import PLANS_TO_SHOW, show_plan
from chainmerge.cli.signals import stopped_by_signals
from chainmerge.cli.typed import PlanningCommand, same_with
from chainmerge.options import (
    DirectionChoice,
    LiveOptions,
    StallChoice,
    VerifyLevel,
    VolumeChoice,
)
from chainmerge.report.live_tables import live_status_report
from chainmerge.report.merge_tables import live_merge_details, live_merge_report

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from chainmerge.cli.output import Output
    from chainmerge.errors import ExitCode
    from chainmerge.options import Access

P = ParamSpec("P")
R = TypeVar("R")
Function = Callable[..., R]

_disk_option: Final = partial(click.option, cls=PanelOption, panel="The disk")
_LIVE_FIELDS: Final = LiveOptions.__struct_fields__
_Opener: TypeAlias = "Callable[[], AbstractContextManager[api.LiveDisk]]"


def disk_options(function: Function[R]) -> Function[R]:
    """Add the options that lead to a disk of a VM; the command gets ``disk``, to be entered."""

    @_disk_option(
        "--qmp", type=click.Path(), metavar="SOCKET", help="The VM's QMP socket, a Unix socket."
    )
    @_disk_option(
        "--device", metavar="ID", help="The disk, by the id of the guest's device or of its drive."
    )
    @_disk_option("--node", metavar="NODE", help="The disk, by the node name of its image.")
    @_disk_option(
        "--monitor-hold",
        type=click.FloatRange(min=0, max=3600),
        metavar="SECONDS",
        default=api.DEFAULT_HOLD_SECONDS,
        show_default=True,
        help="Keep others from the QMP socket for so long at a time while data is copied.",
    )
    @_disk_option("--domain", metavar="NAME", help="The VM, as a libvirt domain.")
    @_disk_option("--disk", "target", metavar="TARGET", help="Its disk, by the target: vda.")
    @_disk_option(
        "--connect",
        metavar="URI",
        help=f"The libvirt that runs it; {api.DEFAULT_URI} if not given.",
    )
    @wraps(function)
    def command(
        *args: Any,
        qmp: str | None,
        device: str | None,
        node: str | None,
        monitor_hold: float,
        domain: str | None,
        target: str | None,
        connect: str | None,
        **kwargs: Any,
    ) -> R:
        by_qmp, by_libvirt = (qmp, device, node), (domain, target, connect)
        if any(by_qmp) == any(by_libvirt):
            raise DiskNotNamed
        if any(by_qmp):
            disk = _disk_of_socket(*by_qmp, monitor_hold)
        else:
            disk = _disk_of_domain(*by_libvirt)
        return function(*args, disk=disk, **kwargs)

    return command


def _disk_of_socket(
    qmp: str | None, device: str | None, node: str | None, monitor_hold: float
) -> _Opener:
    if qmp is None or (device is None) == (node is None):
        raise DiskNotNamed
    return lambda: api.QmpVm(qmp, device=device, node=node, monitor_hold=monitor_hold)


def _disk_of_domain(domain: str | None, target: str | None, connect: str | None) -> _Opener:
    if domain is None or target is None:
        raise DiskNotNamed
    return lambda: api.DomainDisk(domain, target, connect or api.DEFAULT_URI)


def pace_options(function: Function[R]) -> Function[R]:
    """Add the options that say how fast to merge in a VM, and on what; see LiveOptions."""
    defaults = LiveOptions()

    @merging_option(
        "--bandwidth",
        type=SIZE,
        metavar="RATE",
        help="Copy at most this many bytes per second, such as 100M.",
    )
    @merging_option(
        "--deadline",
        type=click.FloatRange(min=0, max=86400 * 365),
        metavar="SECONDS",
        help="How long the copy may take to catch up with what the guest writes.",
    )
    @merging_option(
        "--on-stall",
        type=click.Choice(get_args(StallChoice)),
        default=defaults.on_stall,
        show_default=True,
        help="What to do if it does not: go on, slow the guest's disk down, or undo the merge.",
    )
    @merging_option(
        "--volume",
        type=click.Choice(get_args(VolumeChoice)),
        default=defaults.volume,
        show_default=True,
        help="What kind of volume base lies on.",
    )
    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> R:
        return function(*args, **kwargs)

    return command


def result_options(function: Function[R]) -> Function[R]:
    """Add the options that say what is to come of a merge in a VM; see LiveOptions."""
    defaults = LiveOptions()

    @merging_option(
        "--verify",
        type=click.Choice(get_args(VerifyLevel)),
        default=defaults.verify,
        show_default=True,
        help="Also compare base's content with top's (full), if the guest does not write to base, "
        "or check only bitmaps and metadata.",
    )
    @merging_option(
        "--delete",
        is_flag=True,
        help="Delete the merged images once the VM has closed them and everything is verified.",
    )
    @merging_option(
        "--drop-bitmaps",
        is_flag=True,
        help="Go on even if base cannot hold bitmaps: the next backup must be a full one.",
    )
    @merging_option(
        "--direction",
        type=click.Choice(get_args(DirectionChoice)),
        default=defaults.direction,
        show_default=True,
        help="Move TOP's data down into BASE (commit), or what TOP lacks up from BASE (pull), "
        "which leaves BASE as it is.",
    )
    @merging_option(
        "--size-limit",
        type=SIZE,
        metavar="SIZE",
        help="Refuse a merge after which base's file could be larger than SIZE.",
    )
    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> R:
        return function(*args, **kwargs)

    return command


def gathered_live_options(function: Function[R]) -> Function[R]:
    """Give the command one object, ``options``, for the options above that it has."""

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> R:
        chosen = {name: kwargs.pop(name) for name in _LIVE_FIELDS if name in kwargs}
        return function(*args, options=LiveOptions(**chosen), **kwargs)

    return command


@click.group(cls=Group)
def live() -> None:
    """Merge images of a running VM, in its own QEMU."""


@live.command(cls=PlanningCommand)
@top_argument
@base_option
@disk_options
@result_options
@pace_options
@gathered_live_options
@access_options
@verbose_option
@json_option
def plan(
    *,
    top: str,
    base: str | None,
    disk: _Opener,
    options: LiveOptions,
    access: Access,
    verbose: bool,
    output: Output,
) -> ExitCode:
    """Show what a merge of TOP in the VM would do. Nothing is changed.

    The exit status is 3 if the merge would be refused.
    """
    with disk() as vm:
        decided = api.plan(vm, top, base, access, options)
    command = same_with("chainmerge", "live", "merge")
    return show_plan(decided, command, output, PLANS_TO_SHOW[verbose])


@live.command(cls=Command)
@top_argument
@base_option
@disk_options
@result_options
@pace_options
@gathered_live_options
@access_options
@verbose_option
@outcome_options
def merge(
    *,
    top: str,
    base: str | None,
    disk: _Opener,
    options: LiveOptions,
    access: Access,
    verbose: bool,
    output: Output,
) -> None:
    """Merge TOP, and all images between, into BASE while the VM runs; or the other way.

    Ends with status 0 only when the VM reports success, and what it does not write to was read
    back. The same command, or `live resume`, continues a merge that was interrupted or killed.
    Ctrl-C undoes the merge.
    """
    with (
        stopped_by_signals() as should_stop,
        output.progress() as progress,
        disk() as vm,
    ):
        report = api.merge(
            vm, top, base, access, options, on_progress=progress.update, should_stop=should_stop
        )
    output.last_event(report, live_merge_details if verbose else live_merge_report)


@live.command(cls=Command)
@disk_options
@pace_options
@gathered_live_options
@lock_command_option
@verbose_option
@outcome_options
def resume(
    *,
    disk: _Opener,
    options: LiveOptions,
    lock_command: str | None,
    verbose: bool,
    output: Output,
) -> None:
    """Continue the interrupted merge of this disk.

    What the merge does stays as first requested; how fast, and until when, is set again here.
    """
    with (
        stopped_by_signals() as should_stop,
        output.progress() as progress,
        disk() as vm,
    ):
        report = api.resume(
            vm,
            options,
            on_progress=progress.update,
            should_stop=should_stop,
            lock_command=lock_command,
        )
    output.last_event(report, live_merge_details if verbose else live_merge_report)


@live.command(cls=Command)
@disk_options
@json_option
def status(*, disk: _Opener, output: Output) -> None:
    """Show which merges of this disk are unfinished. Nothing is changed."""
    with disk() as vm:
        found = api.status(vm)
    output.document(found, live_status_report)
