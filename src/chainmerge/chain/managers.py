# SPDX-License-Identifier: Apache-2.0
"""Where the managers of virtual machines on this host keep their images.

Read from files, without a daemon: the pools and domains of libvirt, the storage of Proxmox VE,
and what running QEMUs have open.
"""

from __future__ import annotations

import contextlib
import os
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of each kind; far more than a host has.
_MAX_FILES: Final = 1024
_MAX_BYTES: Final = 1 << 18

_LIBVIRT_POOLS: Final = ("etc/libvirt/storage",)
_LIBVIRT_DOMAINS: Final = ("etc/libvirt/qemu", "run/libvirt/qemu")
_PROXMOX_STORAGE: Final = "etc/pve/storage.cfg"
# Images are in a directory for each machine.
_PROXMOX_LEVELS: Final = 1

_POOL_PATH: Final = re.compile(r"<path>\s*([^<]+?)\s*</path>")
_DISK_SOURCE: Final = re.compile(r"<source\s[^>]*\b(?:file|dev)=(['\"])(.+?)\1")
_STORAGE_PATH: Final = re.compile(r"^\s+path\s+(\S.*?)\s*$", re.MULTILINE)
_QEMU_NAMES: Final = ("qemu", "kvm")
# QEMU locks its images by open file description (proc(5), /proc/PID/fdinfo).
_LOCK: Final = "OFDLCK"


class ManagedPlace(Struct, frozen=True):
    """A directory that images are kept in, and how many levels of directories below it."""

    directory: str
    levels: int = 0


def managed_places(root: Path = Path("/")) -> tuple[ManagedPlace, ...]:
    """The directories that are known to be used for images; they need not exist.

    Args:
        root: where ``etc``, ``run`` and ``proc`` are.
    """
    found: dict[str, ManagedPlace] = {}
    for place in (*_libvirt(root), *_proxmox(root), *_running(root)):
        if place.directory.startswith("/") and "\0" not in place.directory:
            found.setdefault(place.directory, place)
    return tuple(found.values())


def _libvirt(root: Path) -> Iterator[ManagedPlace]:
    for text in _texts(root, _LIBVIRT_POOLS):
        yield from (ManagedPlace(_path(one[1])) for one in _POOL_PATH.finditer(text))
    for text in _texts(root, _LIBVIRT_DOMAINS):
        yield from (_home(_path(one[2])) for one in _DISK_SOURCE.finditer(text))


def _proxmox(root: Path) -> Iterator[ManagedPlace]:
    for one in _STORAGE_PATH.finditer(_text(f"{root}/{_PROXMOX_STORAGE}")):
        yield ManagedPlace(f"{one[1].rstrip('/')}/images", _PROXMOX_LEVELS)


def _running(root: Path) -> Iterator[ManagedPlace]:
    """The directories of images that a QEMU on this host has open."""
    processes = f"{root}/proc"
    for number in filter(str.isdecimal, _names(processes)):
        process = f"{processes}/{number}"
        if not _text(f"{process}/comm").startswith(_QEMU_NAMES):
            continue
        for descriptor in _names(f"{process}/fd"):
            # The kernel knows this without a look at the storage, which may be dead.
            if _LOCK not in _text(f"{process}/fdinfo/{descriptor}"):
                continue
            with contextlib.suppress(OSError):
                yield _home(str(Path(f"{process}/fd/{descriptor}").readlink()))


def _home(image: str) -> ManagedPlace:
    return ManagedPlace(os.path.dirname(image))  # noqa: PTH120 (a string of somebody else's)


def _path(text: str) -> str:
    # Imported where it is used: it brings the names of all characters.
    import html  # noqa: PLC0415

    return html.unescape(text)


def _texts(root: Path, directories: tuple[str, ...]) -> Iterator[str]:
    for directory in directories:
        names = [name for name in _names(f"{root}/{directory}") if name.endswith(".xml")]
        for name in names[:_MAX_FILES]:
            yield _text(f"{root}/{directory}/{name}")


def _names(directory: str) -> list[str]:
    """The names in a directory in order, no more than some; none if it cannot be read."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in islice(entries, 1 << 16))
    except OSError:
        return []


def _text(file: str) -> str:
    """What a small file holds; nothing if it cannot be read."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return ""
    try:
        return os.fsdecode(os.read(fd, _MAX_BYTES))
    except OSError:
        return ""
    finally:
        os.close(fd)
