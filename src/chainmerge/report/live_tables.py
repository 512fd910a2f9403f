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

    from chainmerge.documents.repair import VmLeftover, VmRepairReport
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


def vm_repair_report(report: VmRepairReport) -> Block:
    """What jobs have left in a VM: what goes, or is gone, and what stays for which reason."""
    if not report.leftovers:
        return words(f"{report.vm}: no backup or other job has left anything", layout.GOOD)
    verb = "to remove" if report.dry_run else "removed"
    going = [one for one in report.leftovers if one.action is not None]
    return stack(
        words(f"Left by backups and other jobs in {report.vm}", layout.TITLE),
        layout.indented(
            layout.listing(
                ("what", "name", "on", "state", "verdict"),
                (_leftover_row(one, verb) for one in report.leftovers),
            )
        ),
        *(part for one in report.leftovers for part in _why_it_stays(one)),
        *(() if going else (words("Nothing can be removed here.", layout.CAUTION),)),
    )


def _leftover_row(one: VmLeftover, verb: str) -> tuple[Words, ...]:
    if one.action is None:
        verdict = words("stays", layout.CAUTION)
    elif one.done or verb == "to remove":
        verdict = words(verb, layout.GOOD)
    else:
        verdict = words("NOT removed", layout.BAD)
    return (
        words(one.kind),
        words(one.name or "(none)"),
        words(one.image or one.node or ""),
        words(one.state),
        verdict,
    )


def _why_it_stays(one: VmLeftover) -> Iterator[Words]:
    if one.done:
        return
    advice = f": {one.advice}" if one.advice else ""
    called = f"{one.kind} {one.name}" if one.name else f"{one.kind} of {one.image or one.node}"
    yield words(f"{called}: {one.reason}{advice}", layout.QUIET)
