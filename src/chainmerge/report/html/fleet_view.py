# SPDX-License-Identifier: Apache-2.0
"""What pages about a fleet show beside its chains: bars by host, reasons, outcomes, and plans."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.chain_pictures import ChainsPictures
from chainmerge.documents.chains import ChainSummary
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.report.html.drawings import Part, bar
from chainmerge.report.html.overview_view import BarRow
from chainmerge.report.text import moment, short_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from chainmerge.documents.fleet_inventory import (
        FleetPictures,
        HostInventory,
        InventoryChain,
    )
    from chainmerge.report.fleet_plan_view import FleetPlanRow, FleetPlanView

_MOST_ROWS: Final = 40
_MOST_SENTENCES: Final = 100
_PLAN_HEADINGS: Final = (
    ("job", False),
    ("images", True),
    ("frees", True),
    ("copies", True),
    ("free", True),
    ("host", False),
)


class BarSection(Struct, frozen=True):
    """A heading, and a bar for each of several things."""

    heading: str
    rows: tuple[BarRow, ...]
    left_out: str


class SentenceSection(Struct, frozen=True):
    """A heading, and sentences."""

    heading: str
    sentences: tuple[str, ...]


class Cell(Struct, frozen=True):
    """A cell of a table, under what heading it stands, and whether it is a number."""

    heading: str
    text: str
    is_number: bool


class TableSection(Struct, frozen=True):
    """A heading, and rows of cells, the first of which is what a row is about."""

    heading: str
    headings: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]


class FleetView(Struct, frozen=True):
    """The parts of a page about a fleet, in their order."""

    summary: str
    bars: tuple[BarSection, ...] = ()
    tables: tuple[TableSection, ...] = ()
    sentences: tuple[SentenceSection, ...] = ()


def chains_of_fleet(found: FleetPictures) -> ChainsPictures:
    """The chains of all hosts as those of some places, each once, with the host before its name."""
    chains = {
        chain.base_id or (host.host, chain.leaf): _summary_of(host, chain)
        for host in found.hosts
        for chain in host.chains
    }
    return ChainsPictures(
        version=REPORT_VERSION,
        places=tuple(host.host for host in found.hosts),
        made_at=found.made_at,
        chains=tuple(
            sorted(
                chains.values(),
                key=lambda one: (one.freed_bytes is None, -(one.freed_bytes or 0), one.leaf),
            )
        ),
        findings=(),
        pictures=(),
        problems=tuple(
            f"{host.host}: {sentence}" for host in found.hosts for sentence in host.left_out
        )[:_MOST_SENTENCES],
        trends=found.trends,
    )


def _summary_of(host: HostInventory, chain: InventoryChain) -> ChainSummary:
    return ChainSummary(
        leaf=f"{host.host}: {chain.leaf}",
        images=chain.images,
        virtual_size=chain.virtual_size,
        occupied_bytes=chain.occupied_bytes,
        base=chain.base,
        freed_bytes=chain.freed_bytes,
        bytes_to_copy=chain.bytes_to_copy,
        unfinished=chain.unfinished,
        users=None,
        problem=chain.problem,
    )


def fleet_view(found: FleetPictures) -> FleetView:
    """What to show of all hosts, beside the overview of their chains."""
    hosts = counted(len(found.hosts), "host")
    never = len(found.never_scanned)
    return FleetView(
        summary=f"{hosts} scanned, {never} never" if never else f"{hosts} scanned",
        bars=(
            _bars("What merging frees, by host", _by_host(found, _freed), short_size),
            _bars("What stale bitmaps take, by host", _by_host(found, _stale), short_size),
            _bars("Why merges would be refused", _refusals(found), _chains),
            _bars("How jobs have ended", _outcomes(found), _jobs),
        ),
        sentences=(
            SentenceSection("Unfinished merges", tuple(_unfinished(found))),
            SentenceSection(
                "Shared by several hosts", tuple(place.sentence for place in found.shared)
            ),
            SentenceSection("Never scanned", found.never_scanned),
            SentenceSection("When hosts were scanned", tuple(map(_scanned, found.hosts))),
        ),
    )


def _freed(host: HostInventory) -> int:
    return host.freed_bytes


def _stale(host: HostInventory) -> int:
    return host.stale_bytes


def _by_host(found: FleetPictures, value_of: Callable[[HostInventory], int]) -> dict[str, int]:
    return {host.host: value_of(host) for host in found.hosts}


def _chains(count: int) -> str:
    return counted(count, "chain")


def _jobs(count: int) -> str:
    return counted(count, "job")


def _refusals(found: FleetPictures) -> Counter[str]:
    return Counter(
        code
        for host in found.hosts
        for chain in host.chains
        for code in {refusal.code for refusal in chain.refusals}
    )


def _outcomes(found: FleetPictures) -> dict[str, int]:
    return {one.outcome: one.jobs for one in found.outcomes}


def _unfinished(found: FleetPictures) -> Iterator[str]:
    for host in found.hosts:
        for chain in host.chains:
            if chain.unfinished:
                yield f"{host.host}: {chain.leaf}"


def _scanned(host: HostInventory) -> str:
    return f"{host.host}: {moment(host.scanned_at)}, {counted(host.images, 'image')}"


def _bars(heading: str, values: Mapping[str, int], said: Callable[[int], str]) -> BarSection:
    """The largest first; nothing of what is zero."""
    largest = sorted(
        ((label, value) for label, value in values.items() if value),
        key=lambda one: (-one[1], one[0]),
    )
    rest = len(largest) - _MOST_ROWS
    most = max((value for _, value in largest), default=0)
    return BarSection(
        heading=heading,
        rows=tuple(
            BarRow(label, bar([Part("visible", value)], most, said(value)), said(value))
            for label, value in largest[:_MOST_ROWS]
        ),
        left_out=f"{rest} more not shown" if rest > 0 else "",
    )


def plan_view(plan: FleetPlanView) -> FleetView:
    """What to show of a plan."""
    frees = sum(job.hidden_bytes or 0 for job in plan.jobs)
    copies = sum(job.bytes_to_copy or 0 for job in plan.jobs)
    return FleetView(
        summary=(
            f"{counted(len(plan.jobs), 'job')}: frees {short_size(frees)}, copies "
            f"{short_size(copies)}"
        ),
        bars=(
            _bars("Jobs by host", Counter(job.host for job in plan.jobs), _jobs),
            _bars("Left out", {one.code: one.chains for one in plan.left_out}, _chains),
        ),
        tables=(
            TableSection("Jobs, in their order", _PLAN_HEADINGS, tuple(map(_plan_row, plan.jobs))),
        ),
        sentences=(
            SentenceSection("Limits", plan.limits),
            SentenceSection("Warnings", plan.warnings),
            SentenceSection("Why chains are left out", tuple(_reasons(plan))),
        ),
    )


def _reasons(plan: FleetPlanView) -> Iterator[str]:
    for one in plan.left_out:
        yield f"{one.code}, {counted(one.chains, 'chain')}, such as {one.example}: {one.reason}"


def _plan_row(job: FleetPlanRow) -> tuple[Cell, ...]:
    what = ", ".join(job.tops)
    texts: Iterable[str] = (
        f"{job.vm}: {what}" if job.vm else what,
        "-" if job.images is None else str(job.images),
        _size(job.hidden_bytes),
        _size(job.bytes_to_copy),
        _size(job.free_bytes),
        ", ".join((job.host, *job.storages)),
    )
    return tuple(
        Cell(heading, text, is_number)
        for (heading, is_number), text in zip(_PLAN_HEADINGS, texts, strict=True)
    )


def _size(value: int | None) -> str:
    return "-" if value is None else short_size(value)
