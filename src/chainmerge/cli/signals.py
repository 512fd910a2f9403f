# SPDX-License-Identifier: Apache-2.0
"""Being told to stop: by Ctrl-C, by a service manager, by a terminal that hangs up."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOTICE: Final = b"\nstopping at the next safe point; the same command finishes the job later\n"


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Make every request to stop the ``KeyboardInterrupt`` that Ctrl-C is."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """Note a request to stop instead of interrupting the work in progress.

    Gives a function that says whether there was one. However often the user presses
    Ctrl-C, the work stops at a safe point and nowhere else.
    """
    requested = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            return
        # First of all: the next signal may come while the notice is being written.
        requested = True
        # Not through sys.stderr: the signal may have come while that is being written.
        with suppress(OSError):
            os.write(2, _NOTICE)

    with _handled_by(note):
        yield lambda: requested


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _STOPPING}
    # What was ignored when we started (nohup, a background job) stays ignored.
    ours = [number for number in _STOPPING if before[number] is not signal.SIG_IGN]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
