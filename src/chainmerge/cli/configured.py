# SPDX-License-Identifier: Apache-2.0
"""Options that a command takes from configuration files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from chainmerge.cli.configuration import FileProblem, Setting, settings_for
from chainmerge.cli.params import KeyFile, PathFormat
from chainmerge.cli.settings import name_of
from chainmerge.options import ANY_IMAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def defaults_from(
    settings: Sequence[Setting], section: str, command: click.Command, context: click.Context
) -> dict[str, Any]:
    """What a command takes for options that are not given, by the names of its parameters.

    Raises ConfigurationInvalid if an option cannot have its value.
    """
    chosen = settings_for(section, settings)
    defaults = {}
    for option in settable_options(command, chosen):
        setting = chosen[name_of(option)]
        problem = problem_with(option, setting, context)
        if problem is not None:
            raise problem.as_error()
        defaults[option.name or ""] = as_typed(option, setting.value)
    return defaults


def settable_options(
    command: click.Command, names: dict[str, Any] | frozenset[str]
) -> Iterator[click.Option]:
    """The options of a command that are called like that."""
    for parameter in command.params:
        if isinstance(parameter, click.Option) and name_of(parameter) in names:
            yield parameter


def as_typed(option: click.Option, value: Any) -> Any:
    """A value as it would be typed: a flag stays one, and lists of words do."""
    if isinstance(value, bool):
        return value
    if option.multiple:
        return [str(one) for one in value] if isinstance(value, list) else value
    return str(value)


def problem_with(
    option: click.Option, setting: Setting, context: click.Context
) -> FileProblem | None:
    """What is wrong with the value that a file gives an option; None if nothing is."""
    wanted = _kind_wanted(option, setting.value)
    if wanted is not None:
        return _problem(setting, f"it has to be {wanted}")
    try:
        value = option.type_cast_value(context, as_typed(option, setting.value))
    except click.BadParameter as error:
        return _problem(setting, error.message)
    # To click it is in every range.
    if isinstance(value, float) and not math.isfinite(value):
        return _problem(setting, "it has to be a number")
    for path in _paths_in(option, value):
        if not path.startswith("/"):
            return _problem(setting, f"{path!r} is not an absolute path")
    return None


def _problem(setting: Setting, why: str) -> FileProblem:
    sentence = f"{setting.option} in [{setting.section}] cannot be {setting.value!r}"
    return FileProblem(setting.file, sentence, why)


def _kind_wanted(option: click.Option, value: Any) -> str | None:
    """What a value in a file has to be, in words; None if it is."""
    if option.is_flag:
        return None if isinstance(value, bool) else "true or false"
    if option.multiple:
        is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
        return None if is_list else "a list of texts"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return "a text or a number"
    return None


def _paths_in(option: click.Option, value: Any) -> Iterator[str]:
    """The paths that an option names: in a file they are relative to nothing."""
    for one in value if option.multiple else (value,):
        match option.type:
            case click.Path():
                yield one
            case PathFormat():
                yield one[0]
            case KeyFile():
                yield one[1]
                if one[0] != ANY_IMAGE:
                    yield one[0]
            case _:
                pass
