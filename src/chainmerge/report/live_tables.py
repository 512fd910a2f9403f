# SPDX-License-Identifier: Apache-2.0
"""Unfinished merges in a running VM for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, stack, words
from chainmerge.report.text import human_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.status import LiveMergeStatus, LiveStatusReport


def live_status_report(report: LiveStatusReport) -> Block:
    """Which merges of a disk are unfinished, and what continues them."""
    chain = layout.section("The disk reads", layout.bullets(report.chain))
    if not report.merges:
        return stack(words(f"no unfinished merges in {report.vm}", layout.GOOD), chain)
    return stack(
        words(f"{counted(len(report.merges), 'unfinished merge')} in {report.vm}", layout.CAUTION),
        *(part for merge in report.merges for part in _parts(merge)),
        chain,
    )


def _parts(merge: LiveMergeStatus) -> Iterator[Block]:
    yield layout.EMPTY_LINE
    yield words(_title(merge), layout.TITLE)
    yield layout.indented(layout.pairs(_facts(merge), layout.QUIET))
    yield layout.indented(words("to continue, run", layout.QUIET))
    yield layout.command(f"    {merge.command}")


def _title(merge: LiveMergeStatus) -> str:
    if merge.direction == "pull":
        return f"{merge.base} up into {merge.top}"
    return f"{merge.top} into {merge.base}"


def _facts(merge: LiveMergeStatus) -> Iterator[tuple[Words, Words]]:
    yield words("came to"), words(merge.state)
    yield words("the VM's job"), words(_job(merge))
    merged = words("yes", layout.GOOD) if merge.merged else words("no", layout.CAUTION)
    yield words("took effect"), merged
    if merge.guest_waits:
        waits = "the guest's requests wait until the merge continues"
        yield words("now"), words(waits, layout.BAD)
    if merge.error is not None:
        yield words("error"), words(merge.error, layout.BAD)


def _job(merge: LiveMergeStatus) -> str:
    if merge.job is None:
        return "there is none"
    copied = f"{human_size(merge.bytes_done)} of {human_size(merge.bytes_total)}"
    return f"{merge.job}, {copied} copied"
