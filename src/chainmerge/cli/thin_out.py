# SPDX-License-Identifier: Apache-2.0
"""``chainmerge thin-out``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from msgspec.structs import replace

from chainmerge import api
from chainmerge.cli.commands import PanelOption
from chainmerge.cli.options import (
    access_options,
    dry_run_option,
    merge_options,
    outcome_options,
    verbose_option,
)
from chainmerge.cli.params import DURATION, IMAGE
from chainmerge.cli.signals import stopped_by_signals
from chainmerge.cli.typed import PlanningCommand, program, same_with
from chainmerge.errors import ExitCode
from chainmerge.options import Retention
from chainmerge.records.request import shell_line
from chainmerge.report.thin_out_tables import (
    thin_out_details,
    thin_out_plan,
    thin_out_plan_details,
    thin_out_report,
)
from chainmerge.storage.errors import ImageLocked

if TYPE_CHECKING:
    from chainmerge.cli.output import Output
    from chainmerge.documents.retention import ThinOutPlan
    from chainmerge.errors import ChainmergeError
    from chainmerge.options import Access, MergeOptions

_retention_option: Final = partial(click.option, cls=PanelOption, panel="Which snapshots stay")


class ThinOutCommand(PlanningCommand):
    """A command that needs a chain that nobody has open."""

    def advised(self, ctx: click.Context, error: ChainmergeError) -> ChainmergeError:
        """The same error; what to do begins with what can be done in the VM, if there is one."""
        if not isinstance(error, ImageLocked):
            return error
        way = _way_into_vm(ctx.params["leaf"])
        return error.advised(way) if way else error


def _with_way_into_vm(plan: ThinOutPlan, leaf: str) -> ThinOutPlan:
    """The same plan; where an image is locked, the hint begins as that of the error does."""
    if not any(one.code == ImageLocked.code for one in plan.refusals):
        return plan
    way = _way_into_vm(leaf)
    refusals = tuple(
        replace(one, hint=way + one.hint) if one.code == ImageLocked.code else one
        for one in plan.refusals
    )
    return replace(plan, refusals=refusals)


def _way_into_vm(leaf: str) -> str:
    """The beginning of a hint: what merges in the VM that has the leaf open; empty without one."""
    # Imported where it is used: few runs meet a running VM.
    from chainmerge.live.found_vm import vm_that_has_open  # noqa: PLC0415

    vm = vm_that_has_open(Path(leaf))
    if vm is None:
        return ""
    line = shell_line([*program(), "live", "merge", *vm.address])
    unknown = f" ({'; '.join(vm.unknown)})" if vm.unknown else ""
    return (
        f"to merge one range while the VM runs: `{line} --base BASE TOP`, with the images that "
        f"--dry-run names{unknown}; otherwise "
    )


@click.command(cls=ThinOutCommand)
@click.argument("leaf", type=IMAGE)
@_retention_option(
    "--keep-last",
    type=click.IntRange(min=0),
    metavar="N",
    help="Keep the last N snapshots; 0 keeps none.",
)
@_retention_option(
    "--keep-within",
    type=DURATION,
    metavar="AGE",
    help="Keep snapshots that are not older than this, such as 12h, 7d or 4w.",
)
@_retention_option(
    "--keep",
    multiple=True,
    metavar="PATTERN",
    help="Keep snapshots whose image has a file name like this, such as 'monthly-*'; may be given "
    "several times.",
)
@_retention_option(
    "--keep-checkpoints",
    is_flag=True,
    help="Keep the snapshots at which a checkpoint begins that backups can use, too.",
)
@dry_run_option
@merge_options
@access_options
@verbose_option
@outcome_options
def thin_out(
    *,
    leaf: str,
    keep_last: int | None,
    keep_within: int | None,
    keep: tuple[str, ...],
    keep_checkpoints: bool,
    dry_run: bool,
    options: MergeOptions,
    access: Access,
    verbose: bool,
    output: Output,
) -> ExitCode:
    """Merge away the snapshots below LEAF that no rule keeps.

    What one of several rules keeps stays; so does what another branch, another process or a
    checkpoint needs. LEAF and the snapshots that stay show what they showed, under their names.
    The merged images are deleted. The same command finishes what was interrupted or killed.
    """
    retention = Retention(keep_last, keep_within, keep, keep_checkpoints)
    if dry_run:
        return _show(leaf, retention, access, options, output, verbose=verbose)
    with stopped_by_signals() as should_stop, output.progress() as progress:
        report = api.thin_out(
            leaf,
            retention,
            access,
            options,
            on_progress=progress.update,
            should_stop=should_stop,
        )
    output.last_event(report, thin_out_details if verbose else thin_out_report, report.exit_code)
    return report.exit_code


def _show(
    leaf: str,
    retention: Retention,
    access: Access,
    options: MergeOptions,
    output: Output,
    *,
    verbose: bool,
) -> ExitCode:
    decided = _with_way_into_vm(api.plan_thin_out(leaf, retention, access, options), leaf)
    table = thin_out_plan_details if verbose else thin_out_plan
    command = same_with("thin-out")
    status = ExitCode.DONE if decided.feasible else ExitCode.REFUSED
    output.document(decided, lambda plan: table(plan, command), status)
    return status
