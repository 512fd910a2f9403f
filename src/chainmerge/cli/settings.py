# SPDX-License-Identifier: Apache-2.0
"""What a configuration file may set, and where such files lie.

The table says again what the commands have: they would have to be loaded, all of them, to tell
that a word in a file is none of theirs. ``tests/cli/test_settings.py`` compares the two.
"""

from __future__ import annotations

import errno
import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import click

SYSTEM_FILE: Final = "/etc/chainmerge/config.toml"
FILE_VARIABLE: Final = "CHAINMERGE_CONFIG"
"""In the environment: a file that goes over the system's and the user's."""

GENERAL: Final = "options"
"""The section for all commands that have the option."""

_PLACES: Final = frozenset({"allow-backing", "format"})
_REACHING: Final = _PLACES | {
    "activate", "allow-data-file", "lock-command", "lock-wait", "search",
}  # fmt: skip
_MERGING: Final = _REACHING | {
    "bandwidth", "data", "delete", "detect-zeroes", "direction", "discard", "engine",
    "extend-pool", "history", "keep-name", "key-file", "leave", "quiet", "shrink", "size-limit",
    "verbose", "verify", "volume",
}  # fmt: skip
_IN_VM: Final = _REACHING | {
    "bandwidth", "deadline", "delete", "direction", "extend-pool", "history", "monitor-hold",
    "on-stall", "quiet", "size-limit", "verbose", "verify", "volume",
}  # fmt: skip
_CHANGING_BITMAPS: Final = _REACHING | {"quiet"}

SETTINGS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "merge": _MERGING,
        "flatten": _MERGING,
        "thin-out": _MERGING | {"keep", "keep-checkpoints", "keep-last", "keep-within"},
        "live.merge": _IN_VM,
        "live.repair": frozenset({"quiet"}),
        "live.status": frozenset({"monitor-hold"}),
        "cancel": _REACHING | {"shrink"},
        "bitmaps.add": _CHANGING_BITMAPS | {"granularity"},
        "bitmaps.clear": _CHANGING_BITMAPS,
        "bitmaps.list": _REACHING,
        "bitmaps.merge": _CHANGING_BITMAPS,
        "bitmaps.prune": _CHANGING_BITMAPS,
        "bitmaps.remove": _CHANGING_BITMAPS,
        "bitmaps.repair": _CHANGING_BITMAPS,
        "relink": _REACHING,
        "repair": _REACHING | {"backup"},
        "scan": _PLACES
        | {
            "cache", "check", "connect", "domains", "fail-on", "free-critical", "free-warning",
            "hidden", "history", "length-critical", "length-info", "length-limit", "length-warning",
            "old-days", "one-file-system", "quiet",
        },
        "list": _PLACES,
        "report": _PLACES | {"chains", "history", "quiet"},
        "info": _REACHING,
        "check": _REACHING,
    }
)  # fmt: skip
"""By section: the options that it may set."""

_FLAGS: Final = frozenset(
    {
        "activate", "check", "delete", "detect-zeroes", "discard", "domains", "extend-pool",
        "keep-checkpoints", "keep-name", "quiet", "shrink", "verbose",
    }
)  # fmt: skip
"""Settable options that are flags, and say themselves nothing of the opposite."""

_SECTIONS_OF_OTHERS: Final = MappingProxyType(
    {
        "plan": "merge",
        "measure": "merge",
        "live.plan": "live.merge",
        "live.resume": "live.merge",
    }
)

NEVER_SET: Final = frozenset(
    {
        # What is agreed to with a particular image in view.
        "despite-newer-base", "drop-bitmaps", "drop-snapshots", "force", "reclaim", "sole-user",
        "unchecked", "yes",
        # What a command is about, and what it writes.
        "active", "all", "all-disks", "backing", "base", "cancel-job", "device", "disabled", "disk",
        "domain", "from", "no-backing", "node", "output", "qmp", "report", "sqlite", "textfile",
        "undo",
        # What scripts rely on that read what is printed.
        "dry-run", "json",
    }
)  # fmt: skip
"""Options that are given with each command."""


def section_of(command_path: str) -> str:
    """The section for a command, by its name with all words, such as ``chainmerge live merge``.

    What shows what a command would do has that command's section, so that it shows the truth.
    """
    name = ".".join(command_path.split()[1:])
    return _SECTIONS_OF_OTHERS.get(name, name)


def name_of(option: click.Option) -> str:
    """What a file calls an option."""
    return max(option.opts, key=len).removeprefix("--")


def negation_of(option: click.Option) -> str | None:
    """What takes back a flag on the command line that a file has set; None if nothing does."""
    if option.secondary_opts:
        return option.secondary_opts[0]
    name = name_of(option)
    return f"--no-{name}" if option.is_flag and name in _FLAGS else None


def commands_of(section: str) -> tuple[str, ...]:
    """The commands that have a section, by their names with dots between the words."""
    others = (name for name, shared in _SECTIONS_OF_OTHERS.items() if shared == section)
    return (section, *others)


class ConfigurationPlace(NamedTuple):
    """Where a configuration file may lie.

    It is the ``system``'s, the ``user``'s, or the one that the ``environment`` names.
    """

    scope: str
    path: str


def configuration_places(environment: Mapping[str, str]) -> Iterator[ConfigurationPlace]:
    """Where configuration files may lie; what comes later goes over what comes before."""
    yield ConfigurationPlace("system", SYSTEM_FILE)
    home = environment.get("XDG_CONFIG_HOME", "")
    # By the specification of that variable, what is not absolute counts for nothing.
    if not home.startswith("/"):
        home = os.path.join(os.path.expanduser("~"), ".config")  # noqa: PTH111, PTH118
    if home.startswith("/"):
        yield ConfigurationPlace("user", f"{home}/chainmerge/config.toml")
    if named := environment.get(FILE_VARIABLE):
        yield ConfigurationPlace("environment", named)


def places_in_force(environment: Mapping[str, str]) -> list[ConfigurationPlace]:
    """The places with a file, and those where nobody can tell."""
    return [place for place in configuration_places(environment) if not _is_missing(place)]


def _is_missing(place: ConfigurationPlace) -> bool:
    # One that is named has to be there.
    if place.scope == "environment":
        return False
    try:
        os.lstat(place.path)
    except OSError as error:
        return error.errno in {errno.ENOENT, errno.ENOTDIR}
    except ValueError:
        return True
    return False
