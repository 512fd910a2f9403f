# SPDX-License-Identifier: Apache-2.0
"""Merges of closed images, which name the way into a running VM where one has the images open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from chainmerge.cli.typed import PlanningCommand, same_as_far_as_known
from chainmerge.storage.errors import ImageLocked

if TYPE_CHECKING:
    from chainmerge.documents.plan import MergePlan
    from chainmerge.errors import ChainmergeError


class ColdMergeCommand(PlanningCommand):
    """A command that needs images that nobody has open."""

    def advised(self, ctx: click.Context, error: ChainmergeError) -> ChainmergeError:
        """The same error; what to do begins with the command for the VM, if there is one."""
        if not isinstance(error, ImageLocked):
            return error
        with ctx.scope(cleanup=False):
            way = way_into_vm(ctx.params["tops"])
        return error.advised(way) if way else error


def with_way_into_vm(plan: MergePlan) -> MergePlan:
    """The same plan; where an image is locked, the hint begins as that of the error does."""
    if not any(one.code == ImageLocked.code for one in plan.refusals):
        return plan
    context = click.get_current_context()
    way = way_into_vm(context.params["tops"])
    refusals = tuple(
        replace(one, hint=way + one.hint) if one.code == ImageLocked.code else one
        for one in plan.refusals
    )
    return replace(plan, refusals=refusals)


def way_into_vm(tops: tuple[str, ...]) -> str:
    """The beginning of a hint: the command that merges in the VM that has the image open.

    Empty if there is none: VMs merge one disk at a time.
    """
    if len(tops) != 1:
        return ""
    # Imported where it is used: few merges meet a running VM.
    from chainmerge.live.found_vm import vm_that_has_open  # noqa: PLC0415

    vm = vm_that_has_open(Path(tops[0]))
    if vm is None:
        return ""
    line = same_as_far_as_known(("live", "merge"), *vm.address)
    unknown = f" ({'; '.join(vm.unknown)})" if vm.unknown else ""
    return f"to merge while the VM runs: `{line}`{unknown}; otherwise "
