# SPDX-License-Identifier: Apache-2.0
"""``chainmerge live``: merges in a running VM."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, get_args

import click

from chainmerge import live as api
from chainmerge.cli.commands import Command, Group
from chainmerge.cli.errors import NotConfirmed
from chainmerge.cli.options import (
    access_options,
    bases_option,
    extend_pool_option,
    history_option,
    json_option,
    lock_command_option,
    merging_option,
    outcome_options,
    tops_to_find_argument,
    verbose_option,
)
from chainmerge.cli.output import show_before_asking
from chainmerge.cli.params import SIZE
from chainmerge.cli.plan import PLANS_TO_SHOW, show_plan, show_plans
from chainmerge.cli.signals import stopped_by_signals
from chainmerge.cli.typed import PlanningCommand, same_with
from chainmerge.cli.vm_disks import OneDisk, disk_options, disks_options, vm_options
from chainmerge.errors import ExitCode
from chainmerge.options import (
    DirectionChoice,
    LiveOptions,
    StallChoice,
    VerifyLevel,
    VolumeChoice,
)
from chainmerge.report.live_tables import live_status_report, vm_repair_report
from chainmerge.report.merge_tables import (
    live_disks_details,
    live_disks_report,
    live_merge_details,
    live_merge_report,
)

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.cli.vm_disks import DisksOfVm, QmpAddress
    from chainmerge.options import Access

P = ParamSpec("P")
R = TypeVar("R")
Function = Callable[..., R]

_LIVE_FIELDS: Final = LiveOptions.__struct_fields__


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
    @history_option
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
    @extend_pool_option
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
@tops_to_find_argument
@bases_option
@disks_options
@result_options
@pace_options
@gathered_live_options
@access_options
@verbose_option
@json_option
def plan(
    *,
    tops: tuple[str, ...],
    bases: tuple[str, ...],
    disks: DisksOfVm,
    options: LiveOptions,
    access: Access,
    verbose: bool,
    output: Output,
) -> ExitCode:
    """Show what a merge of TOP in the VM would do. Nothing is changed.

    Several disks are named as for `live merge`. The exit status is 3 if the merge would be refused.
    """
    command, tables = same_with("live", "merge"), PLANS_TO_SHOW[verbose]
    if not isinstance(disks, OneDisk):
        return show_plans(disks.plan(tops, bases, access, options), command, output, tables)
    top, base = disks.images_to_merge(tops, bases)
    with disks.open() as vm:
        decided = api.plan(vm, top, base, access, options)
    return show_plan(decided, command, output, tables)


@live.command(cls=Command)
@tops_to_find_argument
@bases_option
@disks_options
@result_options
@pace_options
@gathered_live_options
@access_options
@verbose_option
@outcome_options
def merge(
    *,
    tops: tuple[str, ...],
    bases: tuple[str, ...],
    disks: DisksOfVm,
    options: LiveOptions,
    access: Access,
    verbose: bool,
    output: Output,
) -> ExitCode:
    """Merge TOP, and all images between, into BASE while the VM runs; or the other way.

    Ends with status 0 only when the VM reports success, and what it does not write to was read
    back. The same command, or `live resume`, continues a merge that was interrupted or killed.
    Ctrl-C undoes the merge.

    Several disks of the VM are merged as one operation: name the disk of each TOP in the same
    order, or give --all-disks. All are planned before the VM is told anything, and the report says
    what happened to each.
    """
    if not isinstance(disks, OneDisk):
        with stopped_by_signals() as should_stop, output.progress() as progress:
            done = disks.merge(tops, bases, access, options, progress.update, should_stop)
        output.last_event(
            done, live_disks_details if verbose else live_disks_report, done.exit_code
        )
        return done.exit_code
    top, base = disks.images_to_merge(tops, bases)
    with (
        stopped_by_signals() as should_stop,
        output.progress() as progress,
        disks.open() as vm,
    ):
        report = api.merge(
            vm, top, base, access, options, on_progress=progress.update, should_stop=should_stop
        )
    output.last_event(report, live_merge_details if verbose else live_merge_report)
    return ExitCode.DONE


@live.command(cls=Command)
@disk_options
@pace_options
@gathered_live_options
@lock_command_option
@verbose_option
@outcome_options
def resume(
    *,
    disk: OneDisk,
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
        disk.open() as vm,
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
def status(*, disk: OneDisk, output: Output) -> None:
    """Show which merges of this disk are unfinished. Nothing is changed."""
    with disk.open() as vm:
        found = api.status(vm)
    output.document(found, live_status_report)


@live.command(cls=Command)
@click.argument("bitmaps", metavar="[BITMAP]...", nargs=-1)
@vm_options
@click.option(
    "--cancel-job",
    "jobs",
    multiple=True,
    metavar="ID",
    help="Also cancel this job, such as a backup whose target is gone.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be done and change nothing.")
@outcome_options
def repair(
    *,
    bitmaps: tuple[str, ...],
    vm: QmpAddress,
    jobs: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    output: Output,
) -> ExitCode:
    """Remove what interrupted backups have left in a VM, as far as nobody uses it.

    Jobs that have ended, exports without clients, inconsistent bitmaps, and bitmaps in memory that
    record nothing. Shows them, and asks. Checkpoints always stay. BITMAP names one in memory that
    records, and that no backup builds on. The exit status is 1 if something did not go.
    """
    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run contradict each other")
    with vm.machine() as machine:
        if not yes:
            planned = api.plan_repair(machine, bitmaps, jobs)
            if dry_run or not any(one.action for one in planned.leftovers):
                output.document(planned, vm_repair_report)
                return ExitCode.DONE
            if not sys.stdin.isatty():
                raise click.UsageError(
                    "live repair asks first, and there is no terminal: add --yes"
                )
            show_before_asking(planned, vm_repair_report)
            if not click.confirm("Remove them", err=True):
                raise NotConfirmed(machine.name)
        done = api.repair(machine, bitmaps, jobs)
    status = ExitCode.FAILED if done.has_failed else ExitCode.DONE
    output.document(done, vm_repair_report, status)
    return status
