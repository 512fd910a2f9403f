# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a merge would do, and of a disk before a merge and after it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge import api
from chainmerge.cli.errors import ReportFileNotWritten
from chainmerge.cli.report_file import write_report_file
from chainmerge.cli.strip import upper_end
from chainmerge.documents.chain_pictures import ChainPictures
from chainmerge.documents.disks import DisksReport
from chainmerge.errors import ChainmergeError
from chainmerge.report.html.pages import DiskChange, html_of_merge, html_of_plans
from chainmerge.report.layout import Block, words
from chainmerge.report.merge_tables import disks_report, merge_report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.documents.merge import MergeReport
    from chainmerge.documents.plan import MergePlan
    from chainmerge.options import Access, MergeOptions

_BEGUN = "The merge was about to begin when this was written: it shows the state before."


class DiskBefore(Struct, frozen=True):
    """A disk as it was when a merge began.

    Attributes:
        end: The upper end of its chain.
        pictures: Of its chain with the plan; or why there are none.
    """

    end: str
    pictures: ChainPictures | str


def draw_plans(plans: Sequence[MergePlan], access: Access, command: str, file: str) -> None:
    """Draw plans that *command* carries out.

    Raises:
        ChainmergeError: an image cannot be read, or the file not be written.
    """
    pictures = [api.picture_chain(upper_end(plan), access, plan) for plan in plans]
    write_report_file(file, html_of_plans(pictures, command, int(time.time())))


def draw_before(
    tops: Sequence[str], bases: Sequence[str], access: Access, options: MergeOptions, file: str
) -> tuple[DiskBefore, ...]:
    """Draw disks before they are merged, so that what cannot be written is found out by then.

    What cannot be read, or not be planned, is a sentence: the merge itself judges that.

    Raises:
        ChainmergeError: the file cannot be written.
    """
    before = tuple(_before(tops, _plans(tops, bases, access, options), access))
    _write([DiskChange(one.pictures, "") for one in before], words(_BEGUN), file)
    return before


def draw_after(
    before: Sequence[DiskBefore], report: MergeReport | DisksReport, access: Access, file: str
) -> None:
    """Draw disks after a merge, beside what they were.

    Raises:
        ReportFileNotWritten: the merge has ended nevertheless.
    """
    if isinstance(report, DisksReport):
        reports, said = [disk.report for disk in report.disks], disks_report(report)
    else:
        reports, said = [report], merge_report(report)
    disks = [
        DiskChange(one.pictures, "" if of_disk is None else _after(of_disk, one.end, access))
        for one, of_disk in zip(before, reports, strict=True)
    ]
    try:
        _write(disks, said, file)
    except ChainmergeError as error:
        raise ReportFileNotWritten(file, error.sentence) from error


def _write(disks: Sequence[DiskChange], said: Block, file: str) -> None:
    write_report_file(file, html_of_merge(disks, said, int(time.time())))


def _plans(
    tops: Sequence[str], bases: Sequence[str], access: Access, options: MergeOptions
) -> Sequence[MergePlan | None]:
    try:
        if len(tops) > 1:
            return api.plan_disks(tops, bases, access, options).disks
        return [api.plan(tops[0], bases[0] if bases else None, access, options)]
    except ChainmergeError:
        # The merge says so, or knows better: it may have been finished but for a deletion.
        return [None] * len(tops)


def _before(
    tops: Sequence[str], plans: Sequence[MergePlan | None], access: Access
) -> Iterator[DiskBefore]:
    for top, plan in zip(tops, plans, strict=True):
        end = top if plan is None else upper_end(plan)
        yield DiskBefore(end, _pictures_or_why_not(end, access, plan))


def _after(report: MergeReport, end: str, access: Access) -> ChainPictures | str:
    """The disk by its upper end, which is the result if the image merged was that."""
    if report.plan is not None and end == report.plan.top:
        end = report.renamed[1] if report.renamed else report.plan.result
    return _pictures_or_why_not(end, access, None)


def _pictures_or_why_not(image: str, access: Access, plan: MergePlan | None) -> ChainPictures | str:
    try:
        return api.picture_chain(image, access, plan)
    except ChainmergeError as error:
        return f"Not drawn: {error.sentence}"
