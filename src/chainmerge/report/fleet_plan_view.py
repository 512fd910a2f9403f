# SPDX-License-Identifier: Apache-2.0
"""What people are shown of a fleet's plan. Sizes are in bytes."""

from __future__ import annotations

from msgspec import Struct


class FleetPlanRow(Struct, frozen=True):
    """A job that is planned.

    Attributes:
        host: Whose worker will do it.
        vm: Whose disks they are; None if that is not known.
        action: What it does.
        tops: The images merged, one of each disk.
        images: Of the longest chain.
        hidden_bytes: What merging frees.
        bytes_to_copy: What it copies.
        free_bytes: What is free where the result is written.
        storages: The shared storages that it needs.
    """

    host: str
    vm: str | None
    action: str
    tops: tuple[str, ...]
    images: int | None
    hidden_bytes: int | None
    bytes_to_copy: int | None
    free_bytes: int | None
    storages: tuple[str, ...]


class LeftOutReason(Struct, frozen=True):
    """Why chains have no job: a code, how many, and an example."""

    code: str
    chains: int
    example: str
    reason: str


class FleetPlanView(Struct, frozen=True):
    """A plan of a fleet.

    Attributes:
        made_at: When it was made, in seconds since 1970.
        jobs: In their order.
        left_out: Why other chains have none, most of them first.
        limits: What may hold a key, in words.
        warnings: What whoever submits it should know.
    """

    made_at: int
    jobs: tuple[FleetPlanRow, ...]
    left_out: tuple[LeftOutReason, ...]
    limits: tuple[str, ...]
    warnings: tuple[str, ...]
