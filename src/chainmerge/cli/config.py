# SPDX-License-Identifier: Apache-2.0
"""``chainmerge config show`` and ``check``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from chainmerge.cli.commands import Command, Group
from chainmerge.cli.configuration import (
    options_in,
    read_place,
    settings_for,
    settings_in_force,
)
from chainmerge.cli.configured import problem_with, settable_options
from chainmerge.cli.options import json_option
from chainmerge.cli.settings import (
    GENERAL,
    SETTINGS,
    ConfigurationPlace,
    commands_of,
    configuration_places,
    name_of,
    places_in_force,
    section_of,
)
from chainmerge.documents.configuration import (
    ConfigurationCheck,
    ConfigurationFile,
    ConfigurationProblem,
    ConfigurationReport,
    ConfiguredValue,
)
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.errors import ExitCode
from chainmerge.report.configuration_tables import configuration_check, configuration_report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from click.shell_completion import CompletionItem

    from chainmerge.cli.configuration import FileProblem, Setting
    from chainmerge.cli.output import Output


@click.group(cls=Group)
def config() -> None:
    """Show and check the configuration files, which say what options are by default."""


def _command_candidates(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the words that may come next in the name of a command."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415 (for a shell)

    before = ctx.params.get(param.name or "") or ()
    names = (path.split(".") for section in SETTINGS for path in commands_of(section))
    words = {
        name[len(before)]
        for name in names
        if name[: len(before)] == list(before) and len(name) > len(before)
    }
    return [CompletionItem(word) for word in sorted(words) if word.startswith(incomplete)]


@config.command(cls=Command)
@click.argument("words", nargs=-1, metavar="[COMMAND]...", shell_complete=_command_candidates)
@click.pass_context
@json_option
def show(context: click.Context, *, words: tuple[str, ...], output: Output) -> None:
    """Show what configuration files set, and in which file each value stands.

    With a COMMAND, such as `live merge`, show all that can be set for it.
    """
    settings = [] if context.find_root().params["no_config"] else settings_in_force(os.environ)
    values = tuple(_values_of(context, words, settings)) if words else tuple(_all_values(settings))
    command = " ".join(words) or None
    output.document(
        ConfigurationReport(REPORT_VERSION, _files(), command, values), configuration_report
    )


@config.command(cls=Command)
@click.argument("file", type=click.Path(), required=False)
@click.pass_context
@json_option
def check(context: click.Context, *, file: str | None, output: Output) -> ExitCode:
    """Look for all that is wrong in the configuration files, or in FILE.

    The exit status is 2 if something is.
    """
    named = None if file is None else ConfigurationPlace("named", os.path.abspath(file))  # noqa: PTH100
    places = places_in_force(os.environ) if named is None else [named]
    problems: list[FileProblem] = []
    for place in places:
        settings, wrong = read_place(place)
        problems += (*wrong, *_wrong_values(context, settings))
    report = ConfigurationCheck(
        REPORT_VERSION,
        _files() if named is None else (ConfigurationFile(named.path, named.scope, found=True),),
        tuple(ConfigurationProblem(one.file, one.sentence, one.advice) for one in problems),
    )
    status = ExitCode.USAGE if problems else ExitCode.DONE
    output.document(report, configuration_check, status)
    return status


def _files() -> tuple[ConfigurationFile, ...]:
    found = places_in_force(os.environ)
    return tuple(
        ConfigurationFile(place.path, place.scope, found=place in found)
        for place in configuration_places(os.environ)
    )


def _all_values(settings: Sequence[Setting]) -> Iterator[ConfiguredValue]:
    """What files say; it is overridden where no command obtains it."""
    in_force = {
        id(setting) for section in SETTINGS for setting in settings_for(section, settings).values()
    }
    for one in settings:
        overridden = id(one) not in in_force
        yield ConfiguredValue(one.option, one.value, one.section, one.file, overridden)


def _values_of(
    context: click.Context, words: Sequence[str], settings: Sequence[Setting]
) -> Iterator[ConfiguredValue]:
    """All that can be set for a command."""
    section = section_of(f"chainmerge {' '.join(words)}")
    command = command_named(context, words)
    names = options_in(section)
    if command is None or names is None:
        message = f"nothing can be set for {' '.join(words)!r}"
        raise click.UsageError(message)
    chosen = settings_for(section, settings)
    for option in settable_options(command, names):
        setting = chosen.get(name_of(option))
        if setting is None:
            yield ConfiguredValue(name_of(option), _built_in(option), None, None, overridden=False)
        else:
            yield ConfiguredValue(
                setting.option, setting.value, setting.section, setting.file, overridden=False
            )


def _built_in(option: click.Option) -> Any:
    default = option.to_info_dict()["default"]
    return list(default or ()) if option.multiple else default


def command_named(context: click.Context, words: Sequence[str]) -> click.Command | None:
    """The command that these words lead to; None if they lead to none."""
    command: click.Command | None = context.find_root().command
    for word in words:
        if not isinstance(command, click.Group):
            return None
        command = command.get_command(context, word)
    return None if isinstance(command, click.Group) else command


def _wrong_values(context: click.Context, settings: Sequence[Setting]) -> Iterator[FileProblem]:
    for setting in settings:
        sections = tuple(SETTINGS) if setting.section == GENERAL else (setting.section,)
        problems = (
            problem_with(option, setting, context)
            for option in _options_called(context, setting.option, sections)
        )
        # Whatever has the option says the same of its value.
        yield from [problem for problem in problems if problem is not None][:1]


def _options_called(
    context: click.Context, name: str, sections: Sequence[str]
) -> Iterator[click.Option]:
    for section in sections:
        if name not in SETTINGS[section]:
            continue
        for path in commands_of(section):
            command = command_named(context, path.split("."))
            if command is not None:
                yield from settable_options(command, frozenset({name}))
