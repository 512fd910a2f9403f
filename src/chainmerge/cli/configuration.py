# SPDX-License-Identifier: Apache-2.0
"""Configuration files, read and joined: which of them sets what."""

from __future__ import annotations

import math
import tomllib
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from chainmerge.cli.errors import ConfigurationInvalid
from chainmerge.cli.settings import (
    GENERAL,
    NEVER_SET,
    SETTINGS,
    places_in_force,
    section_of,
)
from chainmerge.cli.trusted_files import read_trusted
from chainmerge.cli.words import close_to, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chainmerge.cli.settings import ConfigurationPlace

_SCHEMA: Final = "$schema"
_GROUPS: Final = frozenset(name.partition(".")[0] for name in SETTINGS if "." in name)


class Setting(Struct, frozen=True):
    """What a file says: an option of a section, by its name without dashes in front."""

    file: str
    section: str
    option: str
    value: Any


class FileProblem(Struct, frozen=True):
    """What is wrong in a file, in a sentence, and what to do about it."""

    file: str
    sentence: str
    advice: str

    def as_error(self) -> ConfigurationInvalid:
        """The same, to be raised."""
        return ConfigurationInvalid(self.file, self.sentence, self.advice)


def settings_in_force(environment: Mapping[str, str]) -> list[Setting]:
    """All that the files in force say; what comes later goes over what comes before.

    Raises ConfigurationInvalid, and what :func:`read_trusted` raises.
    """
    settings = []
    for place in places_in_force(environment):
        found, problems = read_place(place)
        for problem in problems:
            raise problem.as_error()
        settings += found
    return settings


def read_place(place: ConfigurationPlace) -> tuple[list[Setting], list[FileProblem]]:
    """What one file says, for all commands first; and the words that are wrong in it.

    Raises what :func:`read_trusted` raises.
    """
    content = read_trusted(place.path)
    try:
        tables = tomllib.loads(content.decode(), parse_float=_number_or_word)
    except (ValueError, RecursionError) as error:
        advice = "see docs/configuration.md for what such a file looks like"
        return [], [FileProblem(place.path, f"it is not TOML: {error}", advice)]
    tables.pop(_SCHEMA, None)
    read = [one for name, table in tables.items() for one in _in_table(place.path, name, table)]
    settings = [one for one in read if isinstance(one, Setting)]
    settings.sort(key=lambda one: one.section != GENERAL)
    return settings, [one for one in read if isinstance(one, FileProblem)]


def _number_or_word(text: str) -> float | str:
    """A number, as JSON knows them; what TOML has beside those stays a word."""
    number = float(text)
    return number if math.isfinite(number) else text


def settings_for(section: str, settings: Sequence[Setting]) -> dict[str, Setting]:
    """By option, what holds for the commands of a section.

    Of what is said for all commands, that is only what the section could set itself.
    """
    settable = SETTINGS.get(section, frozenset())
    return {
        one.option: one
        for one in settings
        if one.section in {GENERAL, section} and one.option in settable
    }


def options_in(section: str) -> frozenset[str] | None:
    """The options that a section can set; None if there is none of this name."""
    if section == GENERAL:
        return frozenset[str]().union(*SETTINGS.values())
    return SETTINGS.get(section)


def _in_table(file: str, section: str, table: object) -> Iterator[Setting | FileProblem]:
    known = options_in(section)
    if known is None and section not in _GROUPS:
        yield FileProblem(file, f"there is no section [{section}]", _section_meant(section))
    elif not isinstance(table, dict):
        advice = f"write [{section}], and its options below that"
        yield FileProblem(file, f"{section} is not a section", advice)
    elif known is None:
        for name, below in table.items():
            yield from _in_table(file, f"{section}.{name}", below)
    else:
        for name, value in table.items():
            if name in known:
                yield Setting(file, section, name, value)
            else:
                yield _unknown_option(file, section, name, known)


def _section_meant(section: str) -> str:
    home = section_of(f"chainmerge {section.replace('.', ' ')}")
    if home != section:
        return f"{section.replace('.', ' ')} takes its options from [{home}]"
    meant = close_to(section.replace("_", "-"), (GENERAL, *SETTINGS))
    return did_you_mean(f"[{name}]" for name in meant) or (
        "sections are called like commands, or [options], which is for all of them"
    )


def _unknown_option(file: str, section: str, name: str, known: frozenset[str]) -> FileProblem:
    plain = name.removeprefix("--").replace("_", "-")
    if plain in NEVER_SET:
        advice = f"give --{plain} with the command: it is for one case, and not for all"
        return FileProblem(file, f"[{section}] cannot set {name!r}", advice)
    meant = close_to(plain, known)
    homes = [f"[{one}]" for one, options in SETTINGS.items() if plain in options]
    if plain not in known and homes:
        advice = f"it can stand in {' or '.join(homes[:2])}"
    else:
        advice = did_you_mean(meant) or "`chainmerge config show COMMAND` lists what can be set"
    return FileProblem(file, f"[{section}] has no option {name!r}", advice)
