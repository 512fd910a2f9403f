# SPDX-License-Identifier: Apache-2.0
"""The disks of all domains of a libvirt, running or not; over a connection that only reads."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from chainmerge.documents.scan import DefinedDisk
from chainmerge.live.errors import LibvirtMissing, VmUnreachable
from chainmerge.live.libvirt.connection import DEFAULT_URI, message_of, quiet_about_errors
from chainmerge.live.libvirt.description import disks_of

if TYPE_CHECKING:
    from collections.abc import Iterator


class RunningDomain(Struct, frozen=True):
    """A domain that runs here, and not only until it has been migrated from elsewhere.

    Attributes:
        name: What it is called.
        uuid: What tells it from all others.
        disks: By the target of each disk, the paths of its images, the active one first.
    """

    name: str
    uuid: str
    disks: Mapping[str, tuple[str, ...]]


def domain_disks(uri: str = DEFAULT_URI) -> tuple[DefinedDisk, ...]:
    """The active image of each disk that is a file or a block device, of all domains.

    Of a domain that does not run, its next start counts.

    Args:
        uri: of libvirt.

    Raises:
        LibvirtMissing: the Python package is not there.
        VmUnreachable: libvirt does not answer.
    """
    with _reading(uri) as (_, connection):
        return tuple(_disks(connection))


def running_domains(uri: str = DEFAULT_URI) -> tuple[RunningDomain, ...]:
    """The domains that run on this host now.

    Args:
        uri: of libvirt.

    Raises:
        LibvirtMissing: the Python package is not there.
        VmUnreachable: libvirt does not answer.
    """
    with _reading(uri) as (library, connection):
        return tuple(_running(library, connection))


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[tuple[Any, Any]]:
    """Give the package, and a connection by which nothing can be changed."""
    try:
        library: Any = importlib.import_module("libvirt")
    except ImportError as error:
        raise LibvirtMissing(str(error)) from error
    quiet_about_errors(library)
    name = f"libvirt at {uri}"
    try:
        connection = library.openReadOnly(uri)
    except library.libvirtError as error:
        raise VmUnreachable(name, message_of(error)) from error
    except ValueError as error:
        raise VmUnreachable(name, f"{uri!r} is not a URI: {error}") from error
    try:
        yield library, connection
    except library.libvirtError as error:
        raise VmUnreachable(name, message_of(error)) from error
    finally:
        with contextlib.suppress(library.libvirtError):
            connection.close()


def _disks(connection: Any) -> Iterator[DefinedDisk]:
    for domain in connection.listAllDomains():
        running = bool(domain.isActive())
        for target, layers in sorted(disks_of(domain.XMLDesc()).items()):
            if layers and layers[0].path is not None:
                yield DefinedDisk(str(domain.name()), target, str(layers[0].path), running)


def _running(library: Any, connection: Any) -> Iterator[RunningDomain]:
    # Of a domain that comes in, the other host still has the disks.
    coming = {
        library.VIR_DOMAIN_PAUSED_MIGRATION,
        library.VIR_DOMAIN_PAUSED_STARTING_UP,
        library.VIR_DOMAIN_PAUSED_POSTCOPY,
    }
    for domain in connection.listAllDomains(library.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        state, reason = domain.state()
        if state == library.VIR_DOMAIN_PAUSED and reason in coming:
            continue
        disks = {
            target: tuple(str(layer.path) for layer in layers if layer.path is not None)
            for target, layers in disks_of(domain.XMLDesc()).items()
        }
        yield RunningDomain(str(domain.name()), str(domain.UUIDString()), disks)
