# SPDX-License-Identifier: Apache-2.0
"""``chainmerge explain``."""

from __future__ import annotations

import sys
import textwrap
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

import click
from msgspec import Struct

from chainmerge import catalogue
from chainmerge.cli.candidates import explained_candidates
from chainmerge.cli.commands import Command
from chainmerge.cli.options import json_option
from chainmerge.cli.streams import has_edge
from chainmerge.report import layout
from chainmerge.report.layout import Block, stack, words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.catalogue import Subject
    from chainmerge.cli.output import Output
    from chainmerge.errors import ExitCode
    from chainmerge.report.layout import Words

_COLUMNS: Final = 80
"""How wide text becomes where there is no terminal to say."""


class Explanation(Struct, frozen=True):
    """The long form of one error."""

    code: str
    text: str


class ErrorSummary(Struct, frozen=True):
    """One error in the list of all, or a finding, which has no exit status."""

    code: str
    exit_status: int | None
    sentence: str


@click.command(cls=Command)
@click.argument("code", metavar="[CODE]...", nargs=-1, shell_complete=explained_candidates)
@json_option
def explain(*, code: tuple[str, ...], output: Output) -> None:
    """Explain the error or the finding CODE, or list what has to do with some words.

    Without a CODE, list all errors by exit status, and all findings.
    """
    if not code:
        output.document(_summaries(tuple(catalogue.known_subjects().values())), _groups)
        return
    match catalogue.look_up(code):
        case (subject,):
            output.document(Explanation(subject.code, subject.text), _paragraphs)
        case subjects:
            output.document(_summaries(subjects), _list)


def _summaries(subjects: Sequence[Subject]) -> tuple[ErrorSummary, ...]:
    return tuple(
        ErrorSummary(subject.code, _number(subject.exit_code), subject.sentence)
        for subject in subjects
    )


def _number(exit_code: ExitCode | None) -> int | None:
    return None if exit_code is None else int(exit_code)


def _paragraphs(explanation: Explanation) -> Block:
    title, *paragraphs = explanation.text.split("\n\n")
    spaced = (
        part
        for paragraph in paragraphs
        for part in (layout.EMPTY_LINE, *map(words, _folded(paragraph, _COLUMNS)))
    )
    return stack(words(title, layout.TITLE), *spaced)


def _groups(summaries: tuple[ErrorSummary, ...]) -> Block:
    blocks: list[Block] = []
    for status, meaning in catalogue.MEANINGS.items():
        rows = tuple(one for one in summaries if one.exit_status == status)
        title = f"Exit status {status:d}: {meaning}"
        blocks += [words(title, layout.TITLE), _list(rows), layout.EMPTY_LINE]
    found = tuple(one for one in summaries if one.exit_status is None)
    title = "Findings of check, repair, bitmaps list and scan"
    return stack(*blocks, words(title, layout.TITLE), _list(found))


def _list(summaries: tuple[ErrorSummary, ...]) -> Block:
    return layout.indented(layout.pairs(_rows(summaries)))


def _rows(summaries: tuple[ErrorSummary, ...]) -> Iterator[tuple[Words, Words]]:
    longest = max(len(summary.code) for summary in summaries)
    for summary in summaries:
        # Two spaces before, and two between.
        lines = _folded(summary.sentence, _COLUMNS - longest - 4)
        for code, line in zip_longest((summary.code,), lines, fillvalue=""):
            yield words(code), words(line)


def _folded(text: str, width: int) -> list[str]:
    """The lines of a text; one, where the terminal folds it."""
    if has_edge(sys.stdout):
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
