# SPDX-License-Identifier: Apache-2.0
"""Two backends that live through the same history and must not differ.

With the one in memory as the first, real images are compared bit by bit with a model that
shares no code with what writes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.checkpoints import BitmapState
from tests.model.disk_history import Backend, HistoryViolated, MergeRequest, StoredBitmap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class BackendsDiffer(HistoryViolated):
    """The two backends disagree about an image."""


class Lockstep:
    """A backend over two; what is read comes from the second, after comparison."""

    def __init__(self, first: Backend, second: Backend) -> None:
        self._both = (first, second)

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

    def merge(self, request: MergeRequest, at_moment: Callable[[], None]) -> bool:
        # In the middle of a merge the two are not at the same point, so nobody looks.
        first, second = (backend.merge(request, lambda: None) for backend in self._both)
        if first != second:
            msg = f"one merged {request.top} into {request.base}, the other refused to"
            raise BackendsDiffer(msg)
        return second

    def bitmaps(self, image: str) -> Mapping[str, StoredBitmap]:
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
