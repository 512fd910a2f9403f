# SPDX-License-Identifier: Apache-2.0
"""The site that ``make docs`` made: it has what help and the package have, and no dead links."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

import pytest

import chainmerge
from chainmerge import live
from chainmerge.catalogue import known_subjects
from chainmerge.report.schema import DOCUMENTS
from tests.support.help_pages import all_help

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SITE: Final = Path(__file__).parents[2] / "build" / "site"
DOCS: Final = Path(__file__).parents[2] / "docs"
PAGES: Final = sorted(SITE.rglob("*.html"))
_LOADED: Final = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src"}


@dataclass
class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that links can name."""

    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    places: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        if "id" in values:
            self.places.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        # Other relations of <link> are read by nobody who shows the page.
        if tag in _LOADED and _LOADED[tag] in values and values.get("rel", "icon") in _SHOWN:
            self.loaded.append(values[_LOADED[tag]])


_SHOWN: Final = {"icon", "stylesheet", "preload"}


@cache
def read(page: Path) -> Page:
    parsed = Page()
    parsed.feed(page.read_text(encoding="utf-8"))
    return parsed


def _place(page: Path, link: str) -> tuple[Path, str]:
    """The file that a link leads to, and the place in it; empty for all of it."""
    parts = urlsplit(link)
    file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    return file, unquote(parts.fragment)


def _is_dead(page: Path, link: str) -> bool:
    file, place = _place(page, link)
    if not file.is_file():
        return True
    return bool(place) and file.suffix == ".html" and place not in read(file).places


def _of_ours(links: Sequence[str]) -> Iterator[str]:
    return (link for link in links if not urlsplit(link).scheme)


def test_there_is_a_site() -> None:
    assert len(PAGES) > 50, "make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(SITE)))
def test_every_link_leads_somewhere(page: Path) -> None:
    links = {*_of_ours(read(page).links), *_of_ours(read(page).loaded)}
    assert links
    # What a script fills in.
    assert [link for link in links if link != "#" and _is_dead(page, link)] == []


def test_nothing_is_loaded_from_elsewhere() -> None:
    loaded = {link for page in PAGES for link in read(page).loaded}
    assert len(loaded) > 3
    assert [link for link in loaded if urlsplit(link).netloc] == []


def test_hyphens_of_options_are_not_dashes() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    assert [
        page for page, text in texts.items() if re.search("[\N{EN DASH}\N{EM DASH}][a-z-]", text)
    ] == []


def test_every_page_of_the_documentation_is_there() -> None:
    pages = {
        page.relative_to(SITE / "docs").as_posix()
        for page in PAGES
        if SITE / "docs" in page.parents
    }
    assert pages == {f"{page.stem}.html" for page in DOCS.glob("*.md")} | {"schema/index.html"}


def test_every_command_and_every_option_has_a_place() -> None:
    missing = {
        f"{one.page} {option}"
        for one in all_help()
        for option in one.options
        if f"cmdoption-{one.page}-{option.lstrip('-')}".lower()
        not in {place.lower() for place in read(SITE / "commands" / f"{one.page}.html").places}
    }
    assert missing == set()


def test_every_error_and_every_finding_has_a_place() -> None:
    assert set(known_subjects()) - read(SITE / "errors.html").places == set()


def test_every_public_name_has_a_place() -> None:
    places = {place for page in (SITE / "python").glob("*.html") for place in read(page).places}
    names = [f"chainmerge.{name}" for name in chainmerge.__all__ if name != "__version__"]
    names += [f"chainmerge.live.{name}" for name in live.__all__ if name != "LiveOptions"]
    assert set(names) - places == set()


def test_every_schema_can_be_had() -> None:
    links = read(SITE / "docs" / "schema" / "index.html").links
    files = [_place(SITE / "docs" / "schema" / "index.html", link)[0] for link in links]
    assert {f"{name}.json" for name in DOCUMENTS} <= {file.name for file in files if file.is_file()}
