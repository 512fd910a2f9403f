# SPDX-License-Identifier: Apache-2.0
"""Faults of storage under a logical volume that is in use, and whose names stay as they are."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.support.qemu import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECTOR: Final = 512
# What flakey calls its down time, in seconds: longer than any test.
_FOR_EVER: Final = 100_000


@dataclass(frozen=True)
class Patient:
    """A logical volume with room for a fault between it and its storage.

    Attributes:
        name: in the device mapper, such as ``vg-base``.
        sectors: of the volume.
    """

    name: str
    sectors: int

    @property
    def _below(self) -> str:
        return f"{self.name}-below"

    def sicken(self, table: str) -> None:
        """Put a table in place of the volume's own; ``{below}`` in it is the good device."""
        table = table.format(below=f"/dev/mapper/{self._below}", sectors=self.sectors)
        # Not to flush: what is cached meets the fault, as it would on a device that goes bad.
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.name)
        run("dmsetup", "load", self.name, "--table", table)
        run("dmsetup", "resume", self.name)

    def heal(self) -> None:
        """Give it its storage back."""
        self.sicken("0 {sectors} linear {below} 0")


@contextmanager
def patient(name: str) -> Iterator[Patient]:
    """A volume that can be made sick, well again when the block is left."""
    original = run("dmsetup", "table", name).stdout.strip()
    sectors = sum(int(line.split()[1]) for line in original.splitlines())
    made = Patient(name, sectors)
    run("dmsetup", "create", f"{name}-below", "--table", original)
    try:
        made.heal()
        yield made
    finally:
        made.sicken(original)
        run("dmsetup", "remove", "--retry", f"{name}-below")


def fails_between(start: int, end: int, sectors: int) -> str:
    """Everything fails in a range of sectors, as on a medium that is damaged there."""
    return _in_range(start, end, sectors, "error")


def writes_fail_between(start: int, end: int, sectors: int) -> str:
    target = f"flakey {{below}} {start} 0 {_FOR_EVER} 1 error_writes"
    return _in_range(start, end, sectors, target)


def _in_range(start: int, end: int, sectors: int, target: str) -> str:
    pieces = [(0, start, "linear {below} 0"), (start, end, target)]
    pieces.append((end, sectors, f"linear {{below}} {end}"))
    return "\n".join(f"{at} {to - at} {what}" for at, to, what in pieces if to > at)


def everything_fails() -> str:
    return "0 {sectors} error"


def writes_fail() -> str:
    return _flakey("error_writes")


def writes_are_lost() -> str:
    """They are reported as done; so are flushes."""
    return _flakey("drop_writes")


def writes_are_corrupted(byte: int, value: int) -> str:
    """In each write that is so long one byte (counted from 1) gets a value."""
    return _flakey("corrupt_bio_byte", str(byte), "w", str(value), "0")


def _flakey(*features: str) -> str:
    words: Sequence[str] = ("flakey", "{below}", "0", "0", str(_FOR_EVER), str(len(features)))
    return " ".join(("0 {sectors}", *words, *features))
