# SPDX-License-Identifier: Apache-2.0
"""Where images of jobs may lie on this host, and what a job there has to hold."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.fleet.record import (
    Action,
    RecordUnusable,
    host_key,
    keys_needed,
)
from chainmerge.records.identity import identify

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.fleet.record import JobDisk, JobRecord
    from chainmerge.fleet.scan_record import ScanRecord
    from chainmerge.fleet.settings import HostSettings

_VOLUME: Final = re.compile(
    r"/dev/([A-Za-z0-9+_.][A-Za-z0-9+_.-]*)/[A-Za-z0-9+_.][A-Za-z0-9+_.-]*\Z"
)
_MOUNT_TABLE: Final = Path("/proc/self/mountinfo")
_NFS: Final = frozenset({"nfs", "nfs4"})
_UNLOCKED: Final = frozenset({"nolock", "local_lock=all", "local_lock=flock", "local_lock=posix"})
"""Options of a mount with which locks do not go to the server."""


def require_admissible(record: JobRecord, host: HostSettings) -> None:
    """Check that a job is one for this host, and that it may touch what it names.

    Raises:
        RecordUnusable: it is not, or may not.
    """
    # A domain moves, and its job with it. That it runs here is found out before anything is done.
    is_of_other_host = record.action is Action.LIVE_MERGE and record.host != host.name
    if not is_of_other_host:
        _require_of_this_machine(record, host)
    for disk in record.disks:
        require_allowed(disk.top, host)
        require_allowed(disk.base, host)
    needed = keys_of(record.disks, host)
    if set(needed) != set(keys_on(host.name, record)):
        # More than needed would hold up others.
        raise RecordUnusable(f"it asks for other keys than {', '.join(needed)}")


def _require_of_this_machine(record: JobRecord, host: HostSettings) -> None:
    require_for(record.host, host)
    if record.machine_id != host.machine_id:
        raise RecordUnusable("it was planned on another machine of this name")


def require_for(named: str, host: HostSettings) -> None:
    """Check that a job names this host.

    Raises:
        RecordUnusable: it names another one.
    """
    if named != host.name:
        raise RecordUnusable(f"it is for the host {named}, and this is {host.name}")


def require_allowed(path: str, host: HostSettings) -> None:
    """Check that jobs may touch an image, wherever links lead.

    Raises:
        RecordUnusable: it lies elsewhere, or its name can be read in two ways.
    """
    if not path.startswith("/") or os.path.normpath(path) != path or not path.isprintable():
        raise RecordUnusable(f"{path!r} is not a plain absolute path")
    volume = _VOLUME.match(path)
    if volume and volume[1] in host.fleet.volume_groups:
        return
    allowed = [os.path.realpath(directory) for directory in host.fleet.directories]
    real = os.path.realpath(path)
    if not any(_is_below(real, directory) for directory in allowed):
        raise RecordUnusable(f"{path} is not in a directory that jobs may touch here")
    if reason := why_not_locked(real):
        raise RecordUnusable(f"{path} {reason}: no other host would see its locks")


def keys_of(disks: Sequence[JobDisk], host: HostSettings) -> list[str]:
    """What a job for these disks has to hold on this host."""
    storages = {storage for disk in disks for storage in _storages_of(disk, host)}
    return keys_needed(host.name, storages, disks)


def keys_on(host: str, record: JobRecord | ScanRecord) -> list[str]:
    """What a job has to hold on a host that it has followed its domain to."""
    planned_for = host_key(record.host)
    return [host_key(host) if key == planned_for else key for key in record.keys]


def base_id_of(path: str) -> str:
    """What tells an image from all others, the same as seen from every host.

    Raises OSError if there is nothing at *path*.
    """
    identity = repr(identify(Path(path)).key)
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _storages_of(disk: JobDisk, host: HostSettings) -> Iterator[str]:
    for storage, directory in host.fleet.storages.items():
        real = os.path.realpath(directory)
        if any(_is_below(os.path.realpath(path), real) for path in (disk.top, disk.base)):
            yield storage


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(f"{directory.rstrip('/')}/")


def why_not_locked(path: str, table: Path = _MOUNT_TABLE) -> str:
    """Why locks on a file do not keep other hosts away; empty if they do, or nobody shares it.

    Args:
        path: Absolute, without symbolic links.
        table: What is mounted where, as proc(5) has it in ``mountinfo``.
    """
    nearest, reason = "", ""
    for line in table.read_text("utf-8", "surrogateescape").splitlines():
        before, _, behind = line.partition(" - ")
        point, (kind, *rest) = before.split(" ")[4], behind.split(" ")
        if (point == "/" or _is_below(path, point)) and len(point) >= len(nearest):
            nearest = point
            options = {*before.split(" ")[5].split(","), *",".join(rest[1:]).split(",")}
            unlocked = sorted(options & _UNLOCKED) if kind in _NFS else []
            reason = f"is on NFS mounted with {', '.join(unlocked)}" if unlocked else ""
    return reason
