# SPDX-License-Identifier: Apache-2.0
"""How large base must be, so that no step of a merge by QEMU runs out of space.

Pure arithmetic on counts and tables; nothing here reads or writes an image.

- ``clusters``: which clusters of a file are free, and who takes which;
- ``arrivals``: which clusters and tables base gets from the data that moves;
- ``need``: the safe upper bound over all steps of a merge.
"""

from __future__ import annotations

from chainmerge.planning.space.arrivals import (
    Arrivals,
    BaseFacts,
    MappedRuns,
    count_arrivals,
    growth_obstacle,
    may_detect_zeroes,
)
from chainmerge.planning.space.clusters import (
    NO_RUNS,
    Clusters,
    HostLayout,
    Runs,
    layout_of,
    united,
)
from chainmerge.planning.space.need import (
    BitmapShape,
    MergeDemand,
    SpaceNeed,
    raw_space_need,
    space_need,
)

__all__ = [
    "NO_RUNS",
    "Arrivals",
    "BaseFacts",
    "BitmapShape",
    "Clusters",
    "HostLayout",
    "MappedRuns",
    "MergeDemand",
    "Runs",
    "SpaceNeed",
    "count_arrivals",
    "growth_obstacle",
    "layout_of",
    "may_detect_zeroes",
    "raw_space_need",
    "space_need",
    "united",
]
