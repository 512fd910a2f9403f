# SPDX-License-Identifier: Apache-2.0
"""Unfinished merges in a running VM for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import words
from chainmerge.report.text import human_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.status import LiveMergeStatus, LiveStatusReport


def live_status_report(report: LiveStatusReport) -> RenderableType:
    """Which merges of a disk are unfinished, and what continues them."""
    chain = layout.section("The disk reads", layout.bullets(report.chain))
    if not report.merges:
        return Group(words(f"no unfinished merges in {report.vm}", layout.GOOD), chain)
    return Group(
        words(f"{counted(len(report.merges), 'unfinished merge')} in {report.vm}", layout.CAUTION),
        *(part for merge in report.merges for part in _parts(merge)),
        chain,
    )


def _parts(merge: LiveMergeStatus) -> Iterator[RenderableType]:
    yield Text()
    yield words(f"{merge.top} into {merge.base}", layout.TITLE)
    table = layout.grid()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(words("came to", layout.QUIET), words(merge.state))
    table.add_row(words("the VM's job", layout.QUIET), words(_job(merge)))
    merged = words("yes", layout.GOOD) if merge.merged else words("no", layout.CAUTION)
    table.add_row(words("took effect", layout.QUIET), merged)
    if merge.guest_waits:
        waits = "the guest's requests wait until the merge continues"
        table.add_row(words("now", layout.QUIET), words(waits, layout.BAD))
    if merge.error is not None:
        table.add_row(words("error", layout.QUIET), words(merge.error, layout.BAD))
    yield layout.indented(table)
    yield layout.indented(words("to continue, run", layout.QUIET))
    yield layout.command(f"    {merge.command}")


def _job(merge: LiveMergeStatus) -> str:
    if merge.job is None:
        return "there is none"
    copied = f"{human_size(merge.bytes_done)} of {human_size(merge.bytes_total)}"
    return f"{merge.job}, {copied} copied"
