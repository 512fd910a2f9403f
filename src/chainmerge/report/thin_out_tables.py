# SPDX-License-Identifier: Apache-2.0
"""Which snapshots go and which stay, and what became of those that were to go, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, stack, words
from chainmerge.report.merge_tables import bytes_moved, merge_details, reasons_not_done, warnings_of
from chainmerge.report.names import ImageNames, names_in, users_line
from chainmerge.report.plan_details import plan_details
from chainmerge.report.plan_tables import refused, time_taken
from chainmerge.report.text import short_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.documents.disks import DiskReport
    from chainmerge.documents.plan import MergePlan
    from chainmerge.documents.retention import SnapshotFate, ThinOutPlan, ThinOutReport

_DAY = 86_400
_HOUR = 3_600


def thin_out_plan(plan: ThinOutPlan, command: str) -> Block:
    """What becomes of each snapshot, the ranges that are merged for it, and how to do it."""
    names = _names(plan.leaf, plan.snapshots)
    return stack(
        words(_headline(plan, names), layout.TITLE),
        *_answer(plan, names, command),
        *_snapshots(plan.snapshots, plan.decided_at, names),
        *_planned_ranges(plan.ranges, names),
        *layout.warnings_section(
            names.left_out_of(one) for merge in plan.ranges for one in merge.warnings
        ),
    )


def thin_out_plan_details(plan: ThinOutPlan, command: str) -> Block:
    """The same as :func:`thin_out_plan`, and the whole plan of each range."""
    parts: list[Block] = [thin_out_plan(plan, command)]
    for one in plan.ranges:
        parts += [layout.EMPTY_LINE, words(one.top, layout.TITLE), plan_details(one, command)]
    return stack(*parts)


def thin_out_report(report: ThinOutReport) -> Block:
    """What became of each range, and what was decided on each snapshot."""
    names = _names(report.leaf, report.snapshots)
    done = sum(one.is_done for one in report.ranges)
    is_done = done == len(report.ranges)
    gone = sum(not one.stays for one in report.snapshots)
    stay = len(report.snapshots) - gone
    leaf = names.of(report.leaf)
    if not report.ranges:
        title = f"Nothing to thin out: all {counted(stay, 'snapshot')} of {leaf} stay{names.place}"
        title = title if stay else f"Nothing to thin out: {leaf} has no snapshots{names.place}"
    elif is_done:
        title = f"{counted(gone, 'snapshot')} of {leaf} merged, {stay} left{names.place}"
    else:
        title = f"{done} of {counted(len(report.ranges), 'range')} merged{names.place}"
    parts: list[Block] = [
        words(title, layout.GOOD if is_done else layout.BAD),
        *_snapshots(report.snapshots, report.decided_at, names),
        *_merged_ranges(report.ranges, names),
    ]
    for one in report.ranges:
        parts += reasons_not_done(one, names)
    for merged in (one.report for one in report.ranges):
        parts += () if merged is None else warnings_of(merged, names)
    if not is_done:
        parts.append(words("The same command does the rest."))
    return stack(*parts)


def thin_out_details(report: ThinOutReport) -> Block:
    """The same as :func:`thin_out_report`, and everything else that was found of each range."""
    parts: list[Block] = [thin_out_report(report)]
    for one in report.ranges:
        if one.report is not None:
            parts += [layout.EMPTY_LINE, words(one.top, layout.TITLE), merge_details(one.report)]
    return stack(*parts)


def _names(leaf: str, snapshots: Sequence[SnapshotFate]) -> ImageNames:
    return names_in([leaf, *(one.image for one in snapshots)])


def _headline(plan: ThinOutPlan, names: ImageNames) -> str:
    go = sum(not one.stays for one in plan.snapshots)
    stay = len(plan.snapshots) - go
    leaf = names.of(plan.leaf)
    if not plan.snapshots:
        return f"{leaf} has no snapshots{names.place}"
    verb = "goes" if go == 1 else "go"
    rest = "stays" if stay == 1 else "stay"
    return f"Of the snapshots of {leaf}, {go} {verb} and {stay} {rest}{names.place}"


def _answer(plan: ThinOutPlan, names: ImageNames, command: str) -> Iterator[Block]:
    if plan.ranges:
        passes = counted(len(plan.ranges), "merge")
        copies = short_size(plan.bytes_to_copy) if plan.bytes_to_copy else "nothing"
        yield words(f"{passes}: copies {copies}, frees {short_size(plan.freed_bytes)}")
        yield from time_taken(plan.ranges)
        yield users_line(plan.ranges[0], names)
    if plan.refusals:
        for refusal in plan.refusals:
            yield from refused(refusal)
    elif plan.ranges:
        yield layout.command_line("Do it: ", command)
    else:
        yield words("Nothing to do", layout.GOOD)


def _snapshots(snapshots: Sequence[SnapshotFate], now: int, names: ImageNames) -> Iterator[Block]:
    if not snapshots:
        return
    yield layout.EMPTY_LINE
    yield layout.listing(
        ("snapshot", "age", "on disk", "", "why"),
        [
            (
                words(names.of(one.image)),
                _age(one.written_at, now),
                words("-", layout.QUIET)
                if one.occupied_bytes is None
                else words(short_size(one.occupied_bytes)),
                words("stays", layout.GOOD) if one.stays else words("goes", layout.CAUTION),
                words(names.left_out_of(one.reason), layout.QUIET),
            )
            # The leaf's end of the chain first, as everywhere.
            for one in reversed(snapshots)
        ],
        right=("age", "on disk"),
    )


def _age(written_at: int | None, now: int) -> Words:
    if written_at is None:
        return words("-", layout.QUIET)
    seconds = max(0, now - written_at)
    if seconds >= 2 * _DAY:
        return words(f"{seconds // _DAY} d")
    if seconds >= 2 * _HOUR:
        return words(f"{seconds // _HOUR} h")
    return words(f"{seconds // 60} min")


def _planned_ranges(plans: Sequence[MergePlan], names: ImageNames) -> Iterator[Block]:
    if not plans:
        return
    rows = [
        (
            words(names.of(plan.base)),
            words(names.of(plan.top)),
            words(str(_images_in(plan))),
            words("up" if plan.pulls else "down"),
            words(short_size(plan.bytes_copied)),
            words(short_size(plan.freed_bytes)),
            words("REFUSED", layout.BAD) if plan.refusals else words("merge", layout.GOOD),
        )
        for plan in plans
    ]
    headings = ("from", "up to", "images", "data goes", "copies", "frees", "verdict")
    yield layout.EMPTY_LINE
    yield layout.listing(headings, rows, right=("images", "copies", "frees"))


def _images_in(plan: MergePlan) -> int:
    paths = [image.path for image in plan.images]
    return paths.index(plan.top) - paths.index(plan.base) + 1


def _merged_ranges(ranges: Sequence[DiskReport], names: ImageNames) -> Iterator[Block]:
    if not ranges:
        return
    yield layout.EMPTY_LINE
    yield layout.listing(
        ("from", "up to", "outcome", "copied", "frees"),
        [_merged_range(one, names) for one in ranges],
        right=("copied", "frees"),
    )


def _merged_range(one: DiskReport, names: ImageNames) -> tuple[Words, ...]:
    copied = freed = ""
    if one.report is not None:
        copied = short_size(bytes_moved(one.report))
        freed = "" if one.report.plan is None else short_size(one.report.plan.freed_bytes)
    style = layout.GOOD if one.is_done else layout.BAD
    ends = words(names.of(one.base)), words(names.of(one.top))
    return *ends, words(one.outcome, style), words(copied), words(freed)
