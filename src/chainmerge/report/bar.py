# SPDX-License-Identifier: Apache-2.0
"""Showing on a terminal how far a merge has come."""

from __future__ import annotations

import os.path
import time
from typing import TYPE_CHECKING, Final, Self

from rich.cells import cell_len, set_cell_size
from rich.live import Live
from rich.text import Text

from chainmerge.documents.text import printable
from chainmerge.report.progress import STAGE_WORDS, Clock, Pace, amount_of, left_of

if TYPE_CHECKING:
    from rich.console import Console

    from chainmerge.documents.progress import ProgressEvent

_FEWEST_IN_BAR: Final = 8
_MOST_IN_BAR: Final = 30
_FEWEST_IN_NAME: Final = 8
_COLON: Final = ": "


class BarProgress:
    """Progress in one line, which is always that of the current stage, for a terminal."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._pace = Pace(seconds_between=0.1, clock=clock)
        # No automatic refresh: that would be a thread, and a process that is started
        # while a second thread runs may inherit locks that nobody will ever release.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, event: ProgressEvent) -> None:
        if self._pace.lets_through(event):
            self._live.update(line_of(event, self._console.width), refresh=True)


def line_of(event: ProgressEvent, width: int) -> Text:
    """Draw an event in one line of up to *width* cells.

    With little room the bar goes first, then a part of the figures, then the end of the overlay's
    name.
    """
    stage = STAGE_WORDS.get(event.stage, event.stage)
    name = printable(os.path.basename(event.top))  # noqa: PTH119 (any text)
    # The last cell of a line stays free: some terminals go to the next line after it.
    room = width - 1 - cell_len(stage)
    least = min(cell_len(name), _FEWEST_IN_NAME) + cell_len(_COLON) if name else 0
    figures = next((one for one in _figures(event) if cell_len(one) <= room - least), "")
    room -= cell_len(figures)
    line = Text(no_wrap=True, overflow="crop", end="")
    if name:
        name = set_cell_size(name, max(0, min(cell_len(name), room - cell_len(_COLON))))
        room -= cell_len(name) + cell_len(_COLON)
        line.append(f"{name}{_COLON}")
    line.append(stage)
    if event.total and room >= _FEWEST_IN_BAR:
        cells = min(room, _MOST_IN_BAR) - 1
        full = cells * min(event.done, event.total) // event.total
        line.append(f" {'━' * full}", "cyan").append("━" * (cells - full), "dim")
    line.append(figures)
    line.truncate(width - 1)
    return line


def _figures(event: ProgressEvent) -> tuple[str, ...]:
    """How far a stage has come, and how fast it goes; with less and less said."""
    if not event.total:
        return ()
    left = left_of(event)
    behind = f", {left}" if left else ""
    percent = f" {100 * event.done // event.total} %"
    amount = f" {amount_of(event)}"
    return f"{amount}{behind}", f"{percent}{behind}", percent
