# SPDX-License-Identifier: Apache-2.0
"""What a situation of the zoo is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from chainmerge import DefinedDisk, ScanOptions

Builder = Callable[[Path], object]
Expected = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Situation:
    """How to build one below a directory, and what is found: codes, and names of images."""

    name: str
    build: Builder
    expected: Expected = frozenset()
    options: ScanOptions = field(default_factory=ScanOptions)
    domains: Callable[[Path], tuple[DefinedDisk, ...]] | None = None


SITUATIONS: Final[list[Situation]] = []


def situation(
    *expected: tuple[str, str],
    options: ScanOptions | None = None,
    domains: Callable[[Path], tuple[DefinedDisk, ...]] | None = None,
) -> Callable[[Builder], Builder]:
    """Have a function be one of the situations."""

    def note(build: Builder) -> Builder:
        chosen = options or ScanOptions(cache=False)
        SITUATIONS.append(Situation(build.__name__, build, frozenset(expected), chosen, domains))
        return build

    return note
