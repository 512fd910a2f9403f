# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks whose names contain one of the given words, or all of them."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from benchmarks import merges, plans

if TYPE_CHECKING:
    from benchmarks.harness import Benchmark, Comparison, Run

BENCHMARKS: Final[tuple[Benchmark, ...]] = (
    plans.plan_of_preallocated_metadata,
    merges.merge_of_dense_data,
    merges.merge_of_scattered_clusters,
    merges.prune_of_stale_bitmaps,
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of the names of benchmarks")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs (default 5)")
    arguments = parser.parse_args()

    table = Table("", "ours", "theirs", "ours / theirs", "our memory", "their memory")
    for benchmark in BENCHMARKS:
        name: str = getattr(benchmark, "__name__", "")
        if arguments.words and not any(word in name for word in arguments.words):
            continue
        with tempfile.TemporaryDirectory(prefix="chainmerge-bench-") as scratch:
            table.add_row(*_row(benchmark(Path(scratch), arguments.rounds)))
    Console(highlight=False).print(table)
    return 0


def _row(comparison: Comparison) -> tuple[str, ...]:
    return (
        comparison.title,
        _seconds(comparison.ours),
        _seconds(comparison.theirs),
        f"{comparison.ratio:.2f}",
        _memory(comparison.ours),
        _memory(comparison.theirs),
    )


def _seconds(runs: tuple[Run, ...]) -> str:
    return f"{statistics.median(run.seconds for run in runs):.2f} s"


def _memory(runs: tuple[Run, ...]) -> str:
    return f"{max(run.memory for run in runs) >> 20} MiB"


if __name__ == "__main__":
    sys.exit(main())
