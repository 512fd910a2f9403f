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

_FIGURES: Final = (
    *("time", "peer's time", "time / peer's", "speed / copy's"),
    *("memory", "peer's memory", "CPU", "peer's CPU"),
)
_COLUMNS: Final = ("", "peer", *_FIGURES, "limit")
_FIGURE_WIDTH: Final = 9
TABLE_WIDTH: Final = 128
_NOT_MEASURED: Final = "-"


def table(comparisons: Iterable[Comparison]) -> Table:
    """For the terminal: what is text goes into the first column, for the others have no room."""
    result = Table()
    result.add_column("", min_width=24)
    for column in _FIGURES:
        result.add_column(column, justify="right", width=_FIGURE_WIDTH)
    for comparison in comparisons:
        title, peer, *figures, limit = _cells(comparison)
        against = f"against {peer}" if comparison.peer else ""
        limited = f"limit: {limit}" if limit else ""
        result.add_row("\n".join(filter(None, (title, against, limited))), *figures)
        result.add_section()
    return result


def markdown(comparisons: Iterable[Comparison]) -> str:
    """For docs/performance.md."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *map(_cells, comparisons)]
    return "\n".join(f"| {' | '.join(_escaped(row))} |" for row in rows)


def line(comparison: Comparison) -> str:
    """What is known already, for those who wait or give up waiting."""
    title, peer, *figures, limit = _cells(comparison)
    named = (f"{name} {figure}" for name, figure in zip(_FIGURES, figures, strict=True))
    return "; ".join(filter(None, (f"{title} (against {peer})", *named, limit)))


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
    median = f"{statistics.median(ratios):.2f}"
    return median if len(ratios) == 1 else f"{median} ({min(ratios):.2f} to {max(ratios):.2f})"


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
