# SPDX-License-Identifier: Apache-2.0
"""The site's pages of commands: what the manual pages say, with links."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manual.commands import all_commands, exit_statuses
from manual.examples import examples_of
from manual.markdown import directive, page, prose, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from manual.commands import CommandManual, Option


def command_pages(folder: str) -> dict[str, str]:
    """Return a page of each command by the name of its file in a folder."""
    commands = all_commands()
    summaries = {one.words: one.summary for one in commands}
    return {f"{folder}/{one.page}.md": _page_of(one, summaries) for one in commands}


def _page_of(command: CommandManual, summaries: Mapping[tuple[str, ...], str]) -> str:
    operands = " ".join(command.operands)
    return page(
        f"# {command.called}",
        f"```text\n{command.called} {operands}\n```",
        *map(prose, command.paragraphs),
        *_within(command, summaries),
        directive("program", command.called),
        *_options(command),
        "## Exit status",
        _exit_statuses(),
        *_examples(command),
    )


def _within(command: CommandManual, summaries: Mapping[tuple[str, ...], str]) -> Iterator[str]:
    if command.within:
        pages = {"-".join(words): prose(summaries[words]) for words in command.within}
        yield "## Commands"
        yield table(
            ("command", "what it does"), ((f"[]({page}.md)", pages[page]) for page in pages)
        )
        yield directive("toctree", "", ":hidden:", "", *pages)


def _options(command: CommandManual) -> Iterator[str]:
    yield "## Options"
    for panel in command.panels:
        if len(command.panels) > 1:
            yield f"### {panel.title}"
        yield from map(_option, panel.options)


def _option(option: Option) -> str:
    written = (f"{spelling} {option.value}".rstrip() for spelling in option.spellings)
    return directive("option", ", ".join(written), "", prose(option.text))


def _exit_statuses() -> str:
    meanings = exit_statuses().items()
    return table(("status", "meaning"), ((str(number), prose(said)) for number, said in meanings))


def _examples(command: CommandManual) -> Iterator[str]:
    found = () if command.within else examples_of(command.words)
    if found:
        yield "## Examples"
    for one in found:
        yield f"{prose(one.purpose)}:\n\n```console\n$ {one.line}\n```"
