# SPDX-License-Identifier: Apache-2.0
"""The blocks that reports are made of, so that all look alike.

They are values, and know nothing of where they are shown: :mod:`chainmerge.report.plain` makes text
of them, :mod:`chainmerge.report.styled` what rich shows on a terminal.

Names in reports come from images, that is, perhaps from a hostile guest. Everything
that is text goes through :func:`words`, which makes it printable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct

from chainmerge.documents.text import printable
from chainmerge.report.text import human_size

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


class Words(Struct, frozen=True):
    """One line of text.

    Attributes:
        parts: Text and its style, from left to right.
        folds: Whether it goes on in the next line where there is no more room.
    """

    parts: tuple[tuple[str, str], ...]
    folds: bool = True

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for text, _ in self.parts)


class Column(Struct, frozen=True):
    """A column of a table.

    Attributes:
        heading: What stands above it.
        right: Whether it holds numbers, which end in one line.
        folds: Whether its cells may take several lines.
        style: Of those of its cells that have none.
    """

    heading: str = ""
    right: bool = False
    folds: bool = True
    style: str = ""


class Table(Struct, frozen=True):
    """Cells in columns.

    Attributes:
        columns: From left to right.
        rows: From the top down; as many cells each as there are columns.
        gap: Spaces between columns.
        has_headings: Whether there is a line for them.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Words, ...], ...]
    gap: int = 2
    has_headings: bool = False


class Indented(Struct, frozen=True):
    """A block that is set in from the left, by two spaces."""

    block: Block


class Stack(Struct, frozen=True):
    """Blocks, one below the other."""

    blocks: tuple[Block, ...]


Block: TypeAlias = Words | Table | Indented | Stack
EMPTY_LINE: Final = Words(())


def words(text: str, style: str = "") -> Words:
    """Return text to be shown as it is, whatever it contains."""
    return Words(((printable(text), style),))


def joined(*parts: Words) -> Words:
    """Return several texts as one line."""
    return Words(tuple(part for one in parts for part in one.parts))


def command(text: str) -> Words:
    """Return a command to be copied: on one line, however long that is."""
    return Words(((printable(text), ""),), folds=False)


def command_line(label: str, text: str) -> Words:
    """Return a command to be copied, behind a word for it: on one line, however long that is."""
    return Words(((label, TITLE), (printable(text), "")), folds=False)


def way_out(hint: str, code: str) -> tuple[Words, Words]:
    """Return what to do about an error, and where more is said of it, to go below its sentence."""
    return words(f"  what to do: {hint}"), words(f"  more: chainmerge explain {code}", QUIET)


def number(value: int | None) -> Words:
    """Return an exact number, or a dash for one that is not known."""
    return words("-", QUIET) if value is None else words(str(value))


def size(value: int | None) -> Words:
    """Return a size in bytes as people say it, or a dash for one that is not known."""
    return words("-", QUIET) if value is None else words(human_size(value))


def stack(*blocks: Block) -> Stack:
    """Return blocks, one below the other."""
    return Stack(blocks)


def listing(
    headings: Sequence[str], rows: Iterable[Sequence[Words]], *, right: Iterable[str] = ()
) -> Table:
    """Return a table with headings; the columns named in *right* hold numbers."""
    numeric = frozenset(right)
    columns = tuple(
        Column(heading, right=heading in numeric, folds=heading not in numeric)
        for heading in headings
    )
    return Table(columns, tuple(tuple(row) for row in rows), has_headings=True)


def pairs(rows: Iterable[tuple[Words, Words]], style: str = "") -> Table:
    """Return a table of what something is called, in *style*, and what is said of it."""
    return Table((Column(folds=False, style=style), Column()), tuple(rows))


def sizes(rows: Iterable[tuple[str, int | None, str]]) -> Table:
    """Return a table of sizes: what it is, as people say it, in exact bytes, and a remark."""
    figures = Column(right=True, folds=False)
    return Table(
        (Column(folds=False), figures, figures, Column()),
        tuple(
            (words(label), size(value), number(value), words(remark, QUIET))
            for label, value, remark in rows
        ),
    )


class TreeNode(Struct, frozen=True):
    """An image in a tree: its path and its parent's, and lines of text that go below it."""

    path: str
    parent: str | None
    style: str
    below: tuple[Words, ...]


def tree(nodes: Sequence[TreeNode]) -> Stack:
    """Return images as a tree. Paths are long, so each has a line of its own."""
    return Stack(tuple(_tree_rows(nodes)))


def _tree_rows(nodes: Sequence[TreeNode]) -> Iterator[Table]:
    # Imported where it is used: no report of a merge has a tree.
    from chainmerge.report.tree import draw_tree  # noqa: PLC0415

    for line in draw_tree([(node.path, node.parent) for node in nodes]):
        node = nodes[line.index]
        yield _tree_row(line.prefix, words(node.path, node.style))
        for text in node.below:
            yield _tree_row(line.below, text)


def _tree_row(prefix: str, text: Words) -> Table:
    return Table((Column(folds=False), Column()), ((words(prefix), text),), gap=0)


def indented(block: Block) -> Indented:
    """Return a block, set in from the left."""
    return Indented(block)


def section(title: str, *body: Block) -> Stack:
    """Return a titled part of a report, with an empty line before it."""
    return stack(EMPTY_LINE, words(title, TITLE), *(indented(block) for block in body))


def bullets(sentences: Iterable[str], style: str = "") -> Table:
    """Return sentences as a list."""
    return pairs((words("-", style), words(sentence, style)) for sentence in sentences)


def warnings_section(warnings: Iterable[str]) -> tuple[Stack, ...]:
    """Return the part of a report that warns, which is left out where there is nothing to say."""
    sentences = tuple(warnings)
    return (section("Warnings", bullets(sentences, CAUTION)),) if sentences else ()
