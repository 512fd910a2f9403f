# SPDX-License-Identifier: Apache-2.0
"""What a configuration file may set is what the commands have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import pytest

from chainmerge.cli.config import command_named
from chainmerge.cli.configuration_schema import configuration_schema
from chainmerge.cli.main import cli
from chainmerge.cli.settings import (
    _FLAGS,
    GENERAL,
    NEVER_SET,
    SETTINGS,
    ConfigurationPlace,
    commands_of,
    configuration_places,
    name_of,
    section_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]


def _options_in(section: str) -> Iterator[click.Option]:
    context = click.Context(cli, info_name="chainmerge")
    for path in commands_of(section):
        command = command_named(context, path.split("."))
        assert command is not None, path
        yield from (one for one in command.params if isinstance(one, click.Option))


@pytest.mark.parametrize("section", SETTINGS)
def test_every_option_is_settable_or_said_not_to_be(section: str) -> None:
    there = {name_of(option) for option in _options_in(section)}
    # What leads to libvirt leads to a domain that is named, but for the scan of all of them.
    with_domain = set() if section == "scan" else {"connect"}
    assert SETTINGS[section] == there - NEVER_SET - with_domain


def test_what_is_never_set_exists() -> None:
    there = {name_of(option) for section in SETTINGS for option in _options_in(section)}
    assert there >= NEVER_SET - {"qmp", "cancel-job"}
    assert not NEVER_SET & frozenset().union(*SETTINGS.values())


def test_every_flag_has_an_opposite() -> None:
    flags = {
        name_of(option)
        for section in SETTINGS
        for option in _options_in(section)
        if option.is_flag and name_of(option) in SETTINGS[section] and not option.secondary_opts
    }
    assert flags == _FLAGS


def test_what_shows_a_merge_goes_by_its_section() -> None:
    assert section_of("chainmerge plan") == section_of("chainmerge merge") == "merge"
    assert (
        section_of("chainmerge live plan") == section_of("chainmerge live resume") == "live.merge"
    )
    assert section_of("chainmerge scan") == "scan"


def test_the_schema_has_the_same_options() -> None:
    sections = configuration_schema()["properties"]
    for section, options in SETTINGS.items():
        table = sections
        for name in section.split("."):
            table = table[name]["properties"] if name in table else table
        assert set(table) >= options, section
    everything = frozenset().union(*SETTINGS.values())
    assert set(sections[GENERAL]["properties"]) == everything
    assert json.dumps(sections)


def test_later_places_go_over_earlier_ones() -> None:
    environment = {"XDG_CONFIG_HOME": "/home/a/.cfg", "CHAINMERGE_CONFIG": "/srv/c.toml"}
    assert list(configuration_places(environment)) == [
        ConfigurationPlace("system", "/etc/chainmerge/config.toml"),
        ConfigurationPlace("user", "/home/a/.cfg/chainmerge/config.toml"),
        ConfigurationPlace("environment", "/srv/c.toml"),
    ]


def test_a_relative_home_of_configurations_counts_for_nothing() -> None:
    (_, user) = configuration_places({"XDG_CONFIG_HOME": "cfg"})
    assert user.path.endswith("/.config/chainmerge/config.toml")
