# SPDX-License-Identifier: Apache-2.0
"""Drawings, from numbers to SVG. What the classes look like is in ``style.css``."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.report.html.svg import (
    element,
    figure,
    line,
    rectangle,
    stretched,
    title,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from markupsafe import Markup

    from chainmerge.documents.disk_map import DiskMap

_CHAIN: Final = 12
"""Where the line of the chain is, in pixels from the left."""
_MOVE: Final = 34
"""Where the line is along which data moves."""
_MIDDLE: Final = "50%"
_LEAST_SHOWN: Final = 0.4
"""What is there at all is that wide at least, in per cent."""
_STEPS: Final = 8
"""In so many steps a column of the map fills its row."""


class Part(Struct, frozen=True):
    """A part of a bar: its class, and how large it is."""

    look: str
    value: int


def bar(parts: Sequence[Part], whole: int, said: str) -> Markup:
    """Return parts side by side, as long as they are of *whole*.

    Args:
        parts: from the left.
        whole: what the full length stands for.
        said: the same in words.
    """
    drawn, at = [], 0.0
    for part in parts:
        if part.value > 0:
            width = max(_LEAST_SHOWN, 100 * part.value / whole) if whole else 0.0
            width = min(width, 100 - at)
            drawn.append(rectangle(f"{figure(at)}%", 0, f"{figure(width)}%", "100%", part.look))
            at += width
    return element("svg", {"class": "bar", "role": "img"}, title(said), *drawn)


class TreeStep(Struct, frozen=True):
    """An image in the drawing of its chain, which has the leaf at the top.

    Attributes:
        stands_alone_above: Whether nothing is above it.
        stands_alone_below: Whether nothing is below it.
        mark: ``stays``, ``goes`` or ``result``.
        moves_above: Whether data moves past or from its upper side.
        moves_below: Whether data moves past or from its lower side.
    """

    stands_alone_above: bool
    stands_alone_below: bool
    mark: str
    moves_above: bool = False
    moves_below: bool = False


def tree_step(step: TreeStep) -> Markup:
    """Return an image's part of the drawing of its chain, as high as its row is."""
    drawn: list[str] = []
    if not step.stands_alone_above:
        drawn.append(line(_CHAIN, 0, _CHAIN, _MIDDLE, "chain"))
    if not step.stands_alone_below:
        drawn.append(line(_CHAIN, _MIDDLE, _CHAIN, "100%", "chain"))
    if step.moves_above:
        drawn.append(line(_MOVE, 0, _MOVE, _MIDDLE, "move"))
    if step.moves_below:
        drawn.append(line(_MOVE, _MIDDLE, _MOVE, "100%", "move"))
    if step.moves_above or step.moves_below:
        reach = _CHAIN + (17 if step.mark == "result" else 10)
        drawn.append(line(reach, _MIDDLE, _MOVE, _MIDDLE, "move"))
    drawn += _mark(step.mark, arrives=step.moves_above or step.moves_below)
    return element("svg", {"class": "step", "aria-hidden": "true"}, *drawn)


def _mark(mark: str, *, arrives: bool) -> Iterator[Markup]:
    if mark == "goes":
        yield element("circle", {"cx": _CHAIN, "cy": _MIDDLE, "r": 6, "class": "goes"})
        yield _at_middle("M-4 -4L4 4M-4 4L4 -4", "cross")
        return
    if mark == "result":
        yield element("circle", {"cx": _CHAIN, "cy": _MIDDLE, "r": 8, "class": "ring"})
        if arrives:
            yield _at_middle("M10 0L18 -5L18 5Z", "head")
    yield element("circle", {"cx": _CHAIN, "cy": _MIDDLE, "r": 5, "class": "stays"})


def _at_middle(path: str, look: str) -> Markup:
    """A shape around the middle of an image's mark."""
    return element(
        "svg",
        {"x": _CHAIN, "y": _MIDDLE, "class": "over"},
        element("path", {"d": path, "class": look}),
    )


def map_of_disk(drawn: DiskMap, looks: Sequence[str], said: str) -> Markup:
    """Return the guest's disk from left to right, and the layers from the root up.

    In each column the layer that decides most of it is drawn, as high as its share is of what is
    written there.

    Args:
        drawn: the map.
        looks: the class of each layer, from the root up.
        said: the same in words.
    """
    top = len(drawn.images)
    columns = [_filled(column.layer, column.layer_bytes, drawn) for column in drawn.columns]
    parts, at = [], 0
    for (layer, steps), run in groupby(columns):
        width = len(list(run))
        if layer is not None:
            bottom = (top - layer) * _STEPS
            parts.append(rectangle(at, bottom - steps, width, steps, looks[layer]))
        at += width
    look = "map few" if top <= _ROWS_WITH_ROOM else "map"
    return stretched(max(1, len(columns)), max(1, top) * _STEPS, look, title(said), *parts)


_ROWS_WITH_ROOM: Final = 6


def _filled(layer: int | None, layer_bytes: int, drawn: DiskMap) -> tuple[int | None, int]:
    """Which row a column is in, and in how many steps it fills it."""
    whole = min(drawn.column_bytes, drawn.virtual_size)
    return layer, 0 if layer is None else max(1, round(_STEPS * layer_bytes / whole))


def states_of_checkpoint(states: Sequence[str], said: str) -> Markup:
    """Return what each image has of a checkpoint, the root at the left.

    Args:
        states: ``valid``, ``disabled``, ``in-use``, ``tombstone`` or ``absent``, by image.
        said: the same in words.
    """
    parts, at = [], 0
    for state, run in groupby(states):
        width = len(list(run))
        if state in _STATE_BOXES:
            top, height, look = _STATE_BOXES[state]
            parts.append(rectangle(at, top, width, height, look))
        at += width
    ground = line(0, 11, at, 11, "ground")
    return stretched(max(1, at), 12, "states", title(said), ground, *parts)


_STATE_BOXES: Final = {
    "valid": (0, 11, "good"),
    "disabled": (6, 5, "caution"),
    "in-use": (0, 11, "broken"),
    "tombstone": (9, 2, "caution"),
}
"""Of each state: where its box begins, how high it is, and its class."""


class Moment(Struct, frozen=True):
    """A value at a time, in seconds since 1970."""

    at: int
    value: int


def trend(moments: Sequence[Moment], said: str) -> Markup:
    """Return how a value changed; it begins at zero, and the last moment is at the right.

    Args:
        moments: in the order of time, two at least.
        said: the same in words.
    """
    first, last = moments[0].at, moments[-1].at
    most = max(moment.value for moment in moments)
    points = " ".join(
        f"{figure(1000 * (moment.at - first) / max(1, last - first))},"
        f"{figure(100 - 96 * moment.value / max(1, most))}"
        for moment in moments
    )
    curve = element("polyline", {"points": points, "class": "curve"})
    return stretched(1000, 100, "trend", title(said), line(0, 100, 1000, 100, "ground"), curve)


def sample(look: str) -> Markup:
    """Return a small box of a class, for a legend."""
    return element(
        "svg",
        {"class": "sample", "aria-hidden": "true"},
        rectangle(0, 0, "100%", "100%", look),
    )
