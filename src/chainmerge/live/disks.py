# SPDX-License-Identifier: Apache-2.0
"""Several disks of a running VM, merged as one operation.

As with closed images, all are looked at and planned before the VM is told anything, so that what
would refuse one refuses all; then one is merged after the other, and the report says what happened
to each. What holds them together on disk is the same, too (:mod:`chainmerge.records.disks`): the
same call does the rest, and once the VM has ended, a merge of the closed images.

While one disk is merged, others are not kept: the guest writes to them, and a manager may take a
snapshot. So each is planned once more when its turn comes, into the base that it was planned for.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.documents.disks import DiskOutcome, DiskReport, DisksPlan, DisksReport
from chainmerge.documents.progress import ProgressEvent, Stage, never, unheard
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.errors import ChainmergeError, Interrupted
from chainmerge.live import merging
from chainmerge.live.advice import advice_for_running_vm, findings_for_running_vm
from chainmerge.live.driving import LiveDisk
from chainmerge.live.errors import (
    LiveDisksMismatched,
    UnfinishedMergeFound,
    VmLost,
    VmUnreachable,
)
from chainmerge.live.inspection import locate
from chainmerge.live.sole_manager import sole_manager
from chainmerge.live.target import LiveTarget
from chainmerge.merging.apart import images_in_common
from chainmerge.merging.disks import bases_for
from chainmerge.merging.errors import DiskGone, DisksShareImage
from chainmerge.options import Access, LiveOptions
from chainmerge.records.disks import DiskEntry, forget_entry, keep_entries, note_done
from chainmerge.records.identity import identify
from chainmerge.records.live_journal import LiveJournal, live_journal_file
from chainmerge.records.merged_record import MergedRecord
from chainmerge.records.request import joint_address, live_command_of, recorded
from chainmerge.storage.errors import system_errors_as_ours
from chainmerge.storage.other_hosts import shared_volumes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.documents.progress import OnProgress, ShouldStop
    from chainmerge.records.request import RecordedRequest


class DiskMerge(Struct, frozen=True):
    """A merge of one of the disks, as it was asked for; ``base`` is None for top's backing file."""

    vm: LiveDisk
    top: Path
    base: Path | None


class _Planned(Struct, frozen=True):
    """A merge of one of the disks, once its images are found.

    ``live`` are the images; None if an earlier run has begun the merge, or done it.
    """

    disk: DiskMerge
    base: Path
    live: LiveTarget | None
    done: bool = False


def plan_disks(
    vms: Sequence[LiveDisk],
    tops: Sequence[str | Path],
    bases: Sequence[str | Path] = (),
    access: Access | None = None,
    options: LiveOptions | None = None,
) -> DisksPlan:
    """Say what a merge of several disks of a running VM would do. Nothing is changed.

    Args:
        vms: the disks.
        tops: the overlays, one of each disk, in the same order.
        bases: as many images below them, in the same order; none for their backing files.
        access: how images may be found and reached.
        options: how to merge each.

    Raises:
        LiveDisksMismatched, DisksMismatched: the numbers of disks, tops and bases differ.
        UnfinishedMergeFound: one of the merges was begun.
        ChainmergeError: the VM does not answer, a chain cannot be read, or the VM's is another.
    """
    disks = _paired(vms, tops, bases)
    return plan_merges(disks, access or Access(), options or LiveOptions())


def plan_merges(disks: Sequence[DiskMerge], access: Access, options: LiveOptions) -> DisksPlan:
    """As :func:`plan_disks`."""
    plans, targets = [], []
    claims: Counter[str] = Counter()
    for disk in disks:
        match merging.earlier_run(disk.vm, disk.top, disk.base, options):
            case MergedRecord():
                continue
            case LiveJournal() as begun:
                written = begun.result.path
                raise UnfinishedMergeFound(written, str(live_journal_file(Path(written))))
        with advice_for_running_vm():
            live = locate(disk.vm, disk.top, disk.base, access)
            targets.append(live)
            decided = merging.shown_plan(disk.vm, live, access, options, claims)
        claims.update(decided.claim)
        plans.append(decided.plan)
    refusals = findings_for_running_vm(_shared_images(targets, options))
    return DisksPlan(REPORT_VERSION, tuple(plans), refusals)


def merge_disks(
    vms: Sequence[LiveDisk],
    tops: Sequence[str | Path],
    bases: Sequence[str | Path] = (),
    access: Access | None = None,
    options: LiveOptions | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> DisksReport:
    """Merge the overlays of several disks of a VM while it runs, each into an image below it.

    A merge of several disks that was interrupted, in whatever way, is finished by the same call.
    One that fails does not keep the others from being done.

    Args:
        vms: the disks, of one VM.
        tops: the overlays, one of each disk, in the same order.
        bases: as many images below them, in the same order; none for their backing files.
        access: how images may be found and reached.
        options: how to merge each.
        on_progress: called as the work goes on; its events name the overlay.
        should_stop: asked as the work goes on; the merge that is going on is undone soon after it
            says yes, and no other is begun.

    Returns: What happened to each disk, failures included.

    Raises:
        LiveDisksMismatched, DisksMismatched: the numbers of disks, tops and bases differ.
        Refused: nothing was changed.
        Interrupted: *should_stop* said yes before anything was changed.
    """
    return carry_out_merges(
        _paired(vms, tops, bases),
        access or Access(),
        options or LiveOptions(),
        on_progress or unheard,
        should_stop or never,
    )


def carry_out_merges(
    disks: Sequence[DiskMerge],
    access: Access,
    options: LiveOptions,
    report: OnProgress,
    stop: ShouldStop,
) -> DisksReport:
    """As :func:`merge_disks`."""
    for gone in _gone(disks, access, options):
        raise gone
    planned = _all_planned(disks, access, options, report)
    if stop():
        raise Interrupted("nothing was changed")
    request = _request([replace(one.disk, base=one.base) for one in planned], access, options)
    entries = [_entry(one, request, options) for one in planned]
    keep_entries(entries)
    outcomes = tuple(_carry_out(planned, entries, access, options, report, stop))
    if all(one.is_done for one in outcomes):
        for entry in entries:
            forget_entry(Path(entry.written))
    return DisksReport(REPORT_VERSION, outcomes)


def _paired(
    vms: Sequence[LiveDisk], tops: Sequence[str | Path], bases: Sequence[str | Path]
) -> list[DiskMerge]:
    if len(vms) != len(tops):
        raise LiveDisksMismatched(len(vms), len(tops))
    chosen = bases_for(tops, bases)
    return [DiskMerge(vm, Path(top), base) for vm, top, base in zip(vms, tops, chosen, strict=True)]


def _gone(
    disks: Sequence[DiskMerge], access: Access, options: LiveOptions
) -> Iterator[ChainmergeError]:
    """Tops that are missing, that the VM does not have open, and no record lists as merged."""
    there = [disk for disk in disks if os.path.lexists(disk.top)]
    for disk in disks:
        if disk in there or disk.top.resolve() in merging.paths_of_chain(disk.vm):
            continue
        if merging.earlier_run(disk.vm, disk.top, disk.base, options) is None:
            others = live_command_of(_request(there, access, options)) if there else None
            yield DiskGone(str(disk.top), len(disks), others or "chainmerge live merge ...")


def _all_planned(
    disks: Sequence[DiskMerge], access: Access, options: LiveOptions, report: OnProgress
) -> list[_Planned]:
    """Look at all disks. Raises what speaks against one of them, or against all together."""
    planned: list[_Planned] = []
    claims: Counter[str] = Counter()
    for disk in disks:
        report(ProgressEvent(Stage.PLAN, top=str(disk.top)))
        with advice_for_running_vm():
            planned.append(_planned(disk, access, options, claims))
    for refusal in _shared_images([one.live for one in planned if one.live is not None], options):
        raise refusal
    return planned


def _planned(
    disk: DiskMerge, access: Access, options: LiveOptions, claims: Counter[str]
) -> _Planned:
    """Look at one disk; *claims* gets what its merge takes. Raises what speaks against it."""
    earlier = merging.earlier_run(disk.vm, disk.top, disk.base, options)
    match earlier:
        case MergedRecord():
            return _Planned(disk, Path(earlier.base), None, done=True)
        case LiveJournal():
            with sole_manager(earlier.base):
                return _Planned(disk, Path(earlier.base.path), None)
    live = locate(disk.vm, disk.top, disk.base, access)
    base = live.target.base.real_path
    with sole_manager(identify(live.result(options).real_path)):
        for refusal in shared_volumes(live.images_written(options), access):
            raise refusal
        claims.update(merging.decided_merge(disk.vm, live, options, claims).claim)
    return _Planned(disk, base, live)


def _shared_images(
    targets: Sequence[LiveTarget], options: LiveOptions
) -> Iterator[DisksShareImage]:
    """Images that one of the merges writes to and another one has in its chain."""
    return images_in_common(
        (
            live.target,
            [(image, image.path in live.images_written(options)) for image in live.images],
        )
        for live in targets
    )


def _request(disks: Sequence[DiskMerge], access: Access, options: LiveOptions) -> RecordedRequest:
    """What is asked for of all disks."""
    bases = [disk.base for disk in disks if disk.base is not None]
    bases = bases if len(bases) == len(disks) else []
    address = joint_address(disk.vm.address for disk in disks)
    return recorded([disk.top for disk in disks], bases, access, options, address)


def _entry(planned: _Planned, request: RecordedRequest, options: LiveOptions) -> DiskEntry:
    top = os.path.abspath(planned.disk.top)  # noqa: PTH100 (of a link itself)
    written = planned.disk.top if options.pulls else planned.base
    return DiskEntry(
        base=str(planned.base),
        top=top,
        disks=request.tops,
        done=planned.done,
        identity=identify(written) if written.exists() else None,
        request=request,
        pulls=options.pulls,
    )


def _carry_out(
    planned: Sequence[_Planned],
    entries: Sequence[DiskEntry],
    access: Access,
    options: LiveOptions,
    report: OnProgress,
    stop: ShouldStop,
) -> Iterator[DiskReport]:
    """Merge one disk after the other; what fails is reported, and the next one is done.

    Without the VM, and after a request to stop, no other is begun.
    """
    stopped = False
    for one, entry in zip(planned, entries, strict=True):
        top, base = str(one.disk.top), str(one.base)
        if stopped or stop():
            stopped = True
            yield DiskReport(top, base, DiskOutcome.NOT_BEGUN)
            continue
        try:
            with system_errors_as_ours():
                done = merging.merge(
                    one.disk.vm, top, base, access, options, _naming(top, report), stop
                )
            note_done(entry)
        except Interrupted as error:
            stopped = True
            yield DiskReport.of_error(top, base, DiskOutcome.INTERRUPTED, error)
        except ChainmergeError as error:
            stopped = isinstance(error, VmLost | VmUnreachable)
            told = _of_all(error, entry) if isinstance(error, VmLost) else error
            yield DiskReport.of_error(top, base, DiskOutcome.of(error), told)
        else:
            yield DiskReport(top, base, DiskOutcome(done.outcome), done)


def _naming(top: str, report: OnProgress) -> OnProgress:
    """Report what happens, with the overlay of the disk that it happens to."""

    def report_of_disk(event: ProgressEvent) -> None:
        report(replace(event, top=top))

    return report_of_disk


def _of_all(lost: VmLost, entry: DiskEntry) -> VmLost:
    """The same error; what to run next finishes all disks."""
    resume, cold = entry.live_command or lost.resume, entry.finishing_command or lost.cold
    return VmLost(lost.vm, lost.base, lost.top, lost.reason, resume, cold)
