# SPDX-License-Identifier: Apache-2.0
"""What ``make quick`` runs is there."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
LIST: Final = Path(__file__).with_name("quick.txt")


def _listed() -> list[str]:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return [place for place in (line.partition("#")[0].strip() for line in lines) if place]


def _tests_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name


@pytest.mark.parametrize("place", _listed())
def test_what_is_listed_is_there(place: str) -> None:
    file, _, test = place.partition("::")
    found = ROOT / file
    assert found.exists(), "take it out of tests/quick.txt, or say what it is called now"
    if test:
        assert test in _tests_of(found)


def test_nothing_is_listed_twice() -> None:
    assert len(_listed()) == len(set(_listed()))
    whole = {place for place in _listed() if "::" not in place}
    assert not [place for place in _listed() if "::" in place and place.split("::")[0] in whole]


def test_the_makefile_runs_this_list() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "tests/quick.txt" in makefile
