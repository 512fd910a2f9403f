# SPDX-License-Identifier: Apache-2.0
"""What the site is built from: the pages as they are, and those that the program itself gives.

The tree is laid out like the repository, so that the links between pages lead to the same places as
there. Sphinx then finds those that lead nowhere.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from manual import markdown
from manual.command_pages import command_pages
from manual.error_page import error_page
from manual.python_pages import python_pages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).parents[1]
_FIRST: Final = Path("README.md")
_READ_ON: Final = "## Read on"
_LINK: Final = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<place>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_FENCED: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_REFERENCE: Final = ("commands/chainmerge", "errors", "python/index", "docs/schema/index")


def write_site_source(directory: Path) -> None:
    """Lay out a directory, which is emptied before, for Sphinx."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for folder in ("pictures", "schema"):
        shutil.copytree(ROOT / "docs" / folder, directory / "docs" / folder)
    for page in _pages():
        for linked in _linked_files(page):
            _write(directory / linked, _text_of(linked))
        _write(directory / page, with_links_for_the_site(page))
    (directory / _FIRST).rename(directory / "index.md")
    with (directory / "index.md").open("a", encoding="utf-8") as first:
        first.write(_contents())
    made = {
        **command_pages("commands"),
        **python_pages("python"),
        "errors.md": error_page(),
        "docs/schema/index.md": _schema_page(),
    }
    for name, text in made.items():
        _write(directory / name, text)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _pages() -> list[Path]:
    """The pages of the repository, by their names in it."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    return sorted(page.relative_to(ROOT) for page in found)


def _text_of(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _links(page: Path, text: str) -> Iterator[Path]:
    """The places in the repository that the text, or a part of it, of a page links to."""
    for link in _LINK.finditer(_FENCED.sub("", text)):
        if "://" not in link["place"]:
            yield _in_repository(page, link["place"])


def _in_repository(page: Path, place: str) -> Path:
    return (ROOT / page.parent / place).resolve().relative_to(ROOT)


def _linked_files(page: Path) -> Iterator[Path]:
    """Files that a page links to that are not pages; those in docs are there anyway."""
    for place in _links(page, _text_of(page)):
        if (ROOT / place).is_file() and place.suffix != ".md" and place.parts[0] != "docs":
            yield place


def with_links_for_the_site(page: Path) -> str:
    """Return a page whose links to directories lead to a page of what is in them, or nowhere."""

    def link_for_the_site(link: re.Match[str]) -> str:
        if "://" in link["place"] or not (ROOT / page.parent / link["place"]).is_dir():
            return link[0]
        if _in_repository(page, link["place"]) == Path("docs/schema"):
            return f"[{link['text']}]({link['place']}/index.md)"
        return f"{link['text']} (`{_in_repository(page, link['place'])}` in the sources)"

    return _LINK.sub(link_for_the_site, _text_of(page))


def _contents() -> str:
    """The tables of contents: pages in the order in which README names them, and the reference."""
    _, _, read_on = _text_of(_FIRST).partition(_READ_ON)
    named = [place for place in _links(_FIRST, read_on) if place.suffix == ".md"]
    pages = dict.fromkeys([*named, *_pages()])
    pages.pop(_FIRST)
    return _tree("Guide", [str(page) for page in pages]) + _tree("Reference", _REFERENCE)


def _tree(caption: str, entries: Sequence[str]) -> str:
    lines = ("```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```")
    return "\n" + "\n".join(lines) + "\n"


def _schema_page() -> str:
    files = sorted((ROOT / "docs" / "schema").glob("*.json"))
    rows = ((f"[{one.stem}]({one.name})", _described(one)) for one in files)
    return markdown.page(
        "# JSON documents",
        "What `--json` prints has these schemas. The number goes up when a field goes or changes "
        "its meaning.",
        markdown.table(("schema", "what it is of"), rows),
    )


def _described(schema: Path) -> str:
    whole = json.loads(schema.read_bytes())
    # A schema that is not made of a document's type describes itself.
    first, *_ = whole.get("$defs", {"": whole}).values()
    return " ".join(str(first["description"]).partition("\n\n")[0].split())
