# SPDX-License-Identifier: Apache-2.0
"""All disks of a running VM that have something to merge, as one operation.

Which they are is found out once, and an interrupted run is asked first: what it was to merge is
recorded, and without that record a rerun would merge the next snapshot of the disks that are done.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.disks import DiskLeftOut, DisksPlan, DisksReport
from chainmerge.documents.progress import never, unheard
from chainmerge.live.disks import DiskMerge, carry_out_merges, plan_merges
from chainmerge.live.errors import BaseWithoutTop, NothingToMerge, NotInVm
from chainmerge.live.libvirt.machine import Domain
from chainmerge.live.merging import paths_of_chain, reads_image, unfinished_in
from chainmerge.live.qmp.machine import QmpMachine
from chainmerge.merging.disks import bases_for
from chainmerge.options import Access, LiveOptions
from chainmerge.records.disks import load_entry
from chainmerge.records.merged_record import load_merged_record
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chainmerge.documents.progress import OnProgress, ShouldStop
    from chainmerge.live.driving import LiveDisk
    from chainmerge.records.request import RecordedRequest

Machine: TypeAlias = QmpMachine | Domain
"""A running VM with all its disks, whichever way it is reached."""


class _Choice(Struct, frozen=True):
    """What is merged on which disk, and which disks are left out."""

    merges: tuple[DiskMerge, ...]
    left_out: tuple[DiskLeftOut, ...]


def plan_all_disks(
    machine: Machine,
    tops: Sequence[str | Path] = (),
    bases: Sequence[str | Path] = (),
    access: Access | None = None,
    options: LiveOptions | None = None,
) -> DisksPlan:
    """Say what :func:`merge_all_disks` would do. Nothing is changed.

    Raises what that raises, as far as it finds out without a change.
    """
    with contextlib.ExitStack() as stack:
        chosen = _chosen(stack, machine, tops, bases)
        decided = plan_merges(chosen.merges, access or Access(), options or LiveOptions())
    return replace(decided, left_out=chosen.left_out)


def merge_all_disks(
    machine: Machine,
    tops: Sequence[str | Path] = (),
    bases: Sequence[str | Path] = (),
    access: Access | None = None,
    options: LiveOptions | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> DisksReport:
    """Merge on all disks of a running VM that have a chain; those that have none are left out.

    A run that was interrupted is finished by the same call, with the images that it was to merge.
    What :func:`chainmerge.live.merge_disks` raises it raises, too.

    Args:
        machine: the VM.
        tops: the overlays; each tells its disk, and disks of which none is named are left out. By
            default what the guest writes to on each disk.
        bases: as many images below them, in the same order; none for their backing files.
        access: how images may be found and reached.
        options: how to merge each.
        on_progress: called as the work goes on; its events name the overlay.
        should_stop: asked as the work goes on.

    Raises:
        NothingToMerge: no disk is left.
        NotInVm: one of *tops* is not an image of any disk.
        BaseWithoutTop: there are bases, and no tops.
    """
    with contextlib.ExitStack() as stack:
        chosen = _chosen(stack, machine, tops, bases)
        report = carry_out_merges(
            chosen.merges,
            access or Access(),
            options or LiveOptions(),
            on_progress or unheard,
            should_stop or never,
        )
    return replace(report, left_out=chosen.left_out)


def _chosen(
    stack: contextlib.ExitStack,
    machine: Machine,
    tops: Sequence[str | Path],
    bases: Sequence[str | Path],
) -> _Choice:
    """Find what is to be merged; the disks are open until *stack* is closed."""
    if bases and not tops:
        raise BaseWithoutTop
    disks: dict[str, LiveDisk] = {}
    unsuited: dict[str, str] = {}
    for one in machine.disks():
        if one.unsuited is None:
            disk = machine.disk(one.name)
            stack.push(disk)
            disks[one.name] = disk
        else:
            unsuited[one.name] = one.unsuited
    if tops:
        found = _named(machine, disks, tops, bases)
        reason = "none of the images to merge is in its chain"
    elif (begun := _begun_with(disks)) is not None:
        found = _named(machine, disks, begun.tops, begun.bases)
        reason = f"the interrupted merge of {counted(len(begun.tops), 'disk')} is finished first"
    else:
        found, more = _with_chains(disks)
        unsuited |= more
        reason = ""
    unsuited |= {name: reason for name in disks if name not in found and name not in unsuited}
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in unsuited.items())
        raise NothingToMerge(machine.name, reasons or "it has no disks")
    left_out = tuple(DiskLeftOut(name, why) for name, why in unsuited.items())
    return _Choice(tuple(one for several in found.values() for one in several), left_out)


def _named(
    machine: Machine,
    disks: Mapping[str, LiveDisk],
    tops: Sequence[str | Path],
    bases: Sequence[str | Path],
) -> dict[str, list[DiskMerge]]:
    """The merges of images that are named, by the disks that they are images of.

    Raises DisksMismatched, NotInVm, ImageMissing.
    """
    chosen = bases_for(tops, bases)
    found: dict[str, list[DiskMerge]] = {}
    for top, base in zip(map(Path, tops), chosen, strict=True):
        name = next((name for name, vm in disks.items() if _concerns(vm, top)), None)
        if name is None:
            # Whether there is such an image at all, opening it says better.
            with FileReadable(top):
                chains = (str(path) for vm in disks.values() for path in paths_of_chain(vm))
                raise NotInVm(machine.name, str(top), ", ".join(chains))
        found.setdefault(name, []).append(DiskMerge(disks[name], top, base))
    return found


def _concerns(vm: LiveDisk, top: Path) -> bool:
    """Whether a disk reads *top*, or did before a merge of ours."""
    if reads_image(vm, top) or any(one.top.path == str(top.resolve()) for one in unfinished_in(vm)):
        return True
    record = load_merged_record(top)
    return record is not None and reads_image(vm, Path(record.base))


def _begun_with(disks: Mapping[str, LiveDisk]) -> RecordedRequest | None:
    """What an interrupted merge of several disks of this VM was asked for."""
    for vm in disks.values():
        for path in paths_of_chain(vm):
            entry = load_entry(path)
            if entry is not None and entry.live_request is not None:
                return entry.live_request
    return None


def _with_chains(
    disks: Mapping[str, LiveDisk],
) -> tuple[dict[str, list[DiskMerge]], dict[str, str]]:
    """What the guest writes to on each disk, into its backing file; why not, of other disks."""
    found, unsuited = {}, {}
    for name, vm in disks.items():
        layout = vm.layout()
        active, *below = layout.chain()
        path, begun = layout.path_of(active), next(unfinished_in(vm), None)
        if begun is not None:
            # What was begun on this disk alone comes first.
            found[name] = [DiskMerge(vm, Path(begun.top.path), Path(begun.base.path))]
        elif not below:
            unsuited[name] = "its image has no backing file"
        elif path is None:
            unsuited[name] = "its image is neither a file nor a block device"
        else:
            found[name] = [DiskMerge(vm, path, None)]
    return found, unsuited
