# SPDX-License-Identifier: Apache-2.0
"""Elements of SVG as text. All that is not an element already is made printable, and escaped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from chainmerge.documents.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

Value = str | float


def element(name: str, attributes: dict[str, Value], *content: str) -> Markup:
    """Return an element.

    Args:
        name: its name.
        attributes: by their names; numbers are written to two decimals.
        content: elements, and text that is shown as it is.
    """
    written = "".join(
        f' {attribute}="{escape(figure(value))}"' for attribute, value in attributes.items()
    )
    if not content:
        # All of them come from this package.
        return Markup(f"<{name}{written}/>")  # noqa: S704
    return Markup(f"<{name}{written}>{joined_elements(content)}</{name}>")  # noqa: S704


def joined_elements(parts: Iterable[str]) -> Markup:
    """Return elements and text in a row."""
    # To join is to escape what is not markup.
    return Markup("").join(part if isinstance(part, Markup) else printable(part) for part in parts)


def figure(value: Value) -> str:
    """Return a number as short as can be, to two decimals; text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".")


def title(text: str) -> Markup:
    """Return what is shown where the pointer rests, and read aloud."""
    return element("title", {}, text)


def rectangle(x: Value, y: Value, width: Value, height: Value, look: str) -> Markup:
    """Return a rectangle; *look* is its class."""
    return element("rect", {"x": x, "y": y, "width": width, "height": height, "class": look})


def line(x1: Value, y1: Value, x2: Value, y2: Value, look: str) -> Markup:
    """Return a straight line; *look* is its class."""
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": look})


def stretched(width: float, height: float, look: str, *content: str) -> Markup:
    """Return a drawing that is stretched to the place that it gets, of *width* by *height*."""
    box = f"0 0 {figure(width)} {figure(height)}"
    attributes: dict[str, Value] = {
        "class": look,
        "viewBox": box,
        "preserveAspectRatio": "none",
        "role": "img",
    }
    return element("svg", attributes, *content)
