# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks whose names contain one of the given words, or all of them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from benchmarks import (
    bitmaps,
    chains,
    file_systems,
    many,
    plans,
    predictions,
    report,
    scans,
    scattered,
    startup,
    volumes,
)
from benchmarks.caches import can_drop_caches
from benchmarks.harness import Comparison, Failure, Settings
from tests.support import machine
from tests.support.qemu import ToolFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.harness import Benchmark

BENCHMARKS: Final[tuple[Benchmark, ...]] = (
    startup.start,
    startup.merge_of_an_empty_overlay,
    volumes.merge_with_stale_bitmaps,
    bitmaps.prune_of_stale_bitmaps,
    scattered.scattered,
    scattered.sequential,
    file_systems.scattered_on_xfs,
    file_systems.scattered_on_btrfs,
    chains.chain_of_300,
    chains.chain_of_1000,
    many.eight_disks,
    many.ten_thousand_merges,
    plans.plan_of_1_tib,
    plans.plan_of_1_tib_shuffled,
    plans.plan_of_10_tib,
    plans.plan_of_10_tib_shuffled,
    scans.scan_of_ten_thousand_images,
    predictions.prediction,
)
# Ignored by git, and on the disk that the repository is on: /tmp may be in memory.
_BUILD: Final = Path(__file__).parent.parent / "build"


def _means(word: str, benchmark: Benchmark) -> bool:
    """Whether *word* names the benchmark, as a whole or, if it is no name itself, in part."""
    whole = any(word == one.__name__ for one in BENCHMARKS)
    return word == benchmark.__name__ if whole else word in benchmark.__name__


def main() -> int:
    arguments = _arguments()
    chosen = [
        benchmark
        for benchmark in BENCHMARKS
        if not arguments.words or any(_means(word, benchmark) for word in arguments.words)
    ]
    if arguments.list:
        for benchmark in chosen:
            print(f"{benchmark.__name__:28}{benchmark.__doc__}")
        return 0

    log = Console(stderr=True, highlight=False, markup=False)
    log.print("\n".join(machine.capabilities()))
    if not can_drop_caches():
        log.print("caches cannot be dropped (not root): images are read from memory")
    rows = [
        row
        for benchmark in chosen
        for row in _rows(benchmark, arguments, partial(log.print, f"{benchmark.__name__}:"))
    ]
    if arguments.markdown:
        print(report.markdown(rows))
    else:
        console = Console(highlight=False)
        # Narrower, rich would leave columns out.
        console.width = max(console.width, report.TABLE_WIDTH)
        console.print(report.table(rows))
    for line in report.failures(rows):
        log.print(line, style="red")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of the names of benchmarks")
    parser.add_argument("--list", action="store_true", help="print their names and stop")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs (default 5)")
    parser.add_argument("--engine", default="auto", help="chainmerge's engine (default auto)")
    parser.add_argument("--scratch", type=Path, default=_BUILD, help="where images are built")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    return parser.parse_args()


def _rows(
    benchmark: Benchmark, arguments: argparse.Namespace, note: Callable[[str], None]
) -> Iterator[Comparison]:
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.scratch) as scratch:
        settings = Settings(Path(scratch), arguments.rounds, arguments.engine, note)
        try:
            for row in benchmark(settings):
                note(report.line(row))
                yield row
        except (ToolFailed, OSError) as error:
            # The others can still be measured.
            yield Comparison(benchmark.__name__, Failure(str(error)))


if __name__ == "__main__":
    sys.exit(main())
