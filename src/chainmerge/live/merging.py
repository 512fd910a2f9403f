# SPDX-License-Identifier: Apache-2.0
"""The operations on a running VM: plan, merge, carry on, and say what is unfinished."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.documents.progress import ProgressEvent, Stage, never, unheard
from chainmerge.documents.status import LiveMergeStatus, LiveStatusReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.errors import ChainmergeError
from chainmerge.live.advice import advice_for_running_vm, findings_for_running_vm
from chainmerge.live.driver import Caller
from chainmerge.live.driving import LiveDisk, drive
from chainmerge.live.errors import NothingUnfinished
from chainmerge.live.inspection import locate
from chainmerge.live.merge_nodes import find_merge_nodes
from chainmerge.live.planning import NO_CLAIMS, LivePlan, plan_live
from chainmerge.live.preparing import left_behind, prepare_live_merge
from chainmerge.live.reporting import report_done_before
from chainmerge.live.sole_manager import sole_manager
from chainmerge.merging.finished import finished_before
from chainmerge.merging.noting import BegunMerge, begun_merge, note_failed, note_merged
from chainmerge.options import Access, LiveOptions
from chainmerge.planning.foretelling import foretold
from chainmerge.records.disks import forget_entry, load_entry
from chainmerge.records.identity import identify
from chainmerge.records.live_journal import LiveJournal, load_live_journal
from chainmerge.records.merged_record import MergedRecord, load_merged_record
from chainmerge.records.request import recorded, resume_command_of
from chainmerge.storage.other_hosts import held_by_this_host, shared_volumes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from chainmerge.documents.merge import MergeReport
    from chainmerge.documents.plan import MergePlan
    from chainmerge.live.target import LiveTarget
    from chainmerge.records.identity import ImageIdentity


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
        access, options = access or Access(), options or LiveOptions()
        live = locate(vm, Path(top), _path(base), access)
        return shown_plan(vm, live, access, options).plan


def shown_plan(
    vm: LiveDisk,
    live: LiveTarget,
    access: Access,
    options: LiveOptions,
    claims: Mapping[str, int] = NO_CLAIMS,
) -> LivePlan:
    """The plan of a merge, in which all is said that would refuse it.

    *claims* as in :func:`plan_live`. Raises what :func:`plan` raises.
    """
    decided = plan_live(vm, live, options, claims)
    shared = shared_volumes(live.images_written(options), access)
    found = (*left_behind(live, options), *shared, *decided.refusals)
    plan = replace(
        decided.plan,
        refusals=findings_for_running_vm(found),
        prediction=foretold(decided.plan, options, live=True),
    )
    return replace(decided, plan=plan)


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
        base: the image below it that takes the data; images between are merged too. In a pull
            top takes their data and that of base.
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
    match earlier_run(vm, Path(top), _path(base), options):
        case MergedRecord() as record:
            forget_entry(Path(record.base if record.pulled is None else record.top))
            return report_done_before(vm, record, caller)
        case LiveJournal() as unfinished:
            return _carry_on(vm, unfinished, access, options, caller)
    with advice_for_running_vm():
        live = locate(vm, Path(top), _path(base), access)
    begun: BegunMerge | None = None
    result = identify(live.result(options).real_path)
    try:
        with sole_manager(result), _held(result, live.images_written(options), access):
            with advice_for_running_vm():
                decided = decided_merge(vm, live, options)
            request = recorded([top], [base or live.target.base.path], access, options, vm.address)
            journal = prepare_live_merge(live, decided, request, options, caller)
            begun = begun_merge(decided.plan, options, live=True)
            report = drive(vm, journal, options, caller, decided.plan)
    except ChainmergeError as error:
        note_failed(begun, error.code)
        raise
    note_merged(begun, report)
    return report


def earlier_run(
    vm: LiveDisk, top: Path, base: Path | None, options: LiveOptions
) -> MergedRecord | LiveJournal | None:
    """What an earlier run of this merge has left: that it is done, or how far it came.

    Raises LeftoverUnclear, LiveJournalDamaged.
    """
    # Which is removed last of all: what is deleted may be half done by then.
    journal = journal_for(vm, top, base, options)
    if journal is not None:
        return journal
    record = load_merged_record(top)
    if record is None or (record.pulled is None and reads_image(vm, top)):
        return None
    is_done = finished_before(record, top, base, options.as_merge, active=record.base)
    return record if is_done else None


def decided_merge(
    vm: LiveDisk, live: LiveTarget, options: LiveOptions, claims: Mapping[str, int] = NO_CLAIMS
) -> LivePlan:
    """The plan of a merge that can begin; *claims* as in :func:`plan_live`.

    Raises what speaks against it.
    """
    for obstacle in left_behind(live, options):
        raise obstacle
    decided = plan_live(vm, live, options, claims)
    for refusal in decided.refusals:
        raise refusal
    return decided


def resume(
    vm: LiveDisk,
    options: LiveOptions | None = None,
    on_progress: Callable[[ProgressEvent], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    lock_command: str | None = None,
) -> MergeReport:
    """Carry on the merge of this disk that was interrupted.

    What was asked for then stands: ``delete`` and ``verify`` of *options* are not looked at.
    *lock_command* is that of ``Access``, and never taken from a file: no file names a program.
    What :func:`merge` raises it raises, too.

    Raises:
        NothingUnfinished: there is none.
    """
    caller = _caller(on_progress, should_stop)
    caller.report(ProgressEvent(Stage.PLAN))
    for journal in unfinished_in(vm):
        access = Access(lock_command=lock_command)
        return _carry_on(vm, journal, access, options or LiveOptions(), caller)
    raise NothingUnfinished(vm.name)


def _carry_on(
    vm: LiveDisk, journal: LiveJournal, access: Access, options: LiveOptions, caller: Caller
) -> MergeReport:
    """As :func:`resume`, of the merge that a journal tells of."""
    written = [Path(image.path) for image in journal.written]
    with sole_manager(journal.result), _held(journal.result, written, access):
        return drive(vm, journal, options, caller, None)


def _held(
    result: ImageIdentity, written: Iterable[Path], access: Access
) -> AbstractContextManager[None]:
    """Have the volumes that are *written* for this host, as long as the VM may write to them.

    As long as there is a journal it may: whatever the error was, the job is the VM's.
    """

    def is_unfinished() -> bool:
        try:
            return load_live_journal(Path(result.path)) is not None
        except ChainmergeError:
            return True

    return held_by_this_host(written, access, is_unfinished)


def status(vm: LiveDisk) -> LiveStatusReport:
    """Say which merges of this disk are unfinished, and how their jobs are."""
    return LiveStatusReport(
        version=REPORT_VERSION,
        vm=vm.name,
        chain=tuple(str(path) for path in paths_of_chain(vm)),
        merges=tuple(_status_of(vm, journal) for journal in unfinished_in(vm)),
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
        or (journal.is_active and not journal.pulls and job is not None and job.phase == "held"),
        error=None if job is None else job.error,
        command=_command_of(vm, journal),
        direction=journal.direction,
    )


def _command_of(vm: LiveDisk, journal: LiveJournal) -> str:
    """What carries on a merge; with those of other disks that it was begun with."""
    entry = load_entry(Path(journal.result.path))
    of_all = None if entry is None else entry.live_command
    return of_all or resume_command_of(journal.known_request, vm.address)


def _caller(
    on_progress: Callable[[ProgressEvent], None] | None, should_stop: Callable[[], bool] | None
) -> Caller:
    return Caller(on_progress or unheard, should_stop or never, time.monotonic())


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def paths_of_chain(vm: LiveDisk) -> Iterator[Path]:
    """The files of the disk's chain, the active one first."""
    layout = vm.layout()
    for node in layout.chain():
        path = layout.path_of(node)
        if path is not None:
            yield path


def reads_image(vm: LiveDisk, image: Path) -> bool:
    """Whether the disk reads an image, by whatever name."""
    return any(
        path.exists() and image.exists() and path.samefile(image) for path in paths_of_chain(vm)
    )


def unfinished_in(vm: LiveDisk) -> Iterator[LiveJournal]:
    """The journals beside images of this disk that belong to them."""
    for path in paths_of_chain(vm):
        journal = load_live_journal(path)
        if journal is not None and find_merge_nodes(vm.layout(), journal) is not None:
            yield journal


def journal_for(
    vm: LiveDisk, top: Path, base: Path | None, options: LiveOptions
) -> LiveJournal | None:
    """The journal of the merge that is asked for, if it was begun before."""
    for journal in unfinished_in(vm):
        if journal.top.path != str(top.resolve()) or journal.pulls is not options.pulls:
            continue
        if base is None or journal.base.path == str(base.resolve()):
            return journal
    return None
