# SPDX-License-Identifier: Apache-2.0
"""One manager at a time drives the merges into an image.

A VM can have several monitors, and a merge that is carried on by two would be told everything
twice. A name among the abstract sockets of this machine belongs to one process, and is free the
moment that is gone, however it went.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING

from chainmerge.live.errors import LiveMergeDriven

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.records.identity import ImageIdentity


@contextlib.contextmanager
def sole_manager(base: ImageIdentity) -> Iterator[None]:
    """Be the only one that drives a merge into *base*.

    Raises:
        LiveMergeDriven: somebody else does.
    """
    kind, number, birth = base.key
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(f"\0chainmerge-live/{kind}/{number}/{birth}"[:100])
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise LiveMergeDriven(base.path) from error
        yield
