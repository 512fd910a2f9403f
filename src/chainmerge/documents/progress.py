# SPDX-License-Identifier: Apache-2.0
"""The stages of a merge or of a scan, and how far one has come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from msgspec import Struct


class Stage(StrEnum):
    """What a merge is doing, in the order in which it happens; then what a scan is."""

    LOCK = "lock"
    WAIT = "wait"
    PLAN = "plan"
    SNAPSHOTS = "snapshots"
    HIDE = "hide"
    PRUNE = "prune"
    EXTEND = "extend"
    COPY = "copy"
    READ_BACK = "read-back"
    BITMAPS = "bitmaps"
    VERIFY = "verify"
    SETTLE = "settle"
    FIND = "find"
    IMAGES = "images"
    CHAINS = "chains"


COUNTED: Final[Mapping[Stage, str]] = MappingProxyType(
    {Stage.FIND: "file", Stage.IMAGES: "image", Stage.CHAINS: "chain"}
)
"""Stages of a scan, and what they deal with in place of bytes."""


class ProgressEvent(Struct, frozen=True):
    """How far a stage has come.

    Attributes:
        stage: What is going on.
        done: Bytes dealt with so far; of the stages of a scan (``find``, ``images``, ``chains``)
            files, images and chains.
        total: Bytes to deal with, or as above; 0 for a stage without a measure.
        rate: Recent rate of this stage in bytes per second; 0 if it is not known. In a running
            VM *total* can grow, so that *done* and *total* alone say little of what remains.
        top: The overlay that is merged, where several disks are; else empty.
    """

    stage: Stage
    done: int = 0
    total: int = 0
    rate: int = 0
    top: str = ""


OnProgress = Callable[[ProgressEvent], None]
ShouldStop = Callable[[], bool]


def never() -> bool:
    """In place of ``should_stop`` where nobody asks for it."""
    return False


def unheard(_event: ProgressEvent) -> None:
    """In place of ``on_progress`` where nobody listens."""
