# SPDX-License-Identifier: Apache-2.0
"""Reports without colours: as rich prints them where nothing has to be folded."""

from __future__ import annotations

import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from chainmerge.report.layout import (
    Block,
    Column,
    Indented,
    Stack,
    Table,
    Words,
    command,
    joined,
    number,
    words,
)
from chainmerge.report.plain import plain_text
from chainmerge.report.styled import styled

_ENDLESS = 10_000
# Rich leaves out a line that is empty and set in, and blanks at the end of a cell to the right.
_TEXT = st.text(st.sampled_from("abc xyz-[/]:日本é"), max_size=12).map(
    lambda text: f"a{text}".rstrip()
)
_WORDS = st.builds(words, _TEXT, st.sampled_from(["", "bold red", "dim"]))
_LINES = _WORDS | st.builds(command, _TEXT) | st.builds(joined, _WORDS, _WORDS)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    columns = draw(
        st.lists(
            st.builds(Column, _TEXT, right=st.booleans(), folds=st.booleans()),
            min_size=1,
            max_size=4,
        )
    )
    row = st.tuples(*(_WORDS for _ in columns))
    rows = draw(st.lists(row, min_size=1, max_size=4))
    return Table(
        tuple(columns), tuple(rows), draw(st.sampled_from([0, 2])), has_headings=draw(st.booleans())
    )


BLOCKS: st.SearchStrategy[Block] = st.recursive(
    _LINES | tables(),
    lambda inside: (
        st.builds(Indented, inside)
        | st.builds(Stack, st.lists(inside, min_size=1, max_size=3).map(tuple))
    ),
    max_leaves=6,
)


@given(BLOCKS)
@example(Table((Column("a", right=True),), ((words("a "),),), has_headings=False))
def test_text_is_what_rich_prints_without_an_edge(block: Block) -> None:
    console = Console(file=io.StringIO(), width=_ENDLESS, height=_ENDLESS)
    assert plain_text(block) == styled(block, console)


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (7, "7")])
def test_what_is_not_known_is_a_dash(value: int | None, shown: str) -> None:
    assert number(value).text == shown


def test_a_name_cannot_end_its_line() -> None:
    assert plain_text(words("a\nb\x1b[31m")).count("\n") == 1


def test_numbers_end_in_one_column() -> None:
    table = Table(
        (Column(), Column(right=True)), ((words("a"), words("1")), (words("bc"), words("100")))
    )
    assert plain_text(table) == "a     1\nbc  100\n"


def test_nothing_at_all_is_an_empty_line() -> None:
    assert plain_text(Words(())) == "\n"
