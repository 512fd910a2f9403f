# SPDX-License-Identifier: Apache-2.0
"""What a host says of itself and of what jobs may touch on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

from msgspec import Meta, Struct, field

from chainmerge.fleet.record import HostName

DEFAULT_STATE: Final = "/var/lib/chainmerge/fleet"

_Directory = Annotated[str, Meta(pattern=r"^/")]
_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]


class FleetSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The configuration of a host, or of an operator's machine, which needs only ``database``.

    Attributes:
        database: How to reach the database, as libpq is told.
        host: What this host is called; the machine's own name by default.
        directories: Where images of jobs may lie, at any depth.
        volume_groups: Whose logical volumes may be images of jobs.
        fleet_only: Those of the volume groups whose volumes nothing but this fleet activates, on
            any host: where no locks say so, this has to.
        connect: The libvirt whose domains the disks are; empty if there is none.
        storages: By the name that all hosts give a storage that several of them use, the directory
            where it is mounted here. Merges on it count against the limit of the storage.
        lock_command: The site's command that locks volumes for this host, as the option of
            ``merge``.
        state: Where reports wait until the database has them.
        poll: Seconds between two looks for new jobs.
        machine_id_file: What tells this machine from its clones.
    """

    database: Annotated[str, Meta(min_length=1)]
    host: HostName | None = None
    directories: tuple[_Directory, ...] = ()
    volume_groups: tuple[_Name, ...] = ()
    fleet_only: tuple[_Name, ...] = ()
    connect: str = "qemu:///system"
    storages: Mapping[_Name, _Directory] = field(default_factory=dict)
    lock_command: str | None = None
    state: _Directory = DEFAULT_STATE
    poll: Annotated[float, Meta(ge=0.1, le=60)] = 3.0
    machine_id_file: str = "/etc/machine-id"


class HostSettings(Struct, frozen=True):
    """The same, of a host whose name and machine are known.

    ``file`` is where it was read from: commands for this host that a worker starts are told so.
    """

    name: str
    machine_id: str
    fleet: FleetSettings
    file: str = ""
