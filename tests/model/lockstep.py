# SPDX-License-Identifier: Apache-2.0
"""Two backends that live through the same history and must not differ.

With the one in memory as the first, real images are compared bit by bit with a model that
shares no code with what writes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.rules import BitmapState
from tests.model.disk_history import (
    Backend,
    Ending,
    HistoryViolated,
    KillPoint,
    MergeRequest,
    StoredBitmap,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class BackendsDiffer(HistoryViolated):
    """The two backends disagree about an image."""


class Lockstep:
    """A backend over two; what is read comes from the second, after comparison."""

    def __init__(self, first: Backend, second: Backend) -> None:
        self._both = (first, second)
        # Where the two cannot be the same, as the second is at work there or was killed at it.
        self._spoiled: tuple[str, ...] = ()

    def create_root(self, image: str, size: int, *, holds_bitmaps: bool) -> None:
        for backend in self._both:
            backend.create_root(image, size, holds_bitmaps=holds_bitmaps)

    def create_overlay(self, image: str, backing: str, size: int) -> None:
        for backend in self._both:
            backend.create_overlay(image, backing, size)

    def delete(self, image: str) -> None:
        for backend in self._both:
            backend.delete(image)

    def write(self, image: str, start: int, count: int, value: int) -> None:
        for backend in self._both:
            backend.write(image, start, count, value)

    def add_bitmap(self, image: str, name: str, granularity: int) -> None:
        for backend in self._both:
            backend.add_bitmap(image, name, granularity)

    def remove_bitmap(self, image: str, name: str) -> None:
        for backend in self._both:
            backend.remove_bitmap(image, name)

    def disable_bitmap(self, image: str, name: str) -> None:
        for backend in self._both:
            backend.disable_bitmap(image, name)

    def crash(self, image: str) -> None:
        for backend in self._both:
            backend.crash(image)

    def write_and_crash(self, image: str, start: int, count: int, value: int) -> None:
        for backend in self._both:
            backend.write_and_crash(image, start, count, value)

    def merge(self, request: MergeRequest, at_moment: Callable[[], None]) -> bool:
        before = self._spoiled
        # The first has not even begun.
        self._spoiled = (*request.chain, *request.above)
        merged = self._both[1].merge(request, at_moment)
        self._follow(request, merged=merged)
        self._spoiled = () if merged else before
        return merged

    def merge_and_kill(self, request: MergeRequest, point: KillPoint) -> Ending:
        ending = self._both[1].merge_and_kill(request, point)
        if ending is Ending.KILLED:
            # To the first nothing has happened, and when the second has finished nobody
            # must see that to the second something had.
            self._spoiled = (request.base, *request.between)
        else:
            self._follow(request, merged=ending is Ending.FINISHED)
        if ending is Ending.FINISHED:
            self._spoiled = ()
        return ending

    def _follow(self, request: MergeRequest, *, merged: bool) -> None:
        if self._both[0].merge(request, lambda: None) != merged:
            msg = f"one merged {request.top} into {request.base}, the other refused to"
            raise BackendsDiffer(msg)

    def backing(self, image: str) -> str | None:
        first, second = (backend.backing(image) for backend in self._both)
        if first != second and not self._spoiled:
            msg = f"{image} stands on {first} and on {second}"
            raise BackendsDiffer(msg)
        return second

    def bitmaps(self, image: str) -> Mapping[str, StoredBitmap]:
        if image in self._spoiled:
            return self._both[1].bitmaps(image)
        first, second = (backend.bitmaps(image) for backend in self._both)
        if _meaning(first) != _meaning(second):
            msg = f"bitmaps of {image} differ: {dict(first)} and {dict(second)}"
            raise BackendsDiffer(msg)
        return second

    def content(self, image: str) -> tuple[int, ...]:
        first, second = (backend.content(image) for backend in self._both)
        if first != second:
            msg = f"content of {image} differs: {first} and {second}"
            raise BackendsDiffer(msg)
        return second


def _meaning(bitmaps: Mapping[str, StoredBitmap]) -> dict[str, StoredBitmap | BitmapState]:
    """What must be the same: of a bitmap that nobody may read, only that it is there."""
    return {
        name: bitmap if bitmap.state is BitmapState.VALID else bitmap.state
        for name, bitmap in bitmaps.items()
    }
