# SPDX-License-Identifier: Apache-2.0
"""Unfinished merges for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, stack, words
from chainmerge.report.text import human_size, moment, rough_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.repair import CancelReport
    from chainmerge.documents.status import StatusReport, UnfinishedMerge


def status_report(report: StatusReport) -> Block:
    """Which merges are unfinished, whether the VM may start, and what finishes or undoes each."""
    searched = ", ".join(report.searched)
    if report.merges:
        title = words(counted(len(report.merges), "unfinished merge"), layout.CAUTION)
    else:
        title = words(f"no unfinished merges in {searched}", layout.GOOD)
    return stack(
        title,
        *(part for merge in report.merges for part in _parts(merge)),
        *layout.warnings_section(report.not_searched),
    )


def _parts(merge: UnfinishedMerge) -> Iterator[Block]:
    yield layout.EMPTY_LINE
    yield words(f"{merge.top or 'an overlay'} into {merge.base}", layout.TITLE)
    yield layout.indented(layout.pairs(_answers(merge), layout.QUIET))
    if merge.command is not None:
        yield layout.indented(words("to finish, run", layout.QUIET))
        yield layout.command(f"    {merge.command}")
    if merge.cancel_command is not None:
        yield layout.indented(words("to cancel, run", layout.QUIET))
        yield layout.command(f"    {merge.cancel_command}")
    yield layout.indented(layout.pairs(_details(merge), layout.QUIET))


def _answers(merge: UnfinishedMerge) -> Iterator[tuple[Words, Words]]:
    yield words("state"), _state(merge)
    if merge.vm_image is None:
        yield words("data"), words("not known yet; change nothing by hand", layout.CAUTION)
    else:
        yield words("data"), words("no data is lost", layout.GOOD)
    yield words("VM"), _vm(merge)


def _state(merge: UnfinishedMerge) -> Words:
    how_far = ""
    if merge.bytes_done is not None and merge.bytes_total is not None:
        how_far = f"; {human_size(merge.bytes_done)} of {human_size(merge.bytes_total)}"
    if merge.process is not None and merge.process.running:
        rate = f", {rough_size(merge.rate)}/s" if merge.rate else ""
        return words(f"running, pid {merge.process.pid}{how_far}{rate}", layout.CAUTION)
    if merge.base_is_locked:
        return words(f"perhaps still running: {merge.progress}{how_far}", layout.CAUTION)
    at = "" if merge.noted_at is None else f" at {moment(merge.noted_at)}"
    return words(f"interrupted{at}: {merge.progress}{how_far}", layout.CAUTION)


def _vm(merge: UnfinishedMerge) -> Words:
    if merge.vm_may_start:
        image = "" if merge.vm_image is None else f" from {merge.vm_image} or an image on it"
        return words(f"may start{image}: {merge.vm_reason}", layout.GOOD)
    return words(f"may not start: {merge.vm_reason}", layout.BAD)


def _details(merge: UnfinishedMerge) -> Iterator[tuple[Words, Words]]:
    if merge.cancel_command is None and merge.cancel_reason:
        yield words("cancel"), words(f"not possible: {merge.cancel_reason}", layout.QUIET)
    yield words("data in base"), _answer(merge)
    if merge.process is not None:
        by = f"pid {merge.process.pid} on {merge.process.host}"
        yield words("begun by"), words(by, layout.QUIET)
    for file in merge.files:
        yield words("state files"), words(file, layout.QUIET)
    for warning in merge.warnings:
        yield words("warning", layout.CAUTION), words(warning, layout.CAUTION)


def _answer(merge: UnfinishedMerge) -> Words:
    if merge.base_holds_data is None:
        return words("not known without comparing content", layout.QUIET)
    return words("all of it" if merge.base_holds_data else "not all of it", layout.QUIET)


def cancel_report(report: CancelReport) -> Block:
    """What was undone, and what could not be."""
    top = report.top or "an overlay"
    facts = [
        (words("given back"), layout.size(report.freed_bytes)),
        *((words("removed"), words(one)) for one in report.removed),
        *((words("verified"), words(one)) for one in report.verified),
        *((words("remains"), words(one, layout.CAUTION)) for one in report.remains),
    ]
    return stack(
        words(f"The merge of {top} into {report.base} is undone; no data has changed", layout.GOOD),
        layout.indented(layout.pairs(facts, layout.QUIET)),
        *layout.warnings_section(report.warnings),
    )
