# SPDX-License-Identifier: Apache-2.0
"""What commands say of themselves: the one source of the manual pages and of the site."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Final

import click
from msgspec import Struct

from chainmerge.cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM: Final = "chainmerge"
_OTHER_OPTIONS: Final = "Other options"
_EXIT_STATUS: Final = re.compile(r"(\d+) (.+?)(?=, \d+ |\.$)")
# Not the dots of "NAME... from".
_END_OF_SENTENCE: Final = re.compile(r"(?<!\.)\.(?: |$)")


class Option(Struct, frozen=True):
    """An option: how it is written, what it takes (empty if nothing), and what it does."""

    spellings: tuple[str, ...]
    value: str
    text: str


class Panel(Struct, frozen=True):
    """Options of one kind, as help has them together."""

    title: str
    options: tuple[Option, ...]


class CommandManual(Struct, frozen=True):
    """What there is to say of a command.

    Attributes:
        words: What is typed to call it, the program's name included.
        operands: What is typed behind it.
        paragraphs: What it does. The first says it in short. What help has at its very end comes
            last, except the exit statuses that the program's own help has there.
        panels: Its options. Those of no kind come last.
        within: The commands of a group, by their full names.
    """

    words: tuple[str, ...]
    operands: tuple[str, ...]
    paragraphs: tuple[str, ...]
    panels: tuple[Panel, ...]
    within: tuple[tuple[str, ...], ...]

    @property
    def called(self) -> str:
        """How it is called."""
        return " ".join(self.words)

    @property
    def page(self) -> str:
        """What its page is called."""
        return "-".join(self.words)

    @property
    def summary(self) -> str:
        """What it does, in one sentence, without the full stop."""
        return _END_OF_SENTENCE.split(self.paragraphs[0])[0]


def all_commands() -> tuple[CommandManual, ...]:
    """Return what there is to say of the program and of all its commands, in the order of help."""
    root = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    return tuple(_described(cli, root, (PROGRAM,)))


def exit_statuses() -> dict[int, str]:
    """Return what the exit statuses mean, as the program's help says it."""
    found = _EXIT_STATUS.findall(" ".join((cli.epilog or "").split()))
    return {int(number): meaning for number, meaning in found}


def _described(
    command: click.Command, context: click.Context, words: tuple[str, ...]
) -> Iterator[CommandManual]:
    within = (
        {name: command.get_command(context, name) for name in command.list_commands(context)}
        if isinstance(command, click.Group)
        else {}
    )
    yield CommandManual(
        words,
        tuple(command.collect_usage_pieces(context)),
        (*_paragraphs(command.help), *(_paragraphs(command.epilog) if context.parent else ())),
        tuple(_panels(command, context)),
        tuple((*words, name) for name in within),
    )
    for name, inner in within.items():
        assert inner is not None
        below = click.Context(inner, context, name, **inner.context_settings)
        yield from _described(inner, below, (*words, name))


def _paragraphs(text: str | None) -> tuple[str, ...]:
    parts = inspect.cleandoc(text or "").split("\n\n")
    return tuple(" ".join(part.split()) for part in parts if part)


def _panels(command: click.Command, context: click.Context) -> Iterator[Panel]:
    kinds: dict[str, list[Option]] = {}
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            record = parameter.get_help_record(context)
            if record is not None:
                title = getattr(parameter, "panel", _OTHER_OPTIONS)
                kinds.setdefault(title, []).append(_option(parameter, *record))
    # What every command has comes after what makes it another one.
    rest = kinds.pop(_OTHER_OPTIONS, [])
    for title, options in (*kinds.items(), (_OTHER_OPTIONS, rest)):
        if options:
            yield Panel(title, tuple(options))


def _option(option: click.Option, names: str, text: str) -> Option:
    spellings = (*option.opts, *option.secondary_opts)
    last = max(names.rfind(spelling) + len(spelling) for spelling in spellings)
    return Option(spellings, names[last:].strip(), " ".join(text.split()))
