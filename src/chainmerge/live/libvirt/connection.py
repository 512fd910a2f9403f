# SPDX-License-Identifier: Apache-2.0
"""The connection to libvirt, and its errors in our words.

The package ``libvirt`` is asked for when a domain is, and not before: it is an optional part
(``pip install chainmerge[libvirt]``).
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any, Final

from chainmerge.live.errors import LibvirtMissing, NoSuchDomain, VmRefused, VmUnreachable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

DEFAULT_URI: Final = "qemu:///system"


class DomainConnection:
    """A running domain of a libvirt; a context manager.

    Attributes:
        name: What messages call it.
        library: The module ``libvirt``, for its constants.
        domain: Its ``virDomain``, to be used in what is handed to :meth:`ask`.

    Raises:
        LibvirtMissing: the Python package is not there.
        VmUnreachable: libvirt does not answer.
        NoSuchDomain: there is no such domain, or it does not run.
    """

    def __init__(self, uri: str, domain: str) -> None:
        self.name = f"domain {domain}"
        try:
            self.library: Any = importlib.import_module("libvirt")
        except ImportError as error:
            raise LibvirtMissing(str(error)) from error
        quiet_about_errors(self.library)
        try:
            self._connection: Any = self.library.open(uri)
        except self.library.libvirtError as error:
            raise VmUnreachable(self.name, message_of(error)) from error
        except ValueError as error:
            raise VmUnreachable(self.name, f"{uri!r} is not a URI: {error}") from error
        try:
            self.domain: Any = self._running(domain)
        except BaseException:
            self.close()
            raise

    def _running(self, domain: str) -> Any:  # the package has no types
        try:
            found = self._looked_up(domain)
            if found is not None and found.isActive():
                return found
            only_running = self.library.VIR_CONNECT_LIST_DOMAINS_ACTIVE
            running = [each.name() for each in self._connection.listAllDomains(only_running)]
        except self.library.libvirtError as error:
            raise VmUnreachable(self.name, message_of(error)) from error
        raise NoSuchDomain(domain, ", ".join(sorted(running)) or "none")

    def _looked_up(self, domain: str) -> Any:
        """The domain, whether or not it runs; None where there is no such one."""
        try:
            return self._connection.lookupByName(domain)
        except self.library.libvirtError as error:
            if error.get_error_code() != self.library.VIR_ERR_NO_DOMAIN:
                raise
        except ValueError:
            # A name with a NUL, or with what is no text.
            pass
        return None

    def __enter__(self) -> Self:
        """Return the connection itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """As :meth:`close`."""
        self.close()

    def close(self) -> None:
        """Disconnect; the domain goes on with whatever it does."""
        with contextlib.suppress(self.library.libvirtError):
            self._connection.close()

    def ask(self, what: str, request: Callable[[], Any]) -> Any:
        """Have libvirt do something, and return its answer.

        Args:
            what: What it is, for messages: the name of the call.
            request: Does it.

        Raises:
            VmUnreachable: libvirt, or the domain, is gone.
            VmRefused: it answered with an error.
        """
        try:
            return request()
        except self.library.libvirtError as error:
            if self._is_gone(error):
                raise VmUnreachable(self.name, message_of(error)) from error
            raise VmRefused(self.name, what, message_of(error)) from error

    def domain_stats(self) -> dict[str, Any]:
        """What libvirt counts for the domain's disks, all layers of them included."""
        library = self.library
        flags = library.VIR_CONNECT_GET_ALL_DOMAINS_STATS_BACKING
        answer = self.ask(
            "virDomainListGetStats",
            lambda: self._connection.domainListGetStats(
                [self.domain], library.VIR_DOMAIN_STATS_BLOCK, flags
            ),
        )
        return dict(answer[0][1]) if answer else {}

    def _is_gone(self, error: Any) -> bool:
        library = self.library
        if error.get_error_code() in (library.VIR_ERR_NO_DOMAIN, library.VIR_ERR_NO_CONNECT):
            return True
        try:
            return not self._connection.isAlive() or not self.domain.isActive()
        except library.libvirtError:
            return True


def quiet_about_errors(library: Any) -> None:
    """Have the module ``libvirt`` raise errors only; by default it prints each as well."""
    library.registerErrorHandler(_ignored, None)


def _ignored(_context: object, _error: object) -> None:
    """Errors are raised as well."""


def message_of(error: Any) -> str:
    """What an error of libvirt says."""
    return str(error.get_error_message() or error)
