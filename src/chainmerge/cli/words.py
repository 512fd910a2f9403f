# SPDX-License-Identifier: Apache-2.0
"""What somebody may have meant who has mistyped a word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

# Dashes make all options look alike a little.
_ALIKE: Final = 0.7


def close_to(word: str, known: Iterable[str]) -> list[str]:
    """Return the known words that look like *word*, the most similar one first."""
    # It takes time to load, and few words are mistyped.
    from difflib import get_close_matches  # noqa: PLC0415

    return get_close_matches(word, list(known), n=2, cutoff=_ALIKE)


def did_you_mean(candidates: Iterable[str]) -> str:
    """Ask, or return nothing if there is nothing to ask."""
    quoted = [f"`{candidate}`" for candidate in candidates]
    return f"did you mean {' or '.join(quoted)}?" if quoted else ""
