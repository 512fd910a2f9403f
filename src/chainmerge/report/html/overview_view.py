# SPDX-License-Identifier: Apache-2.0
"""What the part of a page about all chains shows: how long they are, and which to merge first."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from markupsafe import Markup
from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.scan import Severity
from chainmerge.report.forecasts import forecast_sentence
from chainmerge.report.html.drawings import Moment, Part, bar, trend
from chainmerge.report.text import moment, short_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from chainmerge.documents.chain_pictures import ChainsPictures
    from chainmerge.documents.chains import ChainSummary
    from chainmerge.documents.scan import ScanFinding
    from chainmerge.documents.trends import TrendPoint

_WORST: Final = 20
_FINDINGS: Final = 100
"""Of each severity."""
_LOOKS: Final[Mapping[Severity, str]] = {
    Severity.INFO: "quiet",
    Severity.WARNING: "caution",
    Severity.CRITICAL: "bad",
}
_SAID: Final[Mapping[Severity, str]] = {
    Severity.INFO: "for information",
    Severity.WARNING: "to be warned of",
    Severity.CRITICAL: "critical",
}
_LENGTHS: Final = (1, 2, 5, 10, 25, 30, 100, 200)
"""The most images of a chain that each bar counts; one more bar has the longer ones.

From 25 on, libvirt before 12.0 does not start the machine; 200 is libvirt's limit.
"""


class BarRow(Struct, frozen=True):
    """A label, a bar, and what it stands for in words."""

    label: str
    bar: Markup
    said: str


class WorstRow(Struct, frozen=True):
    """A chain, and what merging it frees."""

    leaf: str
    images: str
    occupied: str
    frees: str
    bar: Markup
    state: str


class FindingRow(Struct, frozen=True):
    """Something that is wrong with an image."""

    image: str
    sentence: str
    code: str
    command: str


class FindingGroup(Struct, frozen=True):
    """The findings of one severity: how many, and the first of them."""

    heading: str
    look: str
    rows: tuple[FindingRow, ...]
    left_out: str


class TrendRow(Struct, frozen=True):
    """How a figure changed: what it is, its curve, and both of its ends."""

    heading: str
    curve: Markup
    first: str
    last: str


class OverviewView(Struct, frozen=True):
    """The part of a page about all chains."""

    summary: str
    trends: tuple[TrendRow, ...]
    forecasts: tuple[str, ...]
    lengths: tuple[BarRow, ...]
    worst: tuple[WorstRow, ...]
    left_out: str
    findings: tuple[FindingGroup, ...]
    problems: tuple[str, ...]


def overview_view(found: ChainsPictures) -> OverviewView:
    """What to show of all chains, and of what is wrong with them."""
    chains = found.chains
    freed = sum(chain.freed_bytes or 0 for chain in chains)
    rest = len(chains) - _WORST
    return OverviewView(
        summary=f"{counted(len(chains), 'chain')}; merging frees about {short_size(freed)}",
        trends=tuple(_trends(found.trends)),
        forecasts=tuple(map(forecast_sentence, found.forecasts)),
        lengths=tuple(_lengths(chains)),
        worst=tuple(_worst(chains[:_WORST])),
        left_out=f"{counted(rest, 'more chain')} not shown" if rest > 0 else "",
        findings=tuple(_findings(found.findings)),
        problems=tuple(dict.fromkeys(found.problems)),
    )


def _trends(points: Sequence[TrendPoint]) -> Iterator[TrendRow]:
    """Nothing for fewer than two points, between which there is no change."""
    if len(points) < 2:
        return
    for heading, value_of, said in _FIGURES:
        moments = [Moment(point.at, value_of(point)) for point in points]
        first, last = (f"{said(one.value)}, {moment(one.at)}" for one in (moments[0], moments[-1]))
        yield TrendRow(heading, trend(moments, f"from {first} to {last}"), first, last)


_FIGURES: Final[tuple[tuple[str, Callable[[TrendPoint], int], Callable[[int], str]], ...]] = (
    ("what files take", lambda point: point.occupied_bytes, short_size),
    ("what merging would free", lambda point: point.freed_bytes, short_size),
    ("the longest chain", lambda point: point.longest, lambda images: counted(images, "image")),
)


def _findings(findings: Sequence[ScanFinding]) -> Iterator[FindingGroup]:
    """By severity, the worst first."""
    for severity in reversed(Severity):
        rows = [
            FindingRow(one.image, one.sentence, one.code, one.command or "")
            for one in findings
            if one.severity is severity
        ]
        if rows:
            rest = len(rows) - _FINDINGS
            yield FindingGroup(
                heading=f"{len(rows)} {_SAID[severity]}",
                look=_LOOKS[severity],
                rows=tuple(rows[:_FINDINGS]),
                left_out=f"{counted(rest, 'more finding')} not shown" if rest > 0 else "",
            )


def _lengths(chains: Sequence[ChainSummary]) -> Iterator[BarRow]:
    """How many chains have how many images, from the shortest to the longest that there are."""
    known = [chain.images for chain in chains if chain.images is not None]
    bounds = (0, *_LENGTHS, max((*known, _LENGTHS[-1])))
    counts = {
        (low, high): sum(low < images <= high for images in known) for low, high in pairwise(bounds)
    }
    filled = [ends for ends, count in counts.items() if count]
    for (low, high), count in counts.items():
        if filled and filled[0] <= (low, high) <= filled[-1]:
            said = counted(count, "chain")
            label = counted(high, "image") if high == low + 1 else f"{low + 1} to {high} images"
            yield BarRow(label, bar([Part("visible", count)], max(counts.values()), said), said)


def _worst(chains: Sequence[ChainSummary]) -> Iterator[WorstRow]:
    most = max((chain.freed_bytes or 0 for chain in chains), default=0)
    for chain in chains:
        frees = "-" if chain.freed_bytes is None else short_size(chain.freed_bytes)
        yield WorstRow(
            leaf=chain.leaf,
            images="-" if chain.images is None else str(chain.images),
            occupied="-" if chain.occupied_bytes is None else short_size(chain.occupied_bytes),
            frees=frees,
            bar=bar([Part("hidden", chain.freed_bytes or 0)], most, f"frees {frees}"),
            state=_state(chain),
        )


def _state(chain: ChainSummary) -> str:
    states = [
        *(("unreadable" if chain.freed_bytes is None else "damaged",) if chain.problem else ()),
        *(("unfinished",) if chain.unfinished else ()),
        *(("in use",) if chain.users else ()),
    ]
    return ", ".join(states) or "ok"
