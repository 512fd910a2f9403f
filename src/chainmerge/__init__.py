# SPDX-License-Identifier: Apache-2.0
"""Merge snapshots of virtual disks: qcow2 backing chains, with their dirty bitmaps.

>>> import chainmerge
>>> plan = chainmerge.plan("/images/disk-snap1.qcow2")          # doctest: +SKIP
>>> report = chainmerge.merge("/images/disk-snap1.qcow2")       # doctest: +SKIP

Every function raises :class:`chainmerge.errors.ChainmergeError` only. The functions are loaded on
first use, so ``import chainmerge`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from chainmerge.__about__ import __version__

if TYPE_CHECKING:
    from chainmerge.api import (
        bitmaps_add,
        bitmaps_clear,
        bitmaps_list,
        bitmaps_merge,
        bitmaps_remove,
        bitmaps_remove_all,
        bitmaps_repair,
        cancel,
        check_image,
        explain,
        find_backing,
        flatten,
        flatten_disks,
        inspect,
        measure,
        merge,
        merge_disks,
        plan,
        plan_bitmaps_repair,
        plan_disks,
        plan_flatten,
        plan_flatten_disks,
        plan_repair,
        prune,
        relink,
        repair,
        status,
        undo_repair,
    )
    from chainmerge.errors import ChainmergeError
    from chainmerge.options import Access, MergeOptions

__all__ = [
    "Access",
    "ChainmergeError",
    "MergeOptions",
    "__version__",
    "bitmaps_add",
    "bitmaps_clear",
    "bitmaps_list",
    "bitmaps_merge",
    "bitmaps_remove",
    "bitmaps_remove_all",
    "bitmaps_repair",
    "cancel",
    "check_image",
    "explain",
    "find_backing",
    "flatten",
    "flatten_disks",
    "inspect",
    "measure",
    "merge",
    "merge_disks",
    "plan",
    "plan_bitmaps_repair",
    "plan_disks",
    "plan_flatten",
    "plan_flatten_disks",
    "plan_repair",
    "prune",
    "relink",
    "repair",
    "status",
    "undo_repair",
]

_ELSEWHERE = {
    "Access": "chainmerge.options",
    "MergeOptions": "chainmerge.options",
    "ChainmergeError": "chainmerge.errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "chainmerge.api")), name)
