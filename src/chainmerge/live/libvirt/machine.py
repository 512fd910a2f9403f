# SPDX-License-Identifier: Apache-2.0
"""A running domain of libvirt with all its disks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.live.libvirt.connection import DEFAULT_URI, DomainConnection
from chainmerge.live.libvirt.description import disks_of, read_only_targets
from chainmerge.live.libvirt.disk import DomainDisk
from chainmerge.live.port import GuestDisk

if TYPE_CHECKING:
    from typing import Self


class Domain:
    """A running domain; a context manager.

    Args:
        name: the domain's name.
        uri: of the libvirt to connect to.

    Raises LibvirtMissing, VmUnreachable, NoSuchDomain.
    """

    def __init__(self, name: str, uri: str = DEFAULT_URI) -> None:
        self._connection = DomainConnection(uri, name)
        self._name, self._uri = name, uri

    def __enter__(self) -> Self:
        """Return the domain itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect; the domain goes on with whatever it does."""
        self._connection.close()

    @property
    def name(self) -> str:
        """The domain, as messages call it."""
        return self._connection.name

    def disk(self, target: str) -> DomainDisk:
        """The disk with that target, as ``vda``, over a connection of its own.

        Raises NoSuchDisk, VmUnreachable.
        """
        return DomainDisk(self._name, target, self._uri)

    def disks(self) -> tuple[GuestDisk, ...]:
        """The disks that the guest has.

        Raises VmUnreachable, VmRefused.
        """
        connection = self._connection
        described = connection.ask("virDomainGetXMLDesc", connection.domain.XMLDesc)
        read_only = read_only_targets(described)
        return tuple(
            GuestDisk(target, _unsuited(is_empty=not layers, is_read_only=target in read_only))
            for target, layers in disks_of(described).items()
        )


def _unsuited(*, is_empty: bool, is_read_only: bool) -> str | None:
    if is_empty:
        return "it has no medium"
    return "it is read-only" if is_read_only else None
