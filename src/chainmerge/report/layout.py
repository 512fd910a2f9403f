# SPDX-License-Identifier: Apache-2.0
"""The pieces that the tables are made of, so that all look alike.

Names in reports come from images, that is, perhaps from a hostile guest. Everything
that is text goes through :func:`words`, which makes it printable and keeps rich from
reading markup in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec import Struct
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from chainmerge.documents.text import printable
from chainmerge.report.text import human_size
from chainmerge.report.tree import draw_tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

GOOD: Final = "green"
CAUTION: Final = "yellow"
BAD: Final = "bold red"
QUIET: Final = "dim"
TITLE: Final = "bold"

STATE_STYLES: Final[Mapping[str, str]] = {
    "valid": GOOD,
    "disabled": CAUTION,
    "in-use": BAD,
    "absent": QUIET,
}


def words(text: str, style: str = "") -> Text:
    """Return text to be shown as it is, whatever it contains."""
    return Text(printable(text), style=style, overflow="fold")


def command(text: str) -> Text:
    """Return a command to be copied: on one line, however long that is."""
    return Text(printable(text), overflow="ignore", no_wrap=True)


def number(value: int | None) -> Text:
    """Return an exact number, or a dash for one that is not known."""
    return words("-", QUIET) if value is None else Text(str(value), justify="right")


def size(value: int | None) -> Text:
    """Return a size in bytes as people say it, or a dash for one that is not known."""
    return words("-", QUIET) if value is None else Text(human_size(value), justify="right")


def grid() -> Table:
    """Return a table without lines or headings."""
    return Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))


def listing(*columns: str, right: Iterable[str] = ()) -> Table:
    """Return a table with headings; the columns named in *right* hold numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=QUIET)
    numeric = frozenset(right)
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in numeric else "left",
            no_wrap=column in numeric,
            overflow="fold",
        )
    return table


def sizes(rows: Iterable[tuple[str, int | None, str]]) -> Table:
    """Return a table of sizes: what it is, as people say it, in exact bytes, and a remark."""
    table = grid()
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value, remark in rows:
        table.add_row(words(label), size(value), number(value), words(remark, QUIET))
    return table


class TreeNode(Struct, frozen=True):
    """An image in a tree: its path and its parent's, and lines of text that go below it."""

    path: str
    parent: str | None
    style: str
    below: tuple[Text, ...]


def tree(nodes: Sequence[TreeNode]) -> Group:
    """Return images as a tree. Paths are long, so each has a line of its own."""
    return Group(*_tree_rows(nodes))


def _tree_rows(nodes: Sequence[TreeNode]) -> Iterator[Table]:
    for line in draw_tree([(node.path, node.parent) for node in nodes]):
        node = nodes[line.index]
        yield _tree_row(line.prefix, words(node.path, node.style))
        for text in node.below:
            yield _tree_row(line.below, text)


def _tree_row(prefix: str, text: Text) -> Table:
    row = Table(box=None, show_header=False, pad_edge=False, padding=0)
    row.add_column(no_wrap=True)
    row.add_column(overflow="fold")
    row.add_row(Text(prefix), text)
    return row


def indented(part: RenderableType) -> Padding:
    """Return a part of a report, set in from the left."""
    return Padding(part, (0, 0, 0, 2), expand=False)


def section(title: str, *body: RenderableType) -> Group:
    """Return a titled part of a report, with an empty line before it."""
    return Group(Text(), words(title, TITLE), *(indented(part) for part in body))


def bullets(sentences: Iterable[str], style: str = "") -> Table:
    """Return sentences as a list."""
    table = grid()
    table.add_column(width=1)
    table.add_column(overflow="fold")
    for sentence in sentences:
        table.add_row(words("-", style), words(sentence, style))
    return table


def warnings_section(warnings: Iterable[str]) -> tuple[Group, ...]:
    """Return the part of a report that warns, which is left out where there is nothing to say."""
    sentences = tuple(warnings)
    return (section("Warnings", bullets(sentences, CAUTION)),) if sentences else ()
