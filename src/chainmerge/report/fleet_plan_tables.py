# SPDX-License-Identifier: Apache-2.0
"""A fleet's inventory and its plan, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, stack, words
from chainmerge.report.text import moment, short_size

if TYPE_CHECKING:
    from chainmerge.documents.fleet_inventory import FleetInventory, HostSummary
    from chainmerge.report.fleet_plan_view import FleetPlanRow, FleetPlanView

_SHOWN: Final = 100
"""Jobs that a table has; a file has all."""
_JOB_HEADINGS: Final = ("host", "vm", "images", "frees", "copies", "free", "storages", "top")
_REASON_HEADINGS: Final = ("chains", "why", "such as")
_HOST_HEADINGS: Final = (
    "host",
    "scanned",
    "chains",
    "longest",
    "frees",
    "stale",
    "unfinished",
    "refused",
)
_NUMBERS: Final = frozenset(_HOST_HEADINGS[2:]) | {"images", "frees", "copies", "free"}


def fleet_plan_report(plan: FleetPlanView) -> Block:
    """What is to be done, in its order, and why the rest is not."""
    rest = len(plan.jobs) - _SHOWN
    frees = sum(job.hidden_bytes or 0 for job in plan.jobs)
    copies = sum(job.bytes_to_copy or 0 for job in plan.jobs)
    hosts = counted(len({job.host for job in plan.jobs}), "host")
    title = (
        f"{counted(len(plan.jobs), 'job')} on {hosts}: frees {short_size(frees)}, "
        f"copies {short_size(copies)}"
    )
    return stack(
        words(title, layout.TITLE),
        *(
            (
                layout.EMPTY_LINE,
                layout.listing(_JOB_HEADINGS, map(_job_row, plan.jobs[:_SHOWN]), right=_NUMBERS),
            )
            if plan.jobs
            else ()
        ),
        *((words(f"{counted(rest, 'more job')} not shown", layout.QUIET),) if rest > 0 else ()),
        *_left_out(plan),
        *((layout.section("Limits", layout.bullets(plan.limits)),) if plan.limits else ()),
        *layout.warnings_section(plan.warnings),
    )


def _job_row(job: FleetPlanRow) -> list[Words]:
    return [
        words(job.host),
        words(job.vm or "-", "" if job.vm else layout.QUIET),
        layout.number(job.images),
        _size(job.hidden_bytes),
        _size(job.bytes_to_copy),
        _size(job.free_bytes),
        words(", ".join(job.storages), layout.QUIET),
        words(", ".join(job.tops)),
    ]


def _size(value: int | None) -> Words:
    return words("-", layout.QUIET) if value is None else words(short_size(value))


def _left_out(plan: FleetPlanView) -> tuple[Block, ...]:
    if not plan.left_out:
        return ()
    rows = (
        [layout.number(one.chains), words(f"{one.code}: {one.reason}"), words(one.example)]
        for one in plan.left_out
    )
    return (layout.section("Left out", layout.listing(_REASON_HEADINGS, rows, right=("chains",))),)


def inventory_report(inventory: FleetInventory) -> Block:
    """A line for each host, and what several of them share."""
    if not inventory.hosts:
        return words("no worker has ever started", layout.QUIET)
    doubtful = [one.sentence for one in inventory.shared if one.is_refused or one.is_doubtful]
    unseen = [f"{host.host}: {sentence}" for host in inventory.hosts for sentence in host.left_out]
    return stack(
        layout.listing(_HOST_HEADINGS, map(_host_row, inventory.hosts), right=_NUMBERS),
        *layout.warnings_section((*doubtful, *unseen)),
    )


def _host_row(host: HostSummary) -> list[Words]:
    scanned = words("never", layout.CAUTION)
    if host.scanned_at is not None:
        scanned = words(moment(host.scanned_at))
    return [
        words(host.host),
        scanned,
        layout.number(host.chains),
        layout.number(host.longest),
        _size(host.freed_bytes),
        _size(host.stale_bytes),
        layout.number(host.unfinished),
        layout.number(host.refused),
    ]
