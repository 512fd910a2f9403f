# SPDX-License-Identifier: Apache-2.0
"""Checksums of what was written, kept small, and in which order they are best compared."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from chainmerge.storage.transfer.pieces import ReadBack

if TYPE_CHECKING:
    from collections.abc import Iterator


class Checksum(NamedTuple):
    """Of *length* bytes at offset *target*; *value* is what :func:`checksum_of` says of them."""

    target: int
    length: int
    value: int


def checksum_of(data: bytes | memoryview) -> int:
    """64 bits by which to tell whether bytes are still what they were. Never stored.

    XXH3, which takes a tenth of the time of CRC-32 and lets other threads run meanwhile. It finds
    storage that fails; nobody can forge anything here but the guest, and only its own data.
    """
    return xxh3_64_intdigest(data)


class Ledger:
    """The checksums of everything that was written, 20 bytes for each."""

    def __init__(self, read_back: ReadBack) -> None:
        """Begin with none, and keep none if nothing will be compared."""
        self._read_back = read_back
        self._targets = array("Q")
        self._lengths = array("I")
        self._values = array("Q")

    @property
    def total_bytes(self) -> int:
        """How many bytes the checksums are of."""
        return sum(self._lengths)

    def checksums_of(self, target: int, data: bytes | memoryview) -> tuple[Checksum, ...]:
        """What there is to record of *data*; may be called in any thread."""
        if self._read_back is ReadBack.OMITTED:
            return ()
        return (Checksum(target, len(data), checksum_of(data)),)

    def record(self, checksum: Checksum) -> None:
        """Keep a checksum."""
        self._targets.append(checksum.target)
        self._lengths.append(checksum.length)
        self._values.append(checksum.value)

    def record_zeros(self, target: int, length: int, step: int) -> None:
        """Keep that a range is zeros, in pieces of *step* bytes."""
        if self._read_back is ReadBack.OMITTED:
            return
        value = checksum_of(bytes(min(step, length)))
        for done in range(0, length, step):
            size = min(step, length - done)
            if size < step and done:
                value = checksum_of(bytes(size))
            self.record(Checksum(target + done, size, value))

    def in_target_order(self) -> Iterator[Checksum]:
        """All of them, so that the target is read from its beginning to its end."""
        # Copies: an array cannot grow while somebody looks into it.
        targets = np.array(self._targets, dtype=np.uint64)
        for index in np.argsort(targets, kind="stable"):
            yield Checksum(self._targets[index], self._lengths[index], self._values[index])

    def runs(self, limit: int) -> Iterator[list[Checksum]]:
        """All of them in target order, those of up to *limit* bytes without a gap together."""
        run: list[Checksum] = []
        end = 0
        for checksum in self.in_target_order():
            together = checksum.target + checksum.length - run[0].target if run else 0
            if run and (checksum.target != end or together > limit):
                yield run
                run = []
            run.append(checksum)
            end = checksum.target + checksum.length
        if run:
            yield run
