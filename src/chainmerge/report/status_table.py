# SPDX-License-Identifier: Apache-2.0
"""Unfinished merges for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, stack, words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.status import StatusReport, UnfinishedMerge


def status_report(report: StatusReport) -> Block:
    """Which merges are unfinished, and what finishes them."""
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
    yield layout.indented(layout.pairs(_facts(merge), layout.QUIET))
    if merge.command is not None:
        yield layout.indented(words("to finish, run", layout.QUIET))
        yield layout.command(f"    {merge.command}")


def _facts(merge: UnfinishedMerge) -> Iterator[tuple[Words, Words]]:
    yield words("progress"), words(merge.progress)
    yield words("data in base"), _answer(merge)
    if merge.base_is_locked:
        open_now = "base is open: perhaps this merge is still running"
        yield words("now"), words(open_now, layout.CAUTION)
    for file in merge.files:
        yield words("state files"), words(file, layout.QUIET)
    for warning in merge.warnings:
        yield words("warning", layout.CAUTION), words(warning, layout.CAUTION)


def _answer(merge: UnfinishedMerge) -> Words:
    if merge.base_holds_data is None:
        return words("not known without comparing content", layout.QUIET)
    return words("yes", layout.GOOD) if merge.base_holds_data else words("no", layout.CAUTION)
