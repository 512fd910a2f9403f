# SPDX-License-Identifier: Apache-2.0
"""What of a merge its time depends on: where its images lie, and how much there is to do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.storage.storage_names import storage_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.plan import MergePlan


class Effort(Struct, frozen=True):
    """What a merge has to do: guest bytes to copy, clusters and tables to allocate."""

    bytes_copied: int
    clusters: int


def effort_of(plan: MergePlan) -> Effort:
    """What a merge by a plan has to do."""
    movement = plan.movement
    return Effort(plan.bytes_copied, movement.new_clusters + movement.new_l2_tables)


def storages_of(plan: MergePlan) -> str | None:
    """The storage of the image that is written, and what is read from elsewhere.

    None if one of them is not known.
    """
    names = dict.fromkeys(map(storage_name, dict.fromkeys(_places(plan))))
    if None in names:
        return None
    return " from ".join(name for name in names if name is not None)


def _places(plan: MergePlan) -> Iterator[str]:
    """The directories of files, as those stay, and devices; that of the result first."""
    for path in (plan.result, *(image.path for image in plan.merged_images)):
        real = os.path.realpath(path)
        yield real if real.startswith("/dev/") else os.path.dirname(real)  # noqa: PTH120
