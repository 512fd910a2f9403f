# SPDX-License-Identifier: Apache-2.0
"""Pages hold what they are for, in one file that asks for nothing; hostile names are text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from chainmerge.documents.trends import TrendPoint
from chainmerge.report.html.pages import DiskChange, html_of_chains, html_of_merge, html_of_plans
from chainmerge.report.layout import words
from tests.support.pictures import chain_pictures, chains_pictures

if TYPE_CHECKING:
    from collections.abc import Callable

PAGES: Final[dict[str, Callable[[str], str]]] = {
    "chains": lambda name: html_of_chains(chains_pictures(name, chains=9)),
    "plan": lambda name: html_of_plans([chain_pictures(name)], f"chainmerge merge {name}", 0),
    "merge": lambda name: html_of_merge(
        [DiskChange(chain_pictures(name), f"not drawn: {name}")], words(name), 0
    ),
}
EVIL: Final = (
    "</script><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    '" onload=alert(1) x="',
    "' style='background:url(http://x/)",
    "</svg><foreignObject><iframe src=//x>",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31m\x00\n\r",
    "\u202egnp.exe",
    "\u2066\u2069\u200b",
    "\udcff\udc80",
    "&lt;&amp;",
    "]]><!--",
    "</style><style>*{display:none}",
)
hostile = st.text(st.characters(exclude_categories=())) | st.sampled_from(EVIL)
TAGS: Final = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "div", "svg",
    "defs", "pattern", "rect", "circle", "line", "path", "polyline", "h1", "h2", "h3", "p", "ul",
    "li", "code", "table", "thead", "tbody", "tr", "th", "td", "span", "bdi", "strong",
}  # fmt: skip
ATTRIBUTES_THAT_LOAD: Final = {"href", "src", "xlink:href", "action", "data", "poster", "srcset"}


class Read(HTMLParser):
    """What is in a page: its elements, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"a {tag} ends that was not open"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("page", PAGES)
@given(name=hostile)
def test_a_name_is_text_and_nothing_else(page: str, name: str) -> None:
    drawn = PAGES[page](name)
    drawn.encode("utf-8")
    assert all(one.isprintable() or one == "\n" for one in drawn)
    read = Read(drawn)
    assert read.open == []
    assert read.tags <= TAGS
    assert not read.attributes & ATTRIBUTES_THAT_LOAD
    assert not any(attribute.startswith("on") for attribute in read.attributes)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("name", EVIL)
def test_the_page_is_the_same_but_for_its_text(page: str, name: str) -> None:
    """The same elements in the same order, whatever the images are called."""
    elements = [re.findall(r"<[a-z/!][^ >]*", PAGES[page](one)) for one in (name, "harmless")]
    assert elements[0] == elements[1]


def test_nothing_is_loaded_and_nothing_is_run() -> None:
    drawn = html_of_chains(chains_pictures(chains=9))
    assert "default-src 'none'" in drawn
    assert not re.search(r"https?:|url\((?!#)|@import|javascript:", drawn)


def test_what_is_there_is_said() -> None:
    read = Read(html_of_chains(chains_pictures(chains=9)))
    text = " ".join(" ".join(read.text).split())
    for said in (
        "Chains of /disks/daily", "9 chains; merging frees about", "daily cannot be read",
        "daily-3.qcow2", "in /disks", "goes into daily-0.qcow2", "gets all of it",
        "4 images, a disk of 1000 MiB", "10 MiB of data that the guest sees, 6 MiB hidden",
        "because of daily-1", "unusable", "usable", "7 more checkpoints not shown",
        "Finish it: chainmerge merge --delete --base /disks/daily-0.qcow2 /disks/daily-3.qcow2",
        "daily is wrong", "250 MiB", "Map of the disk", "chainmerge repair daily",
    ):  # fmt: skip
        assert said in text, said


def test_lengths_are_counted() -> None:
    text = " ".join(" ".join(Read(html_of_chains(chains_pictures(chains=12))).text).split())
    for said in (
        "1 image 1 chain", "2 images 1 chain", "3 to 5 images 3 chains",
        "6 to 10 images 5 chains", "11 to 25 images 2 chains",
    ):  # fmt: skip
        assert said in text
    assert "26 to 30" not in text


def test_findings_are_told_by_severity() -> None:
    text = " ".join(Read(html_of_chains(chains_pictures())).text)
    places = [
        text.index(f"2 {said}") for said in ("critical", "to be warned of", "for information")
    ]
    assert places == sorted(places)


def test_when_limits_are_reached() -> None:
    text = " ".join(" ".join(Read(html_of_chains(chains_pictures())).text).split())
    for said in (
        "the chain of /disks/daily-0.qcow2 has 5242880 of 9437184 images, and reaches that limit",
        "the file system of /disks/daily-0.qcow2 has 4 MiB left, and is full about 1970-01-",
        "/disks/daily-0.qcow2 has 4 MiB left behind the image's end, and is full about 1970-01-",
    ):
        assert said in text
    without = html_of_chains(replace(chains_pictures(), forecasts=()))
    assert "If it goes on like this" not in without


def test_trends_are_drawn_from_two_scans_on() -> None:
    points = [TrendPoint(day * 86400, day + 1, day * 4096, 4096) for day in range(3)]
    found = chains_pictures()
    assert "Trend" not in html_of_chains(replace(found, trends=tuple(points[:1])))
    page = html_of_chains(replace(found, trends=tuple(points)))
    assert page.count("<polyline") == page.count("Trend: ") == 3
    text = " ".join(Read(page).text)
    for said in ("1 image, 1970-01-01", "3 images, 1970-01-03", "8 KiB, 1970-01-03"):
        assert said in text


def test_before_and_after() -> None:
    before, after = chain_pictures("old"), chain_pictures("new", images=1)
    text = " ".join(Read(html_of_merge([DiskChange(before, after)], words("It is done"), 0)).text)
    assert text.index("It is done") < text.index("Before") < text.index("After")
    assert text.index("Before") < text.index("old-3.qcow2") < text.index("new-0.qcow2")


@pytest.mark.parametrize(("images", "checkpoints"), [(300, 100), (300, 0), (1, 1), (1000, 10)])
def test_a_page_is_not_large(images: int, checkpoints: int) -> None:
    drawn = html_of_chains(chains_pictures(images=images, checkpoints=checkpoints))
    assert len(drawn.encode()) < 2 * 1024 * 1024
