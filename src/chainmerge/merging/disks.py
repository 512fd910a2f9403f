# SPDX-License-Identifier: Apache-2.0
"""The disks of one virtual machine, merged as one operation.

A snapshot of a machine with several disks is an overlay on each of them. All are looked at,
locked and planned before the first image is written to, so that what would refuse one refuses
all. Then each is merged on its own: a merge changes nothing that a guest sees, so there is no
moment at which disks that are merged already do not fit those that are not yet. The report says
what happened to each, and the same call does the rest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.discovery import discover
from chainmerge.chain.model import ChainPolicy
from chainmerge.chain.surroundings import Look
from chainmerge.chain.target import find_target
from chainmerge.documents.disks import DiskOutcome, DiskReport, DisksPlan, DisksReport
from chainmerge.documents.plan import Finding
from chainmerge.documents.progress import never, unheard
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.errors import ChainmergeError, Interrupted
from chainmerge.merging.apart import shared_images
from chainmerge.merging.errors import DiskGone, DisksMismatched
from chainmerge.merging.finished import finished_before
from chainmerge.merging.job import Request
from chainmerge.merging.noting import begun_merge, note_disk
from chainmerge.merging.preparing import Prepared, prepare, require_no_others
from chainmerge.merging.rates import RatesFilled
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.dry_run import beside_others, plan_beside
from chainmerge.records.disks import DiskEntry, forget_entry, keep_entries, load_entry, note_done
from chainmerge.records.identity import identify
from chainmerge.records.merged_record import load_merged_record
from chainmerge.records.request import command_of, recorded
from chainmerge.storage.errors import system_errors_as_ours

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.documents.progress import OnProgress, ProgressEvent, ShouldStop


def plan_disks(
    tops: Sequence[str | Path],
    bases: Sequence[str | Path] = (),
    access: Access | None = None,
    options: MergeOptions | None = None,
) -> DisksPlan:
    """Say what a merge of several disks would do. Nothing is written and nothing stays locked.

    Args:
        tops: the overlays, one of each disk.
        bases: as many images below them, in the same order; none for their backing files.
        access: how images may be found and reached.
        options: how to merge each.

    Raises:
        DisksMismatched: the numbers of tops and bases differ.
        ChainmergeError: a chain cannot be found or read.
    """
    access, options = access or Access(), options or MergeOptions()
    paired = _paired(tops, bases)
    done = _done_before(paired)
    disks = [disk for disk in paired if disk not in done]
    for gone in _gone(disks, access, options):
        raise gone
    look = Look()
    targets = [find_target(disk.top, disk.base, access, look) for disk in disks]
    refusals = tuple(map(Finding.of, shared_images([(target, options) for target in targets])))
    claims: Counter[str] = Counter()
    plans = []
    for target in targets:
        planned = plan_beside(target, access, options, claims)
        claims.update(planned.claim)
        plans.append(planned)
    return DisksPlan(REPORT_VERSION, beside_others(plans), refusals)


def merge_disks(
    tops: Sequence[str | Path],
    bases: Sequence[str | Path] = (),
    access: Access | None = None,
    options: MergeOptions | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> DisksReport:
    """Merge the overlays of several disks, each into an image below it.

    A merge of several disks that was interrupted, in whatever way, is finished by the same call.
    One that fails does not keep the others from being done.

    Args:
        tops: the overlays, one of each disk.
        bases: as many images below them, in the same order; none for their backing files.
        access: how images may be found and reached.
        options: how to merge each.
        on_progress: called as the work goes on; its events name the overlay.
        should_stop: asked as the work goes on; the merges stop soon after it says yes.

    Returns: What happened to each disk, failures included.

    Raises:
        DisksMismatched: the numbers of tops and bases differ.
        Refused: nothing was changed.
        Interrupted: *should_stop* said yes before anything was changed.
    """
    report = on_progress or unheard
    stop = should_stop or never
    access, options = access or Access(), options or MergeOptions()
    paired = _paired(tops, bases)
    done = _done_before(paired)
    disks = [disk for disk in paired if disk not in done]
    for gone in _gone(disks, access, options):
        raise gone
    with contextlib.ExitStack() as stack:
        requests = [_request(disk, access, options, report, stop) for disk in disks]
        prepared = prepare(stack, requests)
        warnings = require_no_others(prepared)
        begun = [begun_merge(one.plan, options) for one in prepared]
        entries = _entries(disks, prepared, access, options)
        keep_entries(entries)
        outcomes = tuple(
            _with_warnings(outcome, more)
            for outcome, more in zip(_carry_out(disks, prepared, entries), warnings, strict=True)
        )
    if all(one.is_done for one in outcomes):
        for written in (*(one.written for one in entries), *(one.base for one in done.values())):
            forget_entry(Path(written))
    for one, outcome in zip(begun, outcomes, strict=True):
        note_disk(one, outcome)
    by_top = {one.top: one for one in (*outcomes, *done.values())}
    return DisksReport(REPORT_VERSION, tuple(by_top[str(disk.top)] for disk in paired))


class _Disk(Struct, frozen=True):
    """A merge of one of the disks, as it was asked for."""

    top: Path
    base: Path | None


def _paired(tops: Sequence[str | Path], bases: Sequence[str | Path]) -> list[_Disk]:
    chosen = bases_for(tops, bases)
    return [_Disk(Path(top), base) for top, base in zip(tops, chosen, strict=True)]


def bases_for(tops: Sequence[str | Path], bases: Sequence[str | Path]) -> list[Path | None]:
    """The base of each of *tops*; None for their backing files, where none are given.

    Raises DisksMismatched: there is one for some of them.
    """
    if bases and len(bases) != len(tops):
        raise DisksMismatched(len(tops), len(bases))
    return [Path(base) for base in bases] or [None] * len(tops)


def _request(
    disk: _Disk,
    access: Access,
    options: MergeOptions,
    report: OnProgress,
    stop: ShouldStop,
) -> Request:
    top = str(disk.top)

    def report_of_disk(event: ProgressEvent) -> None:
        report(replace(event, top=top))

    return Request(
        top=disk.top,
        base=disk.base,
        access=access,
        options=options,
        report=RatesFilled(report_of_disk),
        should_stop=stop,
        started=time.monotonic(),
        claims={},
    )


def _entry_of(disk: _Disk, disks: Sequence[_Disk]) -> DiskEntry | None:
    """What an interrupted run has noted of a disk whose top is gone; None if nothing tells.

    Where its base is not named, the entries of the other disks name it.
    """
    if os.path.lexists(disk.top):
        return None
    top = os.path.abspath(disk.top)  # noqa: PTH100 (of a link itself)
    bases = [disk.base] if disk.base is not None else list(_bases_named_by(disks, top))
    for base in bases:
        entry = load_entry(base)
        if entry is not None and entry.top == top:
            return entry
    return None


def _bases_named_by(disks: Sequence[_Disk], top: str) -> Iterator[Path]:
    for other in disks:
        with contextlib.suppress(ChainmergeError, OSError):
            base = other.base or discover(other.top, ChainPolicy()).base.real_path
            entry = load_entry(base)
            if entry is not None and entry.request is not None and top in entry.disks:
                yield Path(entry.request.bases[entry.disks.index(top)])


def _done_before(disks: Sequence[_Disk]) -> dict[_Disk, DiskReport]:
    """The disks whose tops are gone since an interrupted run of this merge was done with them."""
    entries = {disk: _entry_of(disk, disks) for disk in disks}
    return {
        disk: DiskReport(str(disk.top), entry.base, DiskOutcome.ALREADY_MERGED)
        for disk, entry in entries.items()
        if entry is not None and entry.done
    }


def _gone(
    disks: Sequence[_Disk], access: Access, options: MergeOptions
) -> Iterator[ChainmergeError]:
    """Tops that are missing, and that no record lists as merged."""
    there = [disk for disk in disks if os.path.lexists(disk.top)]
    for disk in disks:
        if disk in there:
            continue
        # Before any merge is prepared: of one alone nobody could tell that it is one of several.
        record = load_merged_record(disk.top)
        if finished_before(record, disk.top, disk.base, options, access.active):
            continue
        bases = [one.base for one in there if one.base is not None]
        others = recorded([one.top for one in there], bases, access, options)
        words = command_of(others) if there else None
        yield DiskGone(str(disk.top), len(disks), words or "chainmerge merge ...")


def _entries(
    disks: Sequence[_Disk],
    prepared: Sequence[Prepared],
    access: Access,
    options: MergeOptions,
) -> list[DiskEntry]:
    """What is kept beside each base. All bases are named: some tops may stand on others by then."""
    pairs = list(zip(disks, prepared, strict=True))
    tops = [os.path.abspath(disk.top) for disk in disks]  # noqa: PTH100 (of a link itself)
    bases = [disk.base or one.base for disk, one in pairs]
    request = recorded([disk.top for disk in disks], bases, access, options)
    entries = [
        DiskEntry(
            base=str(one.base),
            top=top,
            disks=tops,
            request=request,
            pulls=options.direction == "pull",
        )
        for one, top in zip(prepared, tops, strict=True)
    ]
    return [
        replace(one, identity=identify(written) if written.exists() else None)
        for one in entries
        for written in [Path(one.written)]
    ]


def _carry_out(
    disks: Sequence[_Disk], prepared: Sequence[Prepared], entries: Sequence[DiskEntry]
) -> Iterator[DiskReport]:
    """Merge one disk after the other; what fails is reported, and the next one is done."""
    stopped = False
    for disk, one, entry in zip(disks, prepared, entries, strict=True):
        top, base = str(disk.top), str(one.base)
        if stopped:
            yield DiskReport(top, base, DiskOutcome.NOT_BEGUN)
            continue
        try:
            with system_errors_as_ours():
                report = one.carry_out()
            note_done(entry)
        except Interrupted as error:
            stopped = True
            yield DiskReport.of_error(top, base, DiskOutcome.INTERRUPTED, error)
        except ChainmergeError as error:
            outcome = DiskOutcome.of(error)
            yield DiskReport.of_error(top, base, outcome, error)
        else:
            yield DiskReport(top, base, DiskOutcome(report.outcome), report)


def _with_warnings(outcome: DiskReport, more: Sequence[str]) -> DiskReport:
    if outcome.report is None:
        return outcome
    warnings = (*outcome.report.warnings, *more)
    return replace(outcome, report=replace(outcome.report, warnings=warnings))
