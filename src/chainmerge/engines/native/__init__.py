# SPDX-License-Identifier: Apache-2.0
"""The native engine: merges into closed qcow2 and raw images without QEMU.

``docs/native-engine.md`` gives the order of the writes, and why it is safe to be interrupted
anywhere in it.
"""

from __future__ import annotations

from chainmerge.engines.native.commit import (
    Backing,
    Commit,
    CommitOutcome,
    commit,
    cut_to_image_end,
    merged_layers,
    punch_free,
)
from chainmerge.engines.native.decisions import MappedDisk
from chainmerge.engines.native.hiding import ZerosBehind, tree_that_hides
from chainmerge.engines.native.raw import RawCommit, commit_to_raw, data_ranges
from chainmerge.engines.native.survey import (
    MappingNeed,
    NewTree,
    PlacedTree,
    new_tree,
    place_tree,
    released_clusters,
    survey_mapping,
)
from chainmerge.engines.native.zeroes import ViewWithZeroes, ZeroRanges, find_zeroes

__all__ = [
    "Backing",
    "Commit",
    "CommitOutcome",
    "MappedDisk",
    "MappingNeed",
    "NewTree",
    "PlacedTree",
    "RawCommit",
    "ViewWithZeroes",
    "ZeroRanges",
    "ZerosBehind",
    "commit",
    "commit_to_raw",
    "cut_to_image_end",
    "data_ranges",
    "find_zeroes",
    "merged_layers",
    "new_tree",
    "place_tree",
    "punch_free",
    "released_clusters",
    "survey_mapping",
    "tree_that_hides",
]
