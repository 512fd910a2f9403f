# SPDX-License-Identifier: Apache-2.0
"""The VM that has an image open, and how ``chainmerge live`` reaches it.

Only what ``/proc`` tells, and libvirt of its own domains, is taken for known: nobody connects to a
monitor that may be somebody else's.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from chainmerge.chain.discovery import discover
from chainmerge.chain.model import ChainPolicy, Identity
from chainmerge.chain.reading import identity_at
from chainmerge.errors import ChainmergeError
from chainmerge.live.libvirt.connection import DEFAULT_URI, DomainConnection
from chainmerge.live.libvirt.description import disks_of
from chainmerge.live.qemu_processes import virtual_machines
from chainmerge.storage.bystanders import files_open_in, key_of
from chainmerge.storage.processes import guest_name, properties_of, started_with, values_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# What libvirt calls the monitor that it keeps for itself.
_MONITOR_OF_LIBVIRT: Final = "charmonitor"
_NO_SOCKET: Final = "SOCKET is a QMP socket of the VM: none was found"
_NO_DEVICE: Final = "ID is the disk's device: with a wrong one, the command lists all"
_NO_TARGET: Final = "TARGET is the disk's target, as `virsh domblklist` shows it"


class FoundVm(Struct, frozen=True):
    """A VM that has an image open.

    Attributes:
        process: The id of its QEMU.
        address: The options of ``chainmerge live`` that lead to the disk.
        unknown: What stands for something in these that was not found, a sentence each.
    """

    process: int
    address: tuple[str, ...]
    unknown: tuple[str, ...]


def vm_that_has_open(image: Path) -> FoundVm | None:
    """The VM that has *image* open; None if there is none to be seen, or more than one."""
    try:
        key = key_of(image.stat())
    except OSError:
        return None
    found = [one for one in virtual_machines() if key in (files_open_in(one) or ())]
    if len(found) != 1:
        return None
    (process,) = found
    words = started_with(process)
    name = guest_name(words)
    if name is not None and _MONITOR_OF_LIBVIRT in _sockets(words):
        return _domain(process, name, image)
    return _qmp(process, words, image)


def _domain(process: int, name: str, image: Path) -> FoundVm:
    target = _target_of(name, image)
    address = ("--domain", name, "--disk", target or "TARGET")
    return FoundVm(process, address, () if target else (_NO_TARGET,))


def _target_of(name: str, image: Path) -> str | None:
    wanted = identity_at(image)
    with (
        contextlib.suppress(ChainmergeError),
        DomainConnection(DEFAULT_URI, name) as connection,
    ):
        description = connection.ask("virDomainGetXMLDesc", connection.domain.XMLDesc)
        for target, layers in disks_of(description).items():
            if any(one.path is not None and identity_at(one.path) == wanted for one in layers):
                return target
    return None


def _qmp(process: int, words: Sequence[str], image: Path) -> FoundVm:
    socket, device = _qmp_socket(process, words), _device_of(process, words, image)
    address = ("--qmp", socket or "SOCKET", "--device", device or "ID")
    unknown = ((socket, _NO_SOCKET), (device, _NO_DEVICE))
    return FoundVm(process, address, tuple(why for found, why in unknown if found is None))


# The monitor


def _sockets(words: Sequence[str]) -> dict[str, dict[str, str]]:
    """The character devices that are sockets, by their ids."""
    devices = [properties_of(value, "backend") for value in values_of("chardev", words)]
    return {one["id"]: one for one in devices if one.get("backend") == "socket" and "id" in one}


def _qmp_socket(process: int, words: Sequence[str]) -> str | None:
    for path in _named_sockets(words):
        place = Path(f"/proc/{process}/cwd")
        with contextlib.suppress(OSError):
            absolute = place.readlink() / path
            if absolute.is_socket():
                return str(absolute)
    return None


def _named_sockets(words: Sequence[str]) -> Iterator[str]:
    for option in ("qmp", "qmp-pretty"):
        for value in values_of(option, words):
            path = properties_of(value, "address").get("address", "")
            if path.startswith("unix:"):
                yield path.removeprefix("unix:")
    sockets = _sockets(words)
    for value in values_of("mon", words):
        monitor = properties_of(value, "chardev")
        if monitor.get("mode") == "control":
            socket = sockets.get(monitor.get("chardev", ""), {})
            if "path" in socket:
                yield socket["path"]


# The disk


def _device_of(process: int, words: Sequence[str], image: Path) -> str | None:
    """The disk whose chain has *image* in it; None unless there is one alone."""
    ours = _chain_at(image)
    wanted = identity_at(image)
    found = set()
    for device, file in _disks(words):
        path = Path(os.path.realpath(f"/proc/{process}/cwd")) / file
        # The VM may have taken snapshots since it was started.
        if wanted in _chain_at(path) or identity_at(path) in ours:
            found.add(device)
    return found.pop() if len(found) == 1 else None


def _chain_at(image: Path) -> frozenset[Identity]:
    try:
        chain = discover(image, ChainPolicy(named=(image,), metadata_only=True))
    except ChainmergeError:
        return frozenset()
    return frozenset(one.identity for one in chain.images)


def _disks(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The ids of disks, as QEMU was started, and the files of their images."""
    files = {**_files_of_drives(words), **_files_of_nodes(words)}
    for value in values_of("device", words):
        device = _parsed(value, "driver")
        drive = device.get("drive")
        if isinstance(drive, str) and drive in files:
            yield str(device.get("id", drive)), files[drive]


def _files_of_drives(words: Sequence[str]) -> dict[str, str]:
    drives = [properties_of(value, "file") for value in values_of("drive", words)]
    return {one["id"]: one["file"] for one in drives if "id" in one and "file" in one}


def _files_of_nodes(words: Sequence[str]) -> dict[str, str]:
    nodes = [_parsed(value, "driver") for value in values_of("blockdev", words)]
    by_name = {str(one.get("node-name")): one for one in nodes}
    found = ((name, _file_of(node, by_name)) for name, node in by_name.items())
    return {name: file for name, file in found if file is not None}


def _file_of(node: Mapping[str, Any], by_name: Mapping[str, Mapping[str, Any]]) -> str | None:
    seen = []
    while node not in seen:
        seen.append(node)
        filename = node.get("filename", node.get("file.filename"))
        if isinstance(filename, str):
            return filename
        below = node.get("file")
        node = below if isinstance(below, dict) else by_name.get(str(below), {})
    return None


def _parsed(value: str, implied: str) -> dict[str, Any]:
    """An option that QEMU takes in its own form or as JSON."""
    if not value.startswith("{"):
        return dict(properties_of(value, implied))
    try:
        parsed = json.loads(value)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
