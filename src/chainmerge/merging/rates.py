# SPDX-License-Identifier: Apache-2.0
"""How fast a stage of a merge goes, from how far it has come."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.documents.progress import OnProgress, ProgressEvent

_WINDOW: Final = 5.0
"""Seconds that a rate is the mean of, at most."""
_SHORTEST: Final = 0.2
"""Seconds below which nothing can be said of a rate."""


class RatesFilled:
    """Hands events on, with the rate of their stage where it can be told and nobody else did."""

    def __init__(self, report: OnProgress, clock: Callable[[], float] = time.monotonic) -> None:
        """Hand events on to *report*."""
        self._report = report
        self._clock = clock
        self._stage = ""
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, event: ProgressEvent) -> None:
        """Hand *event* on."""
        if event.stage != self._stage:
            self._stage = event.stage
            self._seen.clear()
        self._report(replace(event, rate=event.rate or self._rate_of(event)))

    def _rate_of(self, event: ProgressEvent) -> int:
        if not event.total:
            return 0
        now = self._clock()
        self._seen.append((now, event.done))
        while now - self._seen[0][0] > _WINDOW and len(self._seen) > 2:
            self._seen.popleft()
        then, done = self._seen[0]
        return int((event.done - done) / (now - then)) if now - then >= _SHORTEST else 0
