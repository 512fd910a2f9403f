# SPDX-License-Identifier: Apache-2.0
"""Unfinished merges for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.status import StatusReport, UnfinishedMerge


def status_report(report: StatusReport) -> RenderableType:
    """Which merges are unfinished, and what finishes them."""
    searched = ", ".join(report.searched)
    if report.merges:
        title = words(counted(len(report.merges), "unfinished merge"), layout.CAUTION)
    else:
        title = words(f"no unfinished merges in {searched}", layout.GOOD)
    return Group(
        title,
        *(part for merge in report.merges for part in _parts(merge)),
        *layout.warnings_section(report.not_searched),
    )


def _parts(merge: UnfinishedMerge) -> Iterator[RenderableType]:
    yield Text()
    yield words(f"{merge.top or 'an overlay'} into {merge.base}", layout.TITLE)
    table = layout.grid()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(words("progress", layout.QUIET), words(merge.progress))
    table.add_row(words("data in base", layout.QUIET), _answer(merge))
    if merge.base_is_locked:
        open_now = words("base is open: perhaps this merge is still running", layout.CAUTION)
        table.add_row(words("now", layout.QUIET), open_now)
    for file in merge.files:
        table.add_row(words("state files", layout.QUIET), words(file, layout.QUIET))
    for warning in merge.warnings:
        table.add_row(words("warning", layout.CAUTION), words(warning, layout.CAUTION))
    yield layout.indented(table)
    if merge.command is not None:
        yield layout.indented(words("to finish, run", layout.QUIET))
        yield layout.command(f"    {merge.command}")


def _answer(merge: UnfinishedMerge) -> Text:
    if merge.base_holds_data is None:
        return words("not known without comparing content", layout.QUIET)
    return words("yes", layout.GOOD) if merge.base_holds_data else words("no", layout.CAUTION)
