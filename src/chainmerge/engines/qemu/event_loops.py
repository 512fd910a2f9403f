# SPDX-License-Identifier: Apache-2.0
"""Our event loops beside those of callers: a thread runs one at a time."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, ParamSpec, TypeVar

    P = ParamSpec("P")
    T = TypeVar("T")


class SynchronousLoop:
    """An event loop of our own, run step by step from synchronous code; a context manager.

    Also where the caller's code runs in an event loop itself: the step is taken in a thread
    then, and the caller's loop waits for it, as it does for everything that we do.
    """

    def __init__(self) -> None:
        """Make the loop; it runs only while :meth:`run` does."""
        self._runner = asyncio.Runner()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* to its end, as if it were a synchronous call.

        Raises what *work* raises.
        """
        return _beside_other_loops(self._runner.run, work)

    def __enter__(self) -> Self:
        """Return the loop."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs in the loop, and close it."""
        _beside_other_loops(self._runner.close)


def _beside_other_loops(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function(*arguments, **options)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments, **options).result()
