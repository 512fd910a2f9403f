# SPDX-License-Identifier: Apache-2.0
"""A command that does what another one, as it was typed, has only shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from chainmerge.cli.commands import NO_FILES, Command
from chainmerge.cli.settings import negation_of
from chainmerge.records.request import shell_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_TYPED: Final = "chainmerge.typed"
# What says how to show something is of no use to what does it.
_ONLY_SHOWN: Final = frozenset({"output", "verbose", "quiet", "dry_run", "report_file"})


class PlanningCommand(Command):
    """A command that shows what another one would do with the same words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_TYPED] = tuple(args)
        return super().parse_args(ctx, args)


def same_with(*command: str) -> str:
    """Return *command* with what was typed behind the one that runs now, fit for a shell.

    Args:
        command: what follows the program's name.
    """
    context = click.get_current_context()
    again = _typed_again(context, _options_of(context.command))
    return shell_line([*program(), *command, *again])


def same_as_far_as_known(names: Sequence[str], *before: str) -> str:
    """As :func:`same_with`, without the options that the other command lacks.

    Args:
        names: the other command, by what follows the program's name.
        before: words that come first.
    """
    context = click.get_current_context()
    other = context.find_root().command
    for name in names:
        assert isinstance(other, click.Group)
        found = other.get_command(context, name)
        assert found is not None
        other = found
    again = _typed_again(context, _options_of(other))
    return shell_line([*program(), *names, *before, *again])


def was_typed(name: str) -> bool:
    """Whether a parameter of the command that runs was given with it, not by a file."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def program() -> tuple[str, ...]:
    """What another command begins with: it goes by the same configuration."""
    without_files = click.get_current_context().find_root().params.get("no_config", False)
    return ("chainmerge", NO_FILES) if without_files else ("chainmerge",)


def _options_of(command: click.Command) -> frozenset[str]:
    options = (one for one in command.params if isinstance(one, click.Option))
    return frozenset(name for option in options for name in option.opts)


def _typed_again(context: click.Context, known: frozenset[str]) -> Iterator[str]:
    """Options with their values as they were typed, and what is not an option behind them."""
    typed = context.meta[_TYPED]
    values, _, order = context.command.make_parser(context).parse_args(list(typed))
    given = {name: iter(value) for name, value in values.items() if isinstance(value, list)}
    operands: list[str] = []
    for parameter in order:
        name = parameter.name or ""
        if name in _ONLY_SHOWN:
            continue
        if isinstance(parameter, click.Argument):
            # Where none is needed and none is given, it is a mark of click's.
            match values[name]:
                case str() as one:
                    operands.append(one)
                case tuple() | list() as several:
                    operands += several
            continue
        option = max(parameter.opts, key=len)
        value = next(given[name]) if name in given else values[name]
        said: tuple[str, ...] = (option, value)
        if isinstance(parameter, click.Option) and parameter.is_flag:
            said = (option,) if value else (negation_of(parameter) or option,)
        if option in known:
            yield from said
    if any(operand.startswith("-") for operand in operands):
        yield "--"
    yield from operands
