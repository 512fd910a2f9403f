# SPDX-License-Identifier: Apache-2.0
"""The rows of the report, as a table for the terminal or in Markdown."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from rich.table import Table

from benchmarks.images import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.harness import Comparison, Outcome, Run

_COLUMNS: Final = (
    *("", "peer", "ours", "peer's", "ours / peer's", "of a direct copy's speed"),
    *("our memory", "peer's memory", "our CPU", "peer's CPU", "limit"),
)
_NOT_MEASURED: Final = "-"


def table(comparisons: Iterable[Comparison]) -> Table:
    """For the terminal."""
    result = Table(*_COLUMNS)
    for comparison in comparisons:
        result.add_row(*_cells(comparison))
    return result


def markdown(comparisons: Iterable[Comparison]) -> str:
    """For docs/performance.md."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *map(_cells, comparisons)]
    return "\n".join(f"| {' | '.join(_escaped(row))} |" for row in rows)


def failures(comparisons: Iterable[Comparison]) -> list[str]:
    """What went wrong, a line each; the tables have no room for it."""
    return [
        f"{comparison.title}: {outcome.message}"
        for comparison in comparisons
        for outcome in (comparison.ours, comparison.theirs, comparison.copy)
        if outcome is not None and not isinstance(outcome, tuple)
    ]


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


def _cells(comparison: Comparison) -> tuple[str, ...]:
    ours, theirs = comparison.ours, comparison.theirs
    share = comparison.share_of_copy
    return (
        comparison.title,
        comparison.peer or _NOT_MEASURED,
        _seconds(ours),
        _seconds(theirs),
        _ratio(comparison.ratios),
        _NOT_MEASURED if share is None else f"{share:.0%}",
        _memory(ours),
        _memory(theirs),
        _cpu(ours),
        _cpu(theirs),
        _limit(comparison),
    )


def _counted(outcome: Outcome | None) -> tuple[Run, ...]:
    return outcome if isinstance(outcome, tuple) else ()


def _seconds(outcome: Outcome | None) -> str:
    if outcome is not None and not isinstance(outcome, tuple):
        return "failed"
    return _median([run.seconds for run in _counted(outcome)])


def _cpu(outcome: Outcome | None) -> str:
    return _median([run.cpu for run in _counted(outcome)])


def _median(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s" if seconds else _NOT_MEASURED


def _ratio(ratios: list[float]) -> str:
    if not ratios:
        return _NOT_MEASURED
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _memory(outcome: Outcome | None) -> str:
    runs = _counted(outcome)
    return f"{max(run.memory for run in runs) // MIB} MiB" if runs else _NOT_MEASURED


def _limit(comparison: Comparison) -> str:
    runs = _counted(comparison.ours)
    if not runs:
        return ""
    verdicts = []
    if (cpu := comparison.limit.cpu) is not None:
        kept = statistics.median(run.cpu for run in runs) < cpu
        verdicts.append(f"CPU {cpu} s: {_verdict(kept=kept)}")
    if (memory := comparison.limit.memory) is not None:
        kept = max(run.memory for run in runs) < memory
        verdicts.append(f"memory {memory // MIB} MiB: {_verdict(kept=kept)}")
    return ", ".join(verdicts)


def _verdict(*, kept: bool) -> str:
    return "kept" if kept else "exceeded"
