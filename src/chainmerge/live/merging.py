# SPDX-License-Identifier: Apache-2.0
"""The operations on a running VM: plan, merge, carry on, and say what is unfinished."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chainmerge.chain.opening import open_chain
from chainmerge.documents.plan import Finding, MergePlan
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.documents.status import LiveMergeStatus, LiveStatusReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.live.advice import advice_for_running_vm, for_running_vm
from chainmerge.live.driver import Caller
from chainmerge.live.driving import LiveDisk, drive
from chainmerge.live.errors import (
    NothingUnfinished,
    UnfinishedMergeFound,
)
from chainmerge.live.inspection import locate
from chainmerge.live.merge_nodes import find_merge_nodes
from chainmerge.live.planning import LivePlan, plan_live
from chainmerge.live.reporting import report_done_before
from chainmerge.live.sole_manager import sole_manager
from chainmerge.merging.finished import finished_before
from chainmerge.merging.job import wipe_behind_end
from chainmerge.options import Access, LiveOptions
from chainmerge.qcow2.bits import BitSet
from chainmerge.records.identity import identify
from chainmerge.records.live_journal import (
    LiveJournal,
    live_journal_file,
    load_live_journal,
    save_live_journal,
)
from chainmerge.records.merge_journal import journal_file
from chainmerge.records.merged_record import load_merged_record
from chainmerge.records.remains import read_remains
from chainmerge.records.request import recorded, resume_command_of
from chainmerge.records.saved_bitmaps import (
    SavedBitmap,
    SavedBitmaps,
    save_bitmaps,
    saved_bitmaps_file,
)
from chainmerge.storage.volumes import volume_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.documents.merge import MergeReport
    from chainmerge.errors import ChainmergeError
    from chainmerge.live.target import LiveTarget


def plan(
    vm: LiveDisk,
    top: str | Path,
    base: str | Path | None = None,
    access: Access | None = None,
    options: LiveOptions | None = None,
) -> MergePlan:
    """Say what a merge in a running VM would do. Nothing is changed.

    What would refuse the merge is in the plan's ``refusals``.

    Raises:
        ChainmergeError: the VM does not answer, the chain cannot be read, or the VM's is another.
    """
    with advice_for_running_vm():
        live = locate(vm, Path(top), _path(base), access or Access())
        decided = plan_live(vm, live, options or LiveOptions())
        refusals = [for_running_vm(one) for one in (*_left_behind(live), *decided.refusals)]
    findings = tuple(Finding(one.code, one.sentence, one.advice) for one in refusals)
    return replace(decided.plan, refusals=findings)


def merge(
    vm: LiveDisk,
    top: str | Path,
    base: str | Path | None = None,
    access: Access | None = None,
    options: LiveOptions | None = None,
    on_progress: Callable[[ProgressEvent], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> MergeReport:
    """Merge *top* into *base* (by default top's backing file) while the VM runs.

    A merge that was interrupted is carried on by the same call.

    Args:
        vm: one disk of a running VM.
        top: the overlay whose data goes down, as long as the VM has it open.
        base: the image below it that takes the data; images between are merged too.
        access: how images may be found and reached.
        options: how to merge.
        on_progress: called as the work goes on.
        should_stop: asked as the work goes on; the merge is undone soon after it says yes.

    Raises:
        Refused: nothing was changed.
        Interrupted: *should_stop* said yes.
        Failed: the merge was undone, or something is wrong with what came of it.
        VmLost: it is not known what the VM did last.
    """
    access, options = access or Access(), options or LiveOptions()
    caller = _caller(on_progress, should_stop)
    caller.report(ProgressEvent(Stage.PLAN))
    record = load_merged_record(Path(top))
    if (
        record is not None
        and not _reads(vm, Path(top))
        and finished_before(record, Path(top), _path(base), options.as_merge, active=record.base)
    ):
        return report_done_before(vm, record, caller)
    unfinished = _journal_for(vm, Path(top), _path(base))
    if unfinished is not None:
        with sole_manager(unfinished.base):
            return drive(vm, unfinished, options, caller, None)
    with advice_for_running_vm():
        live = locate(vm, Path(top), _path(base), access)
    with sole_manager(identify(live.target.base.real_path)):
        with advice_for_running_vm():
            decided = _decided(vm, live, options)
        _wipe_behind_end(live, decided)
        _extend(decided, options, caller)
        request = recorded([top], [base or live.target.base.path], access, options, vm.address)
        journal = msgspec.structs.replace(decided.journal, request=request)
        _record(live, journal)
        return drive(vm, journal, options, caller, decided.plan)


def _decided(vm: LiveDisk, live: LiveTarget, options: LiveOptions) -> LivePlan:
    """The plan of a merge that can begin.

    Raises what speaks against it.
    """
    for obstacle in _left_behind(live):
        raise obstacle
    decided = plan_live(vm, live, options)
    for refusal in decided.refusals:
        raise refusal
    return decided


def resume(
    vm: LiveDisk,
    options: LiveOptions | None = None,
    on_progress: Callable[[ProgressEvent], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> MergeReport:
    """Carry on the merge of this disk that was interrupted.

    What was asked for then stands: ``delete`` and ``verify`` of *options* are not looked at.

    Raises:
        NothingUnfinished: there is none.
        Otherwise as :func:`merge`.
    """
    caller = _caller(on_progress, should_stop)
    caller.report(ProgressEvent(Stage.PLAN))
    for journal in _journals(vm):
        with sole_manager(journal.base):
            return drive(vm, journal, options or LiveOptions(), caller, None)
    raise NothingUnfinished(vm.name)


def status(vm: LiveDisk) -> LiveStatusReport:
    """Say which merges of this disk are unfinished, and how their jobs are."""
    return LiveStatusReport(
        version=REPORT_VERSION,
        vm=vm.name,
        chain=tuple(str(path) for path in _paths(vm)),
        merges=tuple(_status_of(vm, journal) for journal in _journals(vm)),
    )


def _status_of(vm: LiveDisk, journal: LiveJournal) -> LiveMergeStatus:
    job = vm.job(journal.job)
    nodes = find_merge_nodes(vm.layout(), journal)
    return LiveMergeStatus(
        base=journal.base.path,
        top=journal.top.path,
        active=journal.is_active,
        state=journal.state,
        job=None if job is None else job.phase,
        bytes_done=0 if job is None else job.done,
        bytes_total=0 if job is None else job.total,
        merged=nodes is not None and nodes.is_merged,
        guest_waits=journal.guest_to_resume
        or (journal.is_active and job is not None and job.phase == "held"),
        error=None if job is None else job.error,
        command=resume_command_of(journal.known_request, vm.address),
    )


def _caller(
    on_progress: Callable[[ProgressEvent], None] | None, should_stop: Callable[[], bool] | None
) -> Caller:
    return Caller(
        on_progress or (lambda _event: None), should_stop or (lambda: False), time.monotonic()
    )


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _paths(vm: LiveDisk) -> Iterator[Path]:
    """The files of the disk's chain, the active one first."""
    layout = vm.layout()
    for node in layout.chain():
        path = layout.path_of(node)
        if path is not None:
            yield path


def _reads(vm: LiveDisk, image: Path) -> bool:
    """Whether the disk reads an image, by whatever name."""
    return any(path.exists() and image.exists() and path.samefile(image) for path in _paths(vm))


def _journals(vm: LiveDisk) -> Iterator[LiveJournal]:
    """The journals beside images of this disk that belong to them."""
    for path in _paths(vm):
        journal = load_live_journal(path)
        if journal is not None and find_merge_nodes(vm.layout(), journal) is not None:
            yield journal


def _journal_for(vm: LiveDisk, top: Path, base: Path | None) -> LiveJournal | None:
    """The journal of the merge that is asked for, if it was begun before."""
    for journal in _journals(vm):
        if journal.top.path != str(top.resolve()):
            continue
        if base is None or journal.base.path == str(base.resolve()):
            return journal
    return None


def _left_behind(live: LiveTarget) -> Iterator[ChainmergeError]:
    """What other merges have left beside base that must not be lost."""
    base = live.target.base.real_path
    remains = read_remains(base, live.target.chain.top.real_path)
    if remains.live is not None:
        yield UnfinishedMergeFound(str(base), str(live_journal_file(base)))
    if remains.journal_problem is not None:
        yield remains.journal_problem
    elif remains.journal is not None:
        yield UnfinishedMergeFound(str(base), str(journal_file(base)))
    elif remains.usable_saved is not None:
        yield UnfinishedMergeFound(str(base), str(saved_bitmaps_file(base)))


def _extend(decided: LivePlan, options: LiveOptions, caller: Caller) -> None:
    """Extend base's volume to what the plan says. A file grows as it is written to.

    Reserving space behind the end of a file that somebody else writes to could not be taken
    back: that is done by truncating it.
    """
    space = decided.plan.space
    if space.grow_to is None:
        return
    caller.report(ProgressEvent(Stage.EXTEND))
    volume = volume_at(Path(decided.journal.base.path), options.as_merge)
    volume.grow_to(space.required)
    volume.make_growth_durable()


def _wipe_behind_end(live: LiveTarget, decided: LivePlan) -> None:
    """Make zeros of what base's last cluster holds behind the end that QEMU is going to move.

    The VM reads nothing there, and writes nowhere in base before its job begins.
    """
    size = decided.plan.virtual_size_after
    if live.target.base.virtual_size < size:
        with open_chain(live.target.chain) as opened:
            wipe_behind_end(opened.images[live.target.base_index], size)


def _record(live: LiveTarget, journal: LiveJournal) -> None:
    """Save what base has of the kept bitmaps, and note what is about to be done."""
    saved = _to_save(live, journal)
    if saved is not None:
        save_bitmaps(live.target.base.real_path, saved)
    save_live_journal(journal)


def _to_save(live: LiveTarget, journal: LiveJournal) -> SavedBitmaps | None:
    """What a cold merge needs to know of base's checkpoints, should the VM end in the middle."""
    index = live.target.base_index
    if not journal.kept:
        return None
    with open_chain(live.target.chain) as opened:
        base, overlay = opened.images[index], opened.images[index + 1]
        node = live.nodes[index + 1]
        bitmaps = []
        for kept in journal.kept:
            if kept.in_base and not live.base.read_only:
                # An active merge that was undone can leave base writable: then nothing but the
                # VM knows its bits.
                continue
            in_overlay = None
            if 0 in kept.sources and node.read_only:
                in_overlay = overlay.bits(kept.name)
            elif 0 in kept.sources:
                # The guest writes to it: what it had then, it has in any case.
                found = node.bitmap(kept.name)
                assert found is not None
                in_overlay = BitSet.empty(overlay.info.virtual_size, found.granularity)
            bits = base.bits(kept.name) if kept.in_base else None
            bitmaps.append(SavedBitmap(kept.name, bits, in_overlay))
    return SavedBitmaps(journal.base, journal.overlays[0], tuple(bitmaps), journal.request)
