# SPDX-License-Identifier: Apache-2.0
"""The disks of all domains of a libvirt, running or not; over a connection that only reads."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from chainmerge.documents.scan import DefinedDisk
from chainmerge.live.errors import LibvirtMissing, VmUnreachable
from chainmerge.live.libvirt.connection import DEFAULT_URI, message_of, quiet_about_errors
from chainmerge.live.libvirt.description import disks_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def domain_disks(uri: str = DEFAULT_URI) -> tuple[DefinedDisk, ...]:
    """The active image of each disk that is a file or a block device, of all domains.

    Of a domain that does not run, its next start counts.

    Args:
        uri: of libvirt.

    Raises:
        LibvirtMissing: the Python package is not there.
        VmUnreachable: libvirt does not answer.
    """
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
        return tuple(_disks(connection))
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
