# SPDX-License-Identifier: Apache-2.0
"""The file that says where the fleet is, and what jobs may touch on this host."""

from __future__ import annotations

import hashlib
import socket
import tomllib
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from chainmerge.fleet.database import require_extra
from chainmerge.fleet.errors import FleetMisconfigured
from chainmerge.fleet.settings import FleetSettings, HostSettings

if TYPE_CHECKING:
    from collections.abc import Callable

_CONFIGURATION: Final = "/etc/chainmerge/fleet.toml"
_config_option: Final = click.option(
    "--config",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    default=_CONFIGURATION,
    show_default=True,
    help="Where the fleet's database is, and what jobs may touch on this host.",
)


def database_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config to a command; it gets ``database``."""

    @wraps(function)
    def command(*args: Any, config: str, **kwargs: Any) -> Any:
        require_extra()
        return function(*args, database=database_in(Path(config)), **kwargs)

    return _config_option(command)


def host_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config to a command that is for this host; it gets ``host``."""

    @wraps(function)
    def command(*args: Any, config: str, **kwargs: Any) -> Any:
        require_extra()
        return function(*args, host=host_in(Path(config)), **kwargs)

    return _config_option(command)


def config_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config to a command that is for this host or for all; it gets ``config``, a path."""

    @wraps(function)
    def command(*args: Any, config: str, **kwargs: Any) -> Any:
        require_extra()
        return function(*args, config=Path(config), **kwargs)

    return _config_option(command)


def database_in(config: Path) -> str:
    """How the configuration says that the database is reached.

    Raises:
        FleetMisconfigured: it cannot be used.
    """
    return _settings_in(config).database


def host_in(config: Path) -> HostSettings:
    """What the configuration says of this host.

    Raises:
        FleetMisconfigured: it cannot be used.
    """
    settings = _settings_in(config)
    try:
        machine = Path(settings.machine_id_file).read_text("ascii").strip()
    except (OSError, ValueError) as error:
        raise FleetMisconfigured(settings.machine_id_file, str(error)) from error
    if not machine:
        raise FleetMisconfigured(settings.machine_id_file, "is empty")
    # machine-id(5): it is not to leave the machine as it is.
    digest = hashlib.sha256(f"chainmerge-fleet {machine}".encode()).hexdigest()[:32]
    return HostSettings(settings.host or socket.gethostname(), digest, settings, str(config))


def _settings_in(path: Path) -> FleetSettings:
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), FleetSettings)
    except OSError as error:
        raise FleetMisconfigured(str(path), error.strerror or str(error)) from error
    except (ValueError, msgspec.ValidationError) as error:
        raise FleetMisconfigured(str(path), str(error)) from error
