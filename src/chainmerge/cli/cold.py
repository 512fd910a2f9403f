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
    from chainmerge.documents.disks import DisksPlan
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


def all_with_way_into_vm(plan: DisksPlan) -> DisksPlan:
    """The same plan of several disks; as :func:`with_way_into_vm`, of each."""
    return replace(plan, disks=tuple(map(with_way_into_vm, plan.disks)))


def way_into_vm(tops: tuple[str, ...]) -> str:
    """The beginning of a hint: the command that merges in the VM that has the image open.

    Empty if there is none, or the images are open in more than one.
    """
    # Imported where it is used: few merges meet a running VM.
    from chainmerge.live.found_vm import vm_that_has_open  # noqa: PLC0415

    found = [vm_that_has_open(Path(top)) for top in tops]
    vms = [vm for vm in found if vm is not None]
    if len(vms) != len(tops) or len({vm.process for vm in vms}) != 1:
        return ""
    place = vms[0].address
    if len(vms) > 1:
        place = (*place[:2], "--all-disks")
    line = same_as_far_as_known(("live", "merge"), *place)
    unknown = "; ".join(why for why in vms[0].unknown if why.split()[0] in place)
    explained = f" ({unknown})" if unknown else ""
    return f"to merge while the VM runs: `{line}`{explained}; otherwise "
