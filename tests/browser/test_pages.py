# SPDX-License-Identifier: Apache-2.0
"""Reports in a real browser: nothing overflows, nothing is requested, all can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.browser.drawn_chain import build_chain
from tests.support.browser import Browser, running_browser
from tests.support.cli import chainmerge
from tests.support.contrast import contrast
from tests.support.long_chain import build_long_chain
from tests.support.qemu import create

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WIDTHS: Final = (400, 1000, 2000)
LONG_NAME: Final = f"{'very-' * 40}long.qcow2"
HOSTILE_NAME: Final = "<script>document.title=`run`<script>\u202e\x1b[31m\n.qcow2"
LEAST_CONTRAST: Final = 4.5
"""Of text that is not large: WCAG 2.2, success criterion 1.4.3."""

# What sticks out of the page, or out of an element that would cut it off.
OVERFLOWING: Final = """
[...document.querySelectorAll("body *")].filter(one => {
  const box = one.getBoundingClientRect();
  const cut = one instanceof HTMLElement && getComputedStyle(one).display !== "inline"
    && one.scrollWidth > one.clientWidth + 1;
  return !one.closest("svg") && (cut || box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(one => `${one.tagName}.${one.className}: ${one.textContent.trim().slice(0, 60)}`)
"""
# Of each element with text of its own: its colour, and the first ground below it that is opaque.
COLOURS: Final = """
[...document.querySelectorAll("body *")].filter(one => one instanceof HTMLElement &&
  [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
).map(one => {
  let ground = one;
  while (ground && getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)")
    ground = ground.parentElement;
  return [getComputedStyle(one).color,
    ground ? getComputedStyle(ground).backgroundColor : "none", one.className];
})
"""
# Drawings that take no room, or whose fill does not exist.
UNSEEN: Final = """
[...document.querySelectorAll("svg.bar, svg.map, svg.states, svg.step")].filter(one => {
  const box = one.getBoundingClientRect();
  return box.width < 20 || box.height < 8;
}).length
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as one:
        yield one


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, by its name."""
    place = tmp_path_factory.mktemp("pages")
    images = build_chain(place)
    kinds = {name: place / f"{name}.html" for name in ("chains", "plan", "long", "odd", "merge")}
    done = [chainmerge("report", place, "-o", kinds["chains"])]
    done += [chainmerge("plan", "--base", images[1], images[3], "--report", kinds["plan"])]
    odd = place / "odd"
    odd.mkdir()
    root = create(odd / LONG_NAME, 1 << 30)
    create(odd / HOSTILE_NAME, backing=root)
    done += [chainmerge("report", odd, "-o", kinds["odd"])]
    long = place / "long"
    long.mkdir()
    chain = build_long_chain(long, images=300, writes_per_image=40)
    done += [chainmerge("report", chain.top, "-o", kinds["long"])]
    done += [chainmerge("merge", "--base", images[3], images[4], "--report", kinds["merge"])]
    assert [ran.status for ran in done] == [0] * len(done), done
    return kinds


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["chains", "plan", "long", "odd", "merge"])
def test_it_renders(
    kind: str, width: int, dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[kind], width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(UNSEEN) == 0
    assert browser.requests() == [pages[kind].as_uri()]
    assert browser.complaints() == []
    for colour, ground, where in browser.evaluate(COLOURS):
        assert contrast(_hex(colour), _hex(ground)) >= LEAST_CONTRAST, (colour, ground, where)


def test_it_is_light_on_paper(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["chains"], 800, dark=True, medium="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == _WHITE
    assert browser.evaluate(OVERFLOWING) == []


_WHITE: Final = "rgb(255, 255, 255)"


def test_hostile_names_are_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["odd"], 1000)
    assert "run" not in browser.evaluate("document.title")
    assert browser.evaluate("document.scripts.length") == 0
    assert "\\u202e" in browser.evaluate("document.body.innerText")


def test_the_long_chain_is_a_small_file(pages: dict[str, Path]) -> None:
    assert pages["long"].stat().st_size < 2 * 1024 * 1024


# Whether the tests above can fail


@pytest.mark.parametrize(
    ("content", "finds"),
    [
        ("<p style='width:3000px'>x</p>", "overflow"),
        ("<p style='width:50px;overflow:hidden;white-space:nowrap'>cut off at the end</p>", "cut"),
        ("<img src='http://127.0.0.1:9/x.png'>", "request"),
        ("<p style='color:#999'>faint</p>", "contrast"),
        ("<svg class='map' width='300' height='2'></svg>", "unseen"),
        ("<p>harmless</p>", "nothing"),
    ],
)
def test_a_bad_page_is_found_out(
    content: str, finds: str, browser: Browser, tmp_path: Path
) -> None:
    page = tmp_path / "bad.html"
    page.write_text(f"<!DOCTYPE html><body style='background:#fff'>{content}</body>")
    browser.open(page, 400)
    found: dict[str, Any] = {
        "overflow": not browser.evaluate("document.documentElement.scrollWidth <= innerWidth"),
        "cut": browser.evaluate(OVERFLOWING) != [],
        "request": len(browser.requests()) > 1,
        "unseen": browser.evaluate(UNSEEN) > 0,
        "contrast": any(
            contrast(_hex(colour), _hex(ground)) < LEAST_CONTRAST
            for colour, ground, _ in browser.evaluate(COLOURS)
        ),
    }
    expected = {finds} | ({"cut"} if finds == "overflow" else set()) - {"nothing"}
    assert {name for name, bad in found.items() if bad} == expected - {"nothing"}


def _hex(colour: str) -> str:
    """``rgb(1, 2, 3)`` as ``#010203``."""
    assert colour.startswith("rgb("), colour
    return "#" + "".join(f"{int(one):02x}" for one in colour[4:-1].split(","))
