# SPDX-License-Identifier: Apache-2.0
"""The JSON schema of configuration files, made of the commands' own options.

``python -m chainmerge.cli.configuration_schema FILE`` writes it. Editors check a file by it that
begins with ``#:schema PATH``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from chainmerge.cli.config import command_named
from chainmerge.cli.configured import settable_options
from chainmerge.cli.main import cli
from chainmerge.cli.settings import GENERAL, SETTINGS, commands_of, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_TEXT_OR_NUMBER: Final = {"type": ["string", "number"]}


def configuration_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a configuration file."""
    root: dict[str, Any] = {"$schema": {"type": "string"}}
    general: dict[str, Any] = {}
    for section in SETTINGS:
        options = {name_of(option): _schema_of(option) for option in _options_of(section)}
        for name, said in options.items():
            general.setdefault(name, said)
        group, _, name = section.rpartition(".")
        commands = (one.replace(".", " ") for one in commands_of(section))
        about = f"Defaults of {', '.join(commands)}"
        table = _table(about, options)
        if group:
            groups = root.setdefault(group, _table(f"Commands of {group}", {}))
            groups["properties"][name] = table
        else:
            root[section] = table
    everything = _table("Defaults of all commands that have the option", general)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "chainmerge configuration",
        "description": "What configuration files say options are, where they are not given.",
        "type": "object",
        "additionalProperties": False,
        "properties": {GENERAL: everything, **root},
    }


def _options_of(section: str) -> Iterator[click.Option]:
    context = click.Context(cli, info_name="chainmerge")
    seen: set[str] = set()
    for path in commands_of(section):
        command = command_named(context, path.split("."))
        assert command is not None
        for option in settable_options(command, SETTINGS[section] - seen):
            seen.add(name_of(option))
            yield option


def _table(about: str, properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": about,
        "additionalProperties": False,
        "properties": dict(sorted(properties.items())),
    }


def _schema_of(option: click.Option) -> dict[str, Any]:
    about = " ".join((option.help or "").partition("  [default:")[0].split())
    if option.is_flag:
        return {"description": about, "type": "boolean"}
    if option.multiple:
        return {"description": about, "type": "array", "items": {"type": "string"}}
    match option.type:
        case click.Choice(choices=choices):
            return {"description": about, "enum": list(choices)}
        case click.IntRange(min=lowest, max=highest):
            said: dict[str, Any] = {"description": about, "type": "integer"}
        case click.FloatRange(min=lowest, max=highest):
            said = {"description": about, "type": "number"}
        case click.Path():
            return {"description": about, "type": "string", "pattern": "^/"}
        case _ if option.metavar in {"SIZE", "RATE"}:
            return {"description": about, **_TEXT_OR_NUMBER}
        case _:
            return {"description": about, "type": "string"}
    bounds = {"minimum": lowest, "maximum": highest}
    return said | {name: bound for name, bound in bounds.items() if bound is not None}


def schema_text() -> str:
    """Return it as it is written to its file."""
    return json.dumps(configuration_schema(), indent=2) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_text(), encoding="ascii")
