# SPDX-License-Identifier: Apache-2.0
"""Keeps base's volume ahead of what is written to it while a job runs.

A logical volume is extended before it is full: QEMU tells when base's file is written to behind
a threshold, which lies below the end by what is written in a few seconds. QEMU asks the kernel
for the size of a block device with every write, so nobody has to tell it of the new one (checked
with 7.2: host_device on a device that grew).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from msgspec import Struct, field

from chainmerge.arithmetic.rounding import round_up
from chainmerge.live.port import WatchedVm
from chainmerge.storage.volume_facts import VolumeKind
from chainmerge.storage.volumes import Volume

# How many seconds of writing an extension is to be ahead of.
LEAD_SECONDS: Final = 10.0
# What is written at once at most: 16 requests of 1 MiB, and tables.
LEAST_MARGIN: Final = 32 << 20
_SMOOTHING: Final = 0.5
# A write that did not fit is not among those that count as the highest one.
_REQUESTS: Final = 2 << 20


class Headroom(Struct):
    """The space between what is written of base's volume and its end.

    Attributes:
        vm: the VM.
        node: the protocol node of base.
        volume: what base lies on.
        clock: seconds, from anywhere.
        extensions: how often the volume was extended so far.
    """

    vm: WatchedVm
    node: str
    volume: Volume
    clock: Callable[[], float] = time.monotonic
    extensions: int = 0
    _wider: int = 1
    _rate: float = 0.0
    _seen: tuple[float, int] | None = field(default=None)
    _threshold: int = 0

    @property
    def grows(self) -> bool:
        """Whether the volume can be extended at all. A file grows by itself."""
        return self.volume.kind is VolumeKind.LVM

    def keep(self) -> None:
        """Look at what has been written, and extend the volume where its end comes near.

        Where it cannot be had, nothing happens yet: there may be enough.

        Raises:
            Failed, OutcomeUnknown: extending went wrong.
        """
        if not self.grows:
            return
        highest = self.vm.highest_write(self.node)
        self._observe(highest)
        facts = self.volume.facts()
        margin = self._margin(facts.growth_unit)
        if highest + margin > facts.size:
            wanted = facts.size + margin
            limit = facts.capacity_limit
            target = wanted if limit is None else min(wanted, limit)
            if target > facts.size:
                self._grow(target)
        self._watch(max(self.volume.size - margin, 1))

    def widen(self) -> None:
        """Be ahead by twice as much from here on, as it was not enough."""
        self._wider *= 2

    @property
    def is_full(self) -> bool:
        """Whether no more than a request or two was left at the highest write so far."""
        if self.volume.kind is VolumeKind.FILE:
            return False
        return self.vm.highest_write(self.node) + _REQUESTS > self.volume.size

    def make_room(self) -> None:
        """Extend a volume that is full.

        Raises:
            CannotGrow: there is nothing left.
            Failed, OutcomeUnknown: extending went wrong.
        """
        facts = self.volume.facts()
        refusal = facts.refusal(facts.size + self._margin(facts.growth_unit))
        least = facts.refusal(facts.size + facts.growth_unit)
        if least is not None:
            raise least
        limit = facts.capacity_limit
        target = facts.size + self._margin(facts.growth_unit)
        self._grow(target if refusal is None or limit is None else limit)

    def _grow(self, target: int) -> None:
        self.volume.grow_to(target)
        self.volume.make_growth_durable()
        self.extensions += 1

    def _margin(self, unit: int) -> int:
        wanted = max(int(self._rate * LEAD_SECONDS), LEAST_MARGIN) * self._wider
        return round_up(wanted, unit)

    def _observe(self, highest: int) -> None:
        now = self.clock()
        if self._seen is not None:
            before, was = self._seen
            if now - before < 0.1:
                return
            rate = max(highest - was, 0) / (now - before)
            self._rate += _SMOOTHING * (rate - self._rate)
        self._seen = (now, highest)

    def _watch(self, offset: int) -> None:
        if offset != self._threshold:
            self.vm.set_write_threshold(self.node, offset)
            self._threshold = offset
