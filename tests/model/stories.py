# SPDX-License-Identifier: Apache-2.0
"""The traps, one by one: checkpoints that are broken, and whose evidence a merge removes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from tests.model.disk_history import Backend, DiskHistory

Story: TypeAlias = Callable[[Backend], DiskHistory]


def gap_goes_away(backend: Backend) -> DiskHistory:
    """cp1 is removed from the middle image only; the merge takes the gap away."""
    history = DiskHistory(backend, 8, raw_root=False)
    history.checkpoint("cp1", 1)
    history.guest_write(0, 1)
    history.snapshot()
    history.snapshot()
    history.guest_write(1, 1)
    history.remove_bitmap("image1", "cp1")
    history.merge("image0", "image1")
    return history


def disabled_occurrence_goes_away(backend: Backend) -> DiskHistory:
    """cp1 began in the middle image and is disabled there; base never knew it."""
    history = DiskHistory(backend, 8, raw_root=False)
    history.snapshot()
    history.checkpoint("cp1", 1)
    history.guest_write(0, 1)
    history.snapshot()
    history.guest_write(1, 1)
    history.disable_bitmap("image1", "cp1")
    history.merge("image0", "image1")
    return history


def crashed_occurrence_goes_away(backend: Backend) -> DiskHistory:
    """cp1 is good everywhere until somebody opens the middle image for writing and is killed."""
    history = DiskHistory(backend, 8, raw_root=False)
    history.checkpoint("cp1", 1)
    history.guest_write(0, 1)
    history.snapshot()
    history.guest_write(1, 1)
    history.snapshot()
    backend.crash("image1")
    history.merge("image0", "image1")
    return history


def top_stays_over_a_broken_base(backend: Backend) -> DiskHistory:
    history = DiskHistory(backend, 8, raw_root=False)
    history.checkpoint("cp1", 1)
    history.guest_write(0, 1)
    history.snapshot()
    history.guest_write(1, 1)
    history.disable_bitmap("image0", "cp1")
    history.merge("image0", "image1", top_stays=True)
    return history


# Each with the image in which the checkpoint must go on to fail.
STORIES: Final[tuple[tuple[Story, str], ...]] = (
    (gap_goes_away, "image2"),
    (disabled_occurrence_goes_away, "image2"),
    (crashed_occurrence_goes_away, "image2"),
    (top_stays_over_a_broken_base, "image1"),
)
