# SPDX-License-Identifier: Apache-2.0
"""The public functions, in one place; the command line is a thin layer over them."""

from __future__ import annotations

from chainmerge.bitmap_ops import (
    bitmaps_add,
    bitmaps_clear,
    bitmaps_list,
    bitmaps_merge,
    bitmaps_remove,
    prune,
)
from chainmerge.catalogue import explain
from chainmerge.information import inspect
from chainmerge.merging import measure, merge, plan
from chainmerge.repairing import check_image, repair
from chainmerge.unfinished import status

__all__ = [
    "bitmaps_add",
    "bitmaps_clear",
    "bitmaps_list",
    "bitmaps_merge",
    "bitmaps_remove",
    "check_image",
    "explain",
    "inspect",
    "measure",
    "merge",
    "plan",
    "prune",
    "repair",
    "status",
]
