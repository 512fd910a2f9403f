# SPDX-License-Identifier: Apache-2.0
"""An error for people: what is wrong, what to do, and where more is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.report import layout
from chainmerge.report.layout import Stack, Words, joined, stack, words

if TYPE_CHECKING:
    from chainmerge.errors import ChainmergeError


def error_message(error: ChainmergeError) -> Stack:
    """Return what a command says when it ends with an error."""
    return stack(
        _unfolded("chainmerge: ", error.sentence, layout.BAD),
        _unfolded("  what to do: ", error.advice, layout.QUIET),
        _unfolded("  more: ", f"chainmerge explain {error.code}", layout.QUIET),
    )


def _unfolded(label: str, text: str, style: str) -> Words:
    """A line that the terminal folds, so that what is copied from there is one line."""
    return Words(joined(words(label, style), words(text)).parts, folds=False)
