# SPDX-License-Identifier: Apache-2.0
"""How well a colour stands out from another one, by WCAG 2.2 ("relative luminance")."""

from __future__ import annotations


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours as ``#rrggbb``, from 1 to 21."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = (_linear(int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)
