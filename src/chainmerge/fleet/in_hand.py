# SPDX-License-Identifier: Apache-2.0
"""A job in its worker's hands, from when it is claimed until it has ended or is put back."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.fleet.child import files_of
from chainmerge.fleet.ledger import StopReason
from chainmerge.fleet.places import keys_on
from chainmerge.fleet.record import FLEET_KEY
from chainmerge.fleet.windows import is_open

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainmerge.fleet.child import Child
    from chainmerge.fleet.record import JobRecord
    from chainmerge.fleet.scan_record import ScanRecord
    from chainmerge.fleet.settings import HostSettings


class JobInHand:
    """What the worker and its ledger know of it."""

    def __init__(self, job: int, record: JobRecord | ScanRecord, host: HostSettings) -> None:
        self.job = job
        self.record = record
        self.keys = (*keys_on(host.name, record), FLEET_KEY)
        self.priority = record.priority
        self.files = files_of(Path(host.fleet.state), job, record.label)
        self.child: Child | None = None
        self.reason: StopReason | None = None
        self._wants_keys = False
        self._answered = asyncio.Event()
        self._has_keys = False
        self._host_of_domain: str | None = None

    @property
    def waits_for_keys(self) -> bool:
        """Whether it may be given its keys now."""
        return self._wants_keys and self._window_is_open()

    @property
    def waits_for_window(self) -> bool:
        """Whether it is the time of day that keeps it from its keys."""
        return self._wants_keys and not self._window_is_open()

    @property
    def has_outrun_window(self) -> bool:
        """Whether it runs, and is to stop, as its window has ended."""
        must_stop = self.record.window_end == "stop"
        return self._has_keys and must_stop and not self._window_is_open()

    @property
    def runs(self) -> bool:
        """Whether it has its keys."""
        return self._has_keys

    def _window_is_open(self) -> bool:
        return is_open(self.record.windows, time.localtime())

    def newest_line(self) -> str:
        """How far it is."""
        return self.files.newest_line()

    async def given_keys(self, wake: Callable[[], None]) -> bool:
        """Wait for the keys; whether they were given before it was to stop."""
        if self.reason is None:
            self._answered.clear()
            self._wants_keys = True
            wake()
            await self._answered.wait()
            self._wants_keys = False
        return self._has_keys

    def grant(self) -> None:
        """Give it its keys, if it still wants them."""
        if self._wants_keys:
            self._has_keys = True
            self._wants_keys = False
            self._answered.set()

    def give_up_keys(self) -> None:
        """Note that it has them no more."""
        self._has_keys = False

    async def found_domain(self, patience: float) -> str | None:
        """Wait until some host says that it runs the domain.

        Return its name; None if none does in so many seconds, or the job is to stop before.
        """
        self._answered.clear()
        self._host_of_domain = None
        if self.reason is None:
            try:
                await asyncio.wait_for(self._answered.wait(), patience)
            except TimeoutError:
                return None
        return self._host_of_domain

    def domain_is_on(self, host: str) -> None:
        """Say which host runs its domain."""
        self._host_of_domain = host
        self._answered.set()

    def stop(self, reason: StopReason) -> None:
        """Ask it to stop, at the next safe point if it merges."""
        if self.reason in {StopReason.CANCELLED, StopReason.OVER}:
            return
        self.reason = reason
        self._answered.set()
        if self.child is not None:
            self.child.stop()
