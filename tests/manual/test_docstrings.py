# SPDX-License-Identifier: Apache-2.0
"""Docstrings of the public names are read by the site as they were meant."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, Final

import pytest

import chainmerge
from chainmerge import live

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECTION: Final = re.compile(r"^(Attributes|Args|Raises):\n((?: {4}.*\n|\n)+)", re.MULTILINE)
_ENTRY: Final = re.compile(r"^ {4}(\S.*)$", re.MULTILINE)
_NAMES: Final = re.compile(r"(\*{0,2}\w+(?:, \w+)*)(?::(?: .*)?)?")


def _documented() -> Iterator[tuple[str, Any]]:
    for module in (chainmerge, live):
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isclass(found) or inspect.isfunction(found):
                yield f"{module.__name__}.{name}", found


def entries(docstring: str) -> Iterator[tuple[str, str]]:
    """The lines that begin an entry, each with its section; what goes on is indented further."""
    for section, text in _SECTION.findall(f"{inspect.cleandoc(docstring)}\n"):
        for line in _ENTRY.findall(text):
            yield section, line


def test_a_line_that_goes_on_is_not_taken_for_an_entry() -> None:
    good = "Sum.\n\nArgs:\n    a: one,\n        or two.\n    b: two.\n"
    assert list(entries(good)) == [("Args", "a: one,"), ("Args", "b: two.")]
    assert ("Args", "or two.") in entries(good.replace("        or", "    or"))


@pytest.mark.parametrize(
    ("name", "found"), tuple(_documented()), ids=lambda one: one if isinstance(one, str) else ""
)
def test_what_is_described_is_there(name: str, found: Any) -> None:
    for section, line in entries(found.__doc__ or ""):
        names = _NAMES.fullmatch(line)
        assert names, f"{name}: {line!r} begins no entry: indent it further"
        if section == "Args":
            signature = inspect.signature(found)
            assert set(names[1].split(", ")) <= set(signature.parameters), (name, line)
        if section == "Attributes":
            assert all(_has(found, one) for one in names[1].split(", ")), (name, line)


def _has(found: Any, name: str) -> bool:
    declared = {field for one in found.__mro__ for field in getattr(one, "__annotations__", {})}
    return name in declared or hasattr(found, name) or name in inspect.getsource(found.__init__)
