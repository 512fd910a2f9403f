# SPDX-License-Identifier: Apache-2.0
"""What the documentation and the docstrings name is there: modules, files, links, commands."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from chainmerge import api
from chainmerge.cli.main import _COMMANDS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = ROOT / "src" / "chainmerge"
DOCS: Final = ROOT / "docs"
PAGES: Final = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
SOURCES: Final = sorted(
    file
    for directory in ("src", "tests", "demo", "benchmarks", "release")
    for file in (ROOT / directory).rglob("*.py")
)

# "chainmerge.planning.leaks", but not ".BASE.chainmerge-saved".
_DOTTED: Final = re.compile(r"(?<![\w./-])chainmerge(?:\.[A-Za-z_]\w*)+")
_PATH: Final = re.compile(
    r"(?<![\w./-])(?:src/chainmerge|tests|docs|demo|benchmarks|release|scripts)/[\w./-]*\w"
)
# A module as `planning/plan.py` or a directory as `live/qmp/`, from the root or in the package.
_QUOTED_PATH: Final = re.compile(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+(?:\.py|/))`")
_ROW_OF_PACKAGE: Final = re.compile(r"\| `([\w/]+/)` \|")
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
# A function as `find_refusals()`, or a constant as `SPELLINGS`.
_QUOTED_NAME: Final = re.compile(r"`(?:\w+\.)*(_*[a-z]\w*(?=\(\)`)|_*[A-Z][A-Z_]+(?=`))")
_HEADING: Final = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FENCED: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

# Made by what runs.
_MADE: Final = frozenset({"build/", "dist/"})
# The specification in QEMU's sources.
_OF_OTHERS: Final = frozenset({"docs/interop/qcow2.txt"})


def _name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@dataclass(frozen=True, slots=True)
class Source:
    """What is read of a source: docstrings (of fields and constants too), and what it defines."""

    docstrings: str
    defined: frozenset[str]


@functools.cache
def _source(file: Path) -> Source:
    docstrings, defined = [], set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                docstrings.append(text)
            case ast.FunctionDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                defined.add(name)
            case _:
                pass
    return Source("\n".join(docstrings), frozenset(defined))


def _said(file: Path) -> str:
    return _source(file).docstrings if file.suffix == ".py" else file.read_text(encoding="utf-8")


@functools.cache
def _names_something(dotted: str) -> bool:
    """Whether a module has this name, or something in a module."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath("src", *parts[:count])
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            found: Any = importlib.import_module(".".join(parts[:count]))
            return _has(found, parts[count:])
    return False


def _has(owner: Any, names: list[str]) -> bool:
    if not names:
        return True
    first, *rest = names
    if hasattr(owner, first):
        return _has(getattr(owner, first), rest)
    # A field without a default is nowhere but in the annotations.
    return not rest and first in getattr(owner, "__annotations__", {})


def test_every_module_that_is_named_exists() -> None:
    missing = {
        (_name_of(file), dotted)
        for file in (*PAGES, *SOURCES)
        for dotted in _DOTTED.findall(_said(file))
        if not _names_something(dotted)
    }
    assert missing == set()


def test_every_path_that_is_named_exists() -> None:
    missing = {
        (_name_of(file), path)
        for file in (*PAGES, *SOURCES)
        for path in _PATH.findall(_said(file))
        if path not in _OF_OTHERS and not (ROOT / path).exists()
    }
    assert missing == set()


def _quoted_paths(page: Path) -> Iterator[tuple[str, Path | None]]:
    """The paths that a page quotes, each with the package that its row of a table is about."""
    for line in page.read_text(encoding="utf-8").splitlines():
        row = _ROW_OF_PACKAGE.match(line)
        for path in _QUOTED_PATH.findall(line):
            yield path, None if row is None else PACKAGE / row[1]


@pytest.mark.parametrize("page", PAGES, ids=_name_of)
def test_every_module_that_a_page_quotes_exists(page: Path) -> None:
    missing = {
        path
        for path, about in _quoted_paths(page)
        if path not in _MADE
        and not any((at / path).exists() for at in (ROOT, PACKAGE, about) if at is not None)
    }
    assert missing == set()


def test_every_name_in_the_instructions_is_defined() -> None:
    named = _QUOTED_NAME.findall((DOCS / "development.md").read_text(encoding="utf-8"))
    of_make = set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert len(named) > 30
    defined = frozenset().union(*(_source(file).defined for file in SOURCES))
    assert set(named) - defined - of_make - {"BENCH_ARGS"} == set()


def _anchors(page: Path) -> set[str]:
    """The anchors that the headings of a page have, as GitHub makes them."""
    headings = _HEADING.findall(_FENCED.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in _anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=_name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    ours = [link for link in links if "://" not in link]
    assert [link for link in ours if not _leads_somewhere(page, link)] == []


def _packages() -> Iterator[str]:
    """All packages, and what stands beside them."""
    for found in PACKAGE.rglob("__init__.py"):
        if found.parent != PACKAGE:
            yield f"{found.parent.relative_to(PACKAGE)}/"
    for module in PACKAGE.glob("[!_]*.py"):
        yield module.name


def _rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without the table's head."""
    below = page.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert table, f"{page.name} has no table below {heading!r}"
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_map_has_every_package_once() -> None:
    mapped = [row[0].strip("`") for row in _rows(DOCS / "development.md", "## The map")]
    assert sorted(mapped) == sorted(_packages())


def test_the_layers_are_those_of_the_contract() -> None:
    """design.md has them in the order that import-linter enforces."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (
        contract["layers"]
        for contract in contracts["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    drawn = [row[0] for row in _rows(DOCS / "design.md", "## Layers")]
    assert [re.findall(r"`(\w+)`", cell) for cell in drawn] == [
        layer.split(" | ") for layer in layers
    ]


def test_every_command_is_described() -> None:
    described = "\n".join(row[0] for row in _rows(DOCS / "commands.md", "# Commands"))
    found = set(re.findall(r"`chainmerge ([\w-]+)", described))
    assert found == set(_COMMANDS)


def test_every_public_function_is_described() -> None:
    described = set(re.findall(r"`(\w+)`", (DOCS / "api.md").read_text(encoding="utf-8")))
    assert set(api.__all__) - described == set()
