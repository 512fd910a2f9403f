# SPDX-License-Identifier: Apache-2.0
"""A transfer that says how far it is with reading back, and how long it took to copy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from chainmerge.documents.progress import ProgressEvent, Stage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chainmerge.documents.progress import OnProgress
    from chainmerge.storage.transfer.pieces import Item, OnBytes, Transfer


class ReportedTransfer:
    """See :class:`chainmerge.storage.transfer.pieces.Transfer`.

    Attributes:
        copy_seconds: How long it took from the beginning until all was written and flushed; 0
            before that.
    """

    def __init__(self, transfer: Transfer, report: OnProgress) -> None:
        """Begin, and tell *report* once something is read back."""
        self._transfer = transfer
        self._report = report
        self._started = time.monotonic()
        self.copy_seconds = 0.0

    @property
    def bytes_to_read_back(self) -> int:
        """See :class:`~chainmerge.storage.transfer.pieces.Transfer`."""
        return self._transfer.bytes_to_read_back

    def move(self, items: Iterable[Item]) -> None:
        """See :class:`~chainmerge.storage.transfer.pieces.Transfer`."""
        self._transfer.move(items)

    def verify(self, on_progress: OnBytes | None = None) -> None:
        """See :class:`~chainmerge.storage.transfer.pieces.Transfer`."""
        self.copy_seconds = time.monotonic() - self._started
        total = self.bytes_to_read_back

        def compared(done: int) -> None:
            self._report(ProgressEvent(Stage.READ_BACK, done, total))
            if on_progress is not None:
                on_progress(done)

        if total:
            self._report(ProgressEvent(Stage.READ_BACK, 0, total))
        self._transfer.verify(compared)

    def close(self) -> None:
        """See :class:`~chainmerge.storage.transfer.pieces.Transfer`."""
        self._transfer.close()
