# SPDX-License-Identifier: Apache-2.0
"""``chainmerge explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from msgspec import Struct

from chainmerge import catalogue
from chainmerge.cli.commands import Command
from chainmerge.cli.options import json_option
from chainmerge.report import layout
from chainmerge.report.layout import Block, stack, words

if TYPE_CHECKING:
    from chainmerge.cli.output import Output


class Explanation(Struct, frozen=True):
    """The long form of one error."""

    code: str
    text: str


class ErrorSummary(Struct, frozen=True):
    """One error in the list of all."""

    code: str
    exit_status: int
    sentence: str


@click.command(cls=Command)
@click.argument("code", required=False)
@json_option
def explain(*, code: str | None, output: Output) -> None:
    """Explain the error CODE; without a CODE, list all of them."""
    if code is not None:
        output.document(Explanation(code, catalogue.explain(code)), _paragraphs)
        return
    summaries = tuple(
        ErrorSummary(known, int(error.exit_code), catalogue.with_placeholders(error.template))
        for known, error in catalogue.known_errors().items()
    )
    output.document(summaries, _list)


def _paragraphs(explanation: Explanation) -> Block:
    title, *paragraphs = explanation.text.split("\n\n")
    spaced = (part for paragraph in paragraphs for part in (words(""), words(paragraph)))
    return stack(words(title, layout.TITLE), *spaced)


def _list(summaries: tuple[ErrorSummary, ...]) -> Block:
    rows = (
        (words(summary.code), words(str(summary.exit_status)), words(summary.sentence))
        for summary in summaries
    )
    return layout.listing(("code", "exit", "sentence"), rows, right=("exit",))
