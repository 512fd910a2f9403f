# SPDX-License-Identifier: Apache-2.0
"""When the next piece of a transfer may begin, and whether it may."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from chainmerge.errors import Interrupted

if TYPE_CHECKING:
    from chainmerge.storage.transfer.pieces import IsToStop

# How long a request to stop can go unnoticed while waiting.
_LONGEST_NAP_SECONDS: Final = 0.1


class Pacing:
    """Keeps a transfer to its bandwidth, and ends it when its caller wants to stop."""

    def __init__(self, should_stop: IsToStop, bandwidth: int | None) -> None:
        """Begin with nothing used up.

        Args:
            should_stop: Asked before every piece, and while waiting.
            bandwidth: Bytes per second; None for as many as possible.
        """
        self._should_stop = should_stop
        self._bandwidth = bandwidth
        self._next_turn = time.monotonic()
        self._nap = threading.Event()

    def wait_for_turn(self, length: int) -> None:
        """Return when a piece of *length* bytes may begin; 0 for one that counts for nothing.

        Raises:
            Interrupted: the caller wants to stop.
        """
        self._raise_if_stopped()
        if self._bandwidth is None or length == 0:
            return
        while (left := self._next_turn - time.monotonic()) > 0:
            self._nap.wait(min(left, _LONGEST_NAP_SECONDS))
            self._raise_if_stopped()
        # What was not used earlier is lost: the limit is there for others on the same storage.
        self._next_turn = max(self._next_turn, time.monotonic()) + length / self._bandwidth

    def _raise_if_stopped(self) -> None:
        if self._should_stop():
            raise Interrupted("not all of the guest data was copied")
