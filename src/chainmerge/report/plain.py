# SPDX-License-Identifier: Apache-2.0
"""Reports as text without colours, for files and pipes, whose lines have no end to fold at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.report.layout import Indented, Stack, Table, Words, words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.report.layout import Block


def plain_text(block: Block) -> str:
    """Return the lines of a report, each with its end."""
    return "".join(f"{line.rstrip()}\n" for line in _lines(block))


def _lines(block: Block) -> Iterator[str]:
    match block:
        case Words():
            yield block.text
        case Stack():
            for one in block.blocks:
                yield from _lines(one)
        case Indented():
            for line in _lines(block.block):
                yield f"  {line}"
        case Table():
            yield from _table_lines(block)


def _table_lines(table: Table) -> Iterator[str]:
    rows = [[cell.text for cell in row] for row in table.rows]
    if table.has_headings:
        rows.insert(0, [words(column.heading).text for column in table.columns])
    widths = [max(map(_width, cells), default=0) for cells in zip(*rows, strict=True)]
    gap = " " * table.gap
    for row in rows:
        yield gap.join(_aligned(row, widths, table))


def _aligned(row: Sequence[str], widths: Sequence[int], table: Table) -> Iterator[str]:
    for text, width, column in zip(row, widths, table.columns, strict=True):
        # As rich does: numbers end in one line, whatever blanks follow them.
        shown = text.rstrip() if column.right else text
        blank = " " * (width - _width(shown))
        yield blank + shown if column.right else shown + blank


def _width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width  # noqa: PLC0415 (few texts need it)

    return sum(
        0 if combining(character) else 2 if east_asian_width(character) in "FW" else 1
        for character in text
    )
