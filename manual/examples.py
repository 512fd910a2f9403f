# SPDX-License-Identifier: Apache-2.0
"""Examples of commands, from the recipes, which tests run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_RECIPES: Final = Path(__file__).parents[1] / "docs" / "recipes.md"
_RECIPE: Final = re.compile(r"^## (.+?)$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_TYPED: Final = re.compile(r"^\$ (chainmerge .+)$", re.MULTILINE)


class Example(Struct, frozen=True):
    """A command line, and what it is for."""

    purpose: str
    line: str


def examples_of(words: Sequence[str]) -> tuple[Example, ...]:
    """Return the recipes' lines that call the command with these words."""
    return tuple(one for one in _all_examples() if _calls(one.line, words))


def _all_examples() -> Iterator[Example]:
    for purpose, recipe in _RECIPE.findall(_RECIPES.read_text(encoding="utf-8")):
        for line in _TYPED.findall(recipe):
            yield Example(purpose, line)


def _calls(line: str, words: Sequence[str]) -> bool:
    return line.split()[: len(words)] == list(words)
