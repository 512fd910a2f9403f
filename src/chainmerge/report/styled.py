# SPDX-License-Identifier: Apache-2.0
"""Reports as rich shows them: in colours, and folded to the width of a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from rich.console import Group
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from chainmerge.report.layout import QUIET, Indented, Stack, Table, Words

if TYPE_CHECKING:
    from rich.console import Console

    from chainmerge.report.layout import Block

Renderable: TypeAlias = Text | RichTable | Padding | Group


def styled(block: Block, console: Console) -> str:
    """Return the lines of a report, fit for the console, each with its end."""
    with console.capture() as captured:
        # Commands are not broken: they are to be copied from there.
        console.print(renderable(block), crop=False)
    # Tables are padded on the right to the width of their columns.
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def renderable(block: Block) -> Renderable:
    """Return what rich prints for a block."""
    match block:
        case Words():
            return styled_text(block)
        case Stack():
            return Group(*map(renderable, block.blocks))
        case Indented():
            return Padding(renderable(block.block), (0, 0, 0, 2), expand=False)
        case Table():
            return _table(block)


def styled_text(line: Words) -> Text:
    """Return a line of text; nothing in it is read as markup."""
    text = Text(overflow="fold") if line.folds else Text(overflow="ignore", no_wrap=True)
    for part, style in line.parts:
        text.append(part, style)
    return text


def _table(table: Table) -> RichTable:
    shown = RichTable(
        box=None,
        show_header=table.has_headings,
        header_style=QUIET,
        pad_edge=False,
        padding=(0, table.gap, 0, 0),
    )
    for column in table.columns:
        shown.add_column(
            # Text, in which a colon is a colon.
            Text(column.heading),
            justify="right" if column.right else "left",
            style=column.style,
            no_wrap=not column.folds,
            overflow="fold",
        )
    for row in table.rows:
        shown.add_row(*map(styled_text, row))
    return shown
