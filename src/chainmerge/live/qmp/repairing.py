# SPDX-License-Identifier: Apache-2.0
"""Removes what interrupted backups have left in a running VM, as far as nobody uses it.

Jobs end first: what they used is free then. QEMU itself refuses what somebody uses, and what it
refuses stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from chainmerge.documents.repair import VmRepairReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.live.errors import NoSuchLeftover, VmRefused
from chainmerge.live.qmp.leftovers import NamedForRemoval, find_leftovers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.documents.repair import VmLeftover
    from chainmerge.live.qmp.machine import QmpMachine

_KINDS: Final = ("job", "export", "bitmap")
# A job whose target hangs may not end at all.
_LOOKS_FOR_THE_END: Final = 40
_SECONDS_BETWEEN_LOOKS: Final = 0.25


def plan_repair(
    machine: QmpMachine, bitmaps: Sequence[str] = (), jobs: Sequence[str] = ()
) -> VmRepairReport:
    """Say what :func:`repair` would do. Nothing is changed.

    Raises NoSuchLeftover, VmUnreachable, VmRefused.
    """
    wanted = _wanted(machine, bitmaps, jobs)
    leftovers = tuple(find_leftovers(machine.state(), wanted))
    return VmRepairReport(REPORT_VERSION, machine.name, dry_run=True, leftovers=leftovers)


def repair(
    machine: QmpMachine, bitmaps: Sequence[str] = (), jobs: Sequence[str] = ()
) -> VmRepairReport:
    """Remove what nobody uses: jobs that have ended, exports without clients, worthless bitmaps.

    Checkpoints stay, whatever is asked for: bitmaps that are persistent and consistent.

    Args:
        machine: the VM.
        bitmaps: names of bitmaps in memory alone that go although they record.
        jobs: ids of jobs of others that are cancelled, whatever they do.

    Raises NoSuchLeftover, VmUnreachable, VmRefused.
    """
    wanted = _wanted(machine, bitmaps, jobs)
    done: list[VmLeftover] = []
    for kind in _KINDS:
        # What one kind used is free once it is gone.
        found = [one for one in find_leftovers(machine.state(), wanted) if one.kind == kind]
        done += (_carried_out(machine, one) for one in found)
    return VmRepairReport(REPORT_VERSION, machine.name, dry_run=False, leftovers=tuple(done))


def _wanted(machine: QmpMachine, bitmaps: Sequence[str], jobs: Sequence[str]) -> NamedForRemoval:
    """What was named, if it is there and may go."""
    wanted = NamedForRemoval(frozenset(jobs), frozenset(bitmaps))
    state = machine.state()
    found = list(find_leftovers(state, wanted))
    going = {(one.kind, one.name) for one in found if one.action is not None}
    named = (*(("job", name) for name in jobs), *(("bitmap", name) for name in bitmaps))
    for kind, name in named:
        # Bitmaps that cannot be asked for yet are looked for when jobs have been dismissed.
        if (kind, name) not in going and (kind == "job" or state.tells_nodes):
            raise NoSuchLeftover(machine.name, kind, name)
    return wanted


def _carried_out(machine: QmpMachine, one: VmLeftover) -> VmLeftover:
    """Do it; what QEMU refuses stays, with its reason."""
    try:
        match one.action:
            case "dismiss":
                machine.execute("job-dismiss", id=one.name)
            case "cancel":
                return _cancelled(machine, one)
            case "remove" if one.kind == "export":
                machine.execute("block-export-del", id=one.name, mode="safe")
            case "remove":
                machine.execute("block-dirty-bitmap-remove", node=one.node, name=one.name)
            case _:
                return one
    except VmRefused as refused:
        if one.kind == "export":
            advice = "disconnect the client, or end the backup that reads from it"
            return replace(one, action=None, reason=refused.reason, advice=advice)
        return replace(one, reason=refused.reason)
    return replace(one, done=True)


def _cancelled(machine: QmpMachine, one: VmLeftover) -> VmLeftover:
    machine.execute("job-cancel", id=one.name)
    for _ in range(_LOOKS_FOR_THE_END):
        job = next((job for job in machine.state().jobs if job["id"] == one.name), None)
        if job is None:
            return replace(one, done=True)
        if job["status"] == "concluded":
            machine.execute("job-dismiss", id=one.name)
            return replace(one, done=True)
        machine.wait_for_event(_SECONDS_BETWEEN_LOOKS)
    return replace(one, reason="it was cancelled and has not ended: its target may hang")
