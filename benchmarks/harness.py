# SPDX-License-Identifier: Apache-2.0
"""Measuring commands against each other."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from benchmarks import measured
from benchmarks.caches import can_drop_caches, drop_caches

CHAINMERGE: Final = (sys.executable, "-m", "chainmerge")
# Without site-packages: it has to be small.
_MEASURED: Final = (sys.executable, "-I", "-S", measured.__file__)
# Python keeps what it compiled, as on any machine that programs are installed on: the first
# round, which does not count, compiles.
# No plan of this host's own merges is to be drawn from what is measured here.
_STATE: Final = Path(__file__).parent.parent / "build" / "bench-state"
ENVIRONMENT: Final = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    "XDG_STATE_HOME": str(_STATE),
}


class CommandFailed(Exception):
    """A command that was to be measured exited with a status that it should not have."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a contender took.

    Attributes:
        seconds: On the clock.
        memory: Bytes that its largest process had at its largest.
        cpu: Seconds of CPU time, user and system.
    """

    seconds: float
    memory: int
    cpu: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a contender has no figures."""

    message: str


Outcome = tuple[Run, ...] | Failure


def nothing() -> None:
    """For commands that leave everything as it was, and results that need no check."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of doing the job.

    Attributes:
        name: What the report calls it.
        commands: What is run and measured, one after the other.
        prepare: Run before each round and not measured.
        statuses: Exit statuses that mean that the work was done.
        check: Run once, after the round that does not count: raises if the result is wrong.
        call: Does the job in place of the commands, in a process that runs already.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    prepare: Callable[[], None] = nothing
    statuses: tuple[int, ...] = (0,)
    check: Callable[[], None] = nothing
    call: Callable[[], Run] | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """What our side must not exceed."""

    cpu: float | None = None
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row of the report.

    Attributes:
        title: The job.
        ours: Our runs.
        peer: The peer's way of doing the job; empty where there is none.
        theirs: The peer's runs, each in the same round as ours: the machine was as busy.
        copy: Plain copies of as many bytes, in the same rounds.
        limit: What ours must not exceed.
    """

    title: str
    ours: Outcome
    peer: str = ""
    theirs: Outcome | None = None
    copy: Outcome | None = None
    limit: Limit = field(default_factory=Limit)

    @property
    def ratios(self) -> list[float]:
        """Our time divided by theirs, pair by pair; empty where there are no pairs."""
        return _quotients(self.ours, self.theirs)

    @property
    def share_of_copy(self) -> float | None:
        """Our throughput as a share of that of a plain copy: the median of the pairs."""
        shares = _quotients(self.copy, self.ours)
        return statistics.median(shares) if shares else None


@dataclass(frozen=True, slots=True)
class Settings:
    """What every benchmark is given.

    Attributes:
        scratch: A directory of its own, empty.
        rounds: How many pairs of runs count.
        engine: chainmerge's engine.
        note: Told what is going on.
    """

    scratch: Path
    rounds: int
    engine: str
    note: Callable[[str], None]

    def merge(self, top: Path, *options: str) -> tuple[str, ...]:
        """The command line of a merge of *top*."""
        return (*CHAINMERGE, "merge", "--engine", self.engine, *options, str(top))

    def plan(self, top: Path) -> tuple[str, ...]:
        """The command line of the plan for a merge of *top*."""
        return (*CHAINMERGE, "plan", "--engine", self.engine, str(top))


class Benchmark(Protocol):
    """Builds its images, and yields rows of the report."""

    __name__: str

    def __call__(self, settings: Settings, /) -> Iterable[Comparison]: ...


def run_rounds(
    settings: Settings,
    contenders: Sequence[Contender],
    *,
    load_programs: Callable[[], None] | None,
) -> Mapping[str, Outcome]:
    """Run all contenders in turns, the order reversed every other time.

    The first round does not count: it is where results are checked, and where files below
    loop devices get their blocks.

    Args:
        settings: Says how many rounds.
        contenders: Names must differ.
        load_programs: Called when the caches have been dropped, to have the programs in
            memory again but not the images; None to leave the caches alone.
    """
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    failures: dict[str, Failure] = {}
    for number in range(settings.rounds + 1):
        for contender in contenders[:: -1 if number % 2 else 1]:
            if contender.name in failures:
                continue
            settings.note(f"round {number} of {settings.rounds}: {contender.name}")
            contender.prepare()
            if load_programs is not None and can_drop_caches():
                drop_caches()
                load_programs()
            try:
                run = _measure(contender)
            except CommandFailed as error:
                failures[contender.name] = Failure(str(error))
                continue
            if number == 0:
                contender.check()
            else:
                runs[contender.name].append(run)
    return {name: failures.get(name, tuple(counted)) for name, counted in runs.items()}


def _quotients(dividends: Outcome | None, divisors: Outcome | None) -> list[float]:
    if not isinstance(dividends, tuple) or not isinstance(divisors, tuple):
        return []
    pairs = zip(dividends, divisors, strict=True)
    return [dividend.seconds / divisor.seconds for dividend, divisor in pairs]


def _measure(contender: Contender) -> Run:
    if contender.call is not None:
        return contender.call()
    runs = [_run(command, contender.statuses) for command in contender.commands]
    return Run(
        seconds=sum(run.seconds for run in runs),
        memory=max(run.memory for run in runs),
        cpu=sum(run.cpu for run in runs),
    )


def _run(command: tuple[str, ...], statuses: tuple[int, ...]) -> Run:
    result = subprocess.run(
        (*_MEASURED, *command),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=ENVIRONMENT,
    )
    if result.returncode != 0:
        raise CommandFailed(result.stderr.strip())
    status, seconds, memory, cpu = result.stdout.split()
    if int(status) not in statuses:
        raise CommandFailed(f"exit {status}: {' '.join(result.stderr.split())}")
    return Run(float(seconds), int(memory), float(cpu))
