# SPDX-License-Identifier: Apache-2.0
"""Showing on a terminal how far a merge has come."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from chainmerge.report.progress import Clock, Pace, words_for
from chainmerge.report.text import rough_size

if TYPE_CHECKING:
    from rich.console import Console

    from chainmerge.documents.progress import ProgressEvent


class BarProgress:
    """Progress as one bar a stage, for a terminal."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._pace = Pace(seconds_between=0.1, clock=clock)
        # No automatic refresh: that would be a thread, and a process that is started
        # while a second thread runs may inherit locks that nobody will ever release.
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            _SpeedColumn(),
            console=console,
            auto_refresh=False,
        )
        self._stage: tuple[str, str] | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish_stage()
        self._progress.stop()

    def update(self, event: ProgressEvent) -> None:
        if not self._pace.lets_through(event):
            return
        if self._task is None or (event.stage, event.top) != self._stage:
            self._finish_stage()
            self._stage = (event.stage, event.top)
            self._task = self._progress.add_task(words_for(event), total=None, amount="")
        if event.total:
            amount = f"{rough_size(event.done)} of {rough_size(event.total)}"
            self._progress.update(
                self._task, completed=event.done, total=event.total, amount=amount
            )
        self._progress.refresh()

    def _finish_stage(self) -> None:
        if self._task is None:
            return
        # A stage without a measure is full when it is over.
        total = self._progress.tasks[self._task].total or 1
        self._progress.update(self._task, completed=total, total=total)


class _SpeedColumn(ProgressColumn):
    """How fast a stage with a measure goes, and how long it will take."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not (speed and task.fields["amount"]):
            return Text()
        remaining = "" if task.finished else f", {task.time_remaining or 0:.0f} s to go"
        return Text(f"{rough_size(speed)}/s{remaining}")
