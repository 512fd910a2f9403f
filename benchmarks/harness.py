# SPDX-License-Identifier: Apache-2.0
"""Measuring two commands against each other."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CHAINMERGE: Final = (sys.executable, "-m", "chainmerge")
_KIB: Final = 1024


@dataclass(frozen=True, slots=True)
class Run:
    """What a command took: seconds on the clock, and bytes of memory at its largest."""

    seconds: float
    memory: int


@dataclass(frozen=True, slots=True)
class Contender:
    """One side of a comparison.

    Attributes:
        name: What the report calls it.
        commands: What is run and measured, one after the other.
        prepare: Run before each round and not measured.
        statuses: Exit statuses that mean that the work was done.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    prepare: Callable[[], None]
    statuses: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs of ours and theirs, in pairs: the machine was as busy for one as for the other."""

    title: str
    ours: tuple[Run, ...]
    theirs: tuple[Run, ...]

    @property
    def ratio(self) -> float:
        """Our time divided by theirs: the median of the pairs."""
        pairs = zip(self.ours, self.theirs, strict=True)
        return statistics.median(ours.seconds / theirs.seconds for ours, theirs in pairs)


Benchmark = Callable[[Path, int], Comparison]


def compare(title: str, ours: Contender, theirs: Contender, rounds: int) -> Comparison:
    """Run both sides *rounds* times, in turns, after one round that does not count."""
    _measure(ours), _measure(theirs)
    pairs = [(_measure(ours), _measure(theirs)) for _ in range(rounds)]
    return Comparison(title, tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def nothing_to_prepare() -> None:
    """For commands that leave everything as it was."""


def _measure(contender: Contender) -> Run:
    contender.prepare()
    runs = [_run(command, contender.statuses) for command in contender.commands]
    return Run(sum(run.seconds for run in runs), max(run.memory for run in runs))


def _run(command: tuple[str, ...], statuses: tuple[int, ...]) -> Run:
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        # wait4 is the one way to learn the memory of this process and of no other.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in statuses:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}")
    return Run(time.monotonic() - started, usage.ru_maxrss * _KIB)
