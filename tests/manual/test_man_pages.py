# SPDX-License-Identifier: Apache-2.0
"""Manual pages have what help has: every command, every option; and every error."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from chainmerge.catalogue import known_subjects
from chainmerge.errors import ExitCode
from chainmerge.records.files import STATE_DIRECTORY
from manual.commands import exit_statuses
from manual.man_pages import man_pages, write_man_pages
from manual.surroundings import ENVIRONMENT, FILES
from tests.support.help_pages import all_help

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES: Final = Path(__file__).parents[2] / "src" / "chainmerge"
_REFERENCE: Final = re.compile(r"\\fB(chainmerge[\w-]*)\\fR\((\d)\)")
_TAG: Final = re.compile(r"^\.TP\n(.*)$", re.MULTILINE)
_BOLD: Final = re.compile(r"\\fB([^\\]+)\\fR")
# What is handed on of it has these names.
_ENVIRONMENT: Final = {"os.environ", "environ", "environment"}
# Set by the scripts that ask for words.
_NOT_FOR_USERS: Final = {"_CHAINMERGE_COMPLETE", "COMP_SPLIT_OFF"}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """All pages, as they are read but for fonts."""
    return {name: text.replace(r"\-", "-") for name, text in man_pages("2026-01-31").items()}


def tags(page: str) -> set[str]:
    """What the entries of a page's lists are of."""
    return {bold for tag in _TAG.findall(page) for bold in _BOLD.findall(tag)}


def test_every_command_has_a_page(pages: dict[str, str]) -> None:
    assert set(pages) == {f"{one.page}.1" for one in all_help()} | {"chainmerge-errors.7"}


def test_every_option_is_on_the_page_of_its_command(pages: dict[str, str]) -> None:
    on_pages = {
        one.page: {tag for tag in tags(pages[f"{one.page}.1"]) if tag.startswith("-")}
        for one in all_help()
    }
    assert on_pages == {one.page: one.options for one in all_help()}


def test_every_group_names_its_commands(pages: dict[str, str]) -> None:
    for one in all_help():
        named = tags(pages[f"{one.page}.1"])
        assert {f"{one.page}-{name}" for name in one.commands} <= named


def test_every_page_has_all_exit_statuses(pages: dict[str, str]) -> None:
    statuses = {str(int(code)) for code in ExitCode}
    assert set(map(str, exit_statuses())) == statuses
    for name, page in pages.items():
        assert name.endswith(".7") or statuses <= tags(page)


def test_every_error_and_every_finding_is_explained(pages: dict[str, str]) -> None:
    assert tags(pages["chainmerge-errors.7"]) == set(known_subjects())


def test_pages_refer_to_pages(pages: dict[str, str]) -> None:
    named = {
        f"{name}.{section}" for text in pages.values() for name, section in _REFERENCE.findall(text)
    }
    assert named == set(pages)


def test_recipes_are_examples(pages: dict[str, str]) -> None:
    assert "\nchainmerge merge --delete snap1.qcow2\n" in pages["chainmerge-merge.1"]
    assert "chainmerge live merge" not in pages["chainmerge-merge.1"]
    assert "\nchainmerge live merge --qmp" in pages["chainmerge-live-merge.1"]
    # A group is called by none of them.
    assert '.SH "EXAMPLES"' not in pages["chainmerge-live.1"]


def _variables_read() -> Iterator[str]:
    """What the sources read of the environment, by its name or by a constant."""
    trees = [ast.parse(file.read_bytes()) for file in SOURCES.rglob("*.py")]
    constants = dict(named for tree in trees for named in _constants(tree))
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.Call(func=ast.Attribute(value=place, attr="get"), args=[key, *_]):
                pass
            case ast.Subscript(value=place, slice=key):
                pass
            case ast.Compare(left=key, comparators=[place]):
                pass
            case _:
                continue
        if ast.unparse(place) in _ENVIRONMENT:
            name = key.value if isinstance(key, ast.Constant) else constants[ast.unparse(key)]
            yield str(name)


def _constants(tree: ast.Module) -> Iterator[tuple[str, object]]:
    for node in tree.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value)):
                yield name, value


def test_the_page_has_what_is_read_of_the_environment(pages: dict[str, str]) -> None:
    read = set(_variables_read())
    assert {"XDG_STATE_HOME", "COLUMNS"} <= read
    assert read - _NOT_FOR_USERS - set(ENVIRONMENT) == set()
    assert set(ENVIRONMENT) <= tags(pages["chainmerge.1"])


def test_the_page_has_the_files(pages: dict[str, str]) -> None:
    for names in FILES:
        for name in names:
            assert name.replace("~", r"\(ti") in pages["chainmerge.1"]
    assert any(str(STATE_DIRECTORY) in names for names in FILES)


def test_pages_of_the_same_sources_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    (tmp_path / "chainmerge-gone.1").touch()
    (tmp_path / "other.1").touch()
    write_man_pages(tmp_path)
    assert not (tmp_path / "chainmerge-gone.1").exists()
    assert (tmp_path / "other.1").exists()
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert b'"1970-01-02"' in first["chainmerge.1"]
    write_man_pages(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == first
