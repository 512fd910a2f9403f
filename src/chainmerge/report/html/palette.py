# SPDX-License-Identifier: Apache-2.0
"""The colours of a page, for light and dark, and on which of them text and drawings stand.

No fact is told by colour alone: what is drawn differs in texture, shape or place as well.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

LIGHT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "page": "#ffffff",
        "panel": "#f3f5f8",
        "line": "#c3cad4",
        "text": "#1b2330",
        "quiet": "#4a5564",
        "good": "#166534",
        "caution": "#8a4b06",
        "bad": "#b42318",
        "moves": "#a8135f",
        "visible": "#1f5fa6",
        "hidden": "#a8570c",
        "metadata": "#5f6b7a",
        "bitmaps": "#6d3bc4",
    }
)
DARK: Final[Mapping[str, str]] = MappingProxyType(
    {
        "page": "#12161c",
        "panel": "#1c232d",
        "line": "#3b4655",
        "text": "#e6eaf0",
        "quiet": "#aab5c3",
        "good": "#6fd394",
        "caution": "#f2c063",
        "bad": "#ff9a91",
        "moves": "#f58bc0",
        "visible": "#6cb0f5",
        "hidden": "#f0a95a",
        "metadata": "#9aa6b5",
        "bitmaps": "#b79cf7",
    }
)
GROUNDS: Final = ("page", "panel")
"""What everything else stands on."""
TEXTS: Final = ("text", "quiet", "good", "caution", "bad", "moves")
"""Colours that text has."""
DRAWN: Final = ("good", "caution", "bad", "moves", "visible", "hidden", "metadata", "bitmaps")
"""Colours of what is drawn."""


def style_variables(colours: Mapping[str, str]) -> str:
    """Return colours as CSS variables, ``--`` before their names."""
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())
