# SPDX-License-Identifier: Apache-2.0
"""The public functions, in one place; the command line is a thin layer over them.

They raise errors of ours only: what else the operating system has to say becomes one here.

Each is loaded with what it needs when it is first used: a merge does not wait for the tools
that work on bitmaps.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from chainmerge.boundary import at_the_boundary

if TYPE_CHECKING:
    from chainmerge.bitmap_ops import (
        bitmaps_add,
        bitmaps_clear,
        bitmaps_list,
        bitmaps_merge,
        bitmaps_remove,
        bitmaps_remove_all,
        prune,
    )
    from chainmerge.catalogue import explain
    from chainmerge.checking import check_image
    from chainmerge.flattening import flatten, flatten_disks, plan_flatten, plan_flatten_disks
    from chainmerge.information import inspect
    from chainmerge.merging import measure, merge, plan
    from chainmerge.relinking import find_backing, relink
    from chainmerge.repairing import plan_repair, repair, undo_repair
    from chainmerge.several_disks import merge_disks, plan_disks
    from chainmerge.unfinished import status

__all__ = [
    "bitmaps_add",
    "bitmaps_clear",
    "bitmaps_list",
    "bitmaps_merge",
    "bitmaps_remove",
    "bitmaps_remove_all",
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

_MODULES: Final = MappingProxyType(
    {
        "bitmaps_add": "chainmerge.bitmap_ops",
        "bitmaps_clear": "chainmerge.bitmap_ops",
        "bitmaps_list": "chainmerge.bitmap_ops",
        "bitmaps_merge": "chainmerge.bitmap_ops",
        "bitmaps_remove": "chainmerge.bitmap_ops",
        "bitmaps_remove_all": "chainmerge.bitmap_ops",
        "check_image": "chainmerge.checking",
        "explain": "chainmerge.catalogue",
        "find_backing": "chainmerge.relinking",
        "flatten": "chainmerge.flattening",
        "flatten_disks": "chainmerge.flattening",
        "inspect": "chainmerge.information",
        "measure": "chainmerge.merging",
        "merge": "chainmerge.merging",
        "merge_disks": "chainmerge.several_disks",
        "plan": "chainmerge.merging",
        "plan_disks": "chainmerge.several_disks",
        "plan_flatten": "chainmerge.flattening",
        "plan_flatten_disks": "chainmerge.flattening",
        "plan_repair": "chainmerge.repairing",
        "prune": "chainmerge.bitmap_ops",
        "relink": "chainmerge.relinking",
        "repair": "chainmerge.repairing",
        "status": "chainmerge.unfinished",
        "undo_repair": "chainmerge.repairing",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return at_the_boundary(getattr(importlib.import_module(_MODULES[name]), name))
