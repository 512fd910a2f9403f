# SPDX-License-Identifier: Apache-2.0
"""What the part of a page about all chains shows: how long they are, and which to merge first."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from markupsafe import Markup
from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.report.html.drawings import Part, bar
from chainmerge.report.text import short_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.documents.chains import ChainSummary

_WORST: Final = 20
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


class OverviewView(Struct, frozen=True):
    """The part of a page about all chains."""

    summary: str
    lengths: tuple[BarRow, ...]
    worst: tuple[WorstRow, ...]
    left_out: str
    problems: tuple[str, ...]


def overview_view(chains: Sequence[ChainSummary], problems: Sequence[str]) -> OverviewView:
    """What to show of all chains.

    Args:
        chains: those whose merge would free most first.
        problems: what could not be read, a sentence each.
    """
    freed = sum(chain.freed_bytes or 0 for chain in chains)
    rest = len(chains) - _WORST
    return OverviewView(
        summary=f"{counted(len(chains), 'chain')}; merging frees about {short_size(freed)}",
        lengths=tuple(_lengths(chains)),
        worst=tuple(_worst(chains[:_WORST])),
        left_out=f"{counted(rest, 'more chain')} not shown" if rest > 0 else "",
        problems=tuple(dict.fromkeys((*problems, *_problems(chains)))),
    )


def _problems(chains: Sequence[ChainSummary]) -> Iterator[str]:
    for chain in chains:
        if chain.problem is not None:
            yield chain.problem


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
