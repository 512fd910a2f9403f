# SPDX-License-Identifier: Apache-2.0
"""What configuration files say, and what is wrong with them."""

from __future__ import annotations

from msgspec import Struct

SettingValue = bool | int | float | str | list[str] | None


class ConfigurationFile(Struct, frozen=True):
    """A file that may say something.

    Attributes:
        path: Where it lies, or would.
        scope: Whose it is: ``system``, ``user``, ``environment`` (CHAINMERGE_CONFIG names it) or
            ``named`` (on the command line).
        found: Whether there is one.
    """

    path: str
    scope: str
    found: bool


class ConfiguredValue(Struct, frozen=True):
    """An option, and what it is where it is not given.

    Attributes:
        option: Its name, without the dashes before it.
        value: What it is; None if that is left open.
        section: The section that says so; None for what is built in.
        file: The file that says so; None for what is built in.
        overridden: Whether what is said elsewhere holds in its place.
    """

    option: str
    value: SettingValue
    section: str | None
    file: str | None
    overridden: bool


class ConfigurationReport(Struct, frozen=True):
    """What configuration files say.

    Attributes:
        version: Version of this document.
        files: Where files may lie; what comes later goes over what comes before.
        command: The command that it is about; None for all that the files say.
        values: What files set, in the order of the files; of one command, all that can be set.
    """

    version: int
    files: tuple[ConfigurationFile, ...]
    command: str | None
    values: tuple[ConfiguredValue, ...]


class ConfigurationProblem(Struct, frozen=True):
    """What is wrong in a configuration file.

    Attributes:
        file: The file.
        problem: What is wrong, in a sentence.
        suggestion: What to do about it.
    """

    file: str
    problem: str
    suggestion: str


class ConfigurationCheck(Struct, frozen=True):
    """Whether commands can go by the configuration files.

    Attributes:
        version: Version of this document.
        files: The files that were checked, and those that are not there.
        problems: All that is wrong in them.
    """

    version: int
    files: tuple[ConfigurationFile, ...]
    problems: tuple[ConfigurationProblem, ...]
