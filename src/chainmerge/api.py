# SPDX-License-Identifier: Apache-2.0
"""The public functions, in one place; the command line is a thin layer over them.

They raise only errors of ours: whatever the operating system reports is turned into one here.

Each is loaded, with what it needs, on first use: a merge does not wait for the tools that work on
bitmaps.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from chainmerge.storage.boundary import at_the_boundary

if TYPE_CHECKING:
    from chainmerge.bitmaps.editing import (
        bitmaps_add,
        bitmaps_clear,
        bitmaps_merge,
        bitmaps_remove,
        bitmaps_remove_all,
    )
    from chainmerge.bitmaps.listing import bitmaps_list, bitmaps_list_disks
    from chainmerge.bitmaps.pruning import prune, prune_disks, prune_whole_disks
    from chainmerge.catalogue import explain
    from chainmerge.chain.disk_map import disk_map
    from chainmerge.chain.information import inspect
    from chainmerge.inventory.overview import list_chains
    from chainmerge.inventory.pictures import picture_chain, picture_chains
    from chainmerge.inventory.scan import scan
    from chainmerge.inventory.tables import save_scan
    from chainmerge.inventory.thin_out import thin_out
    from chainmerge.inventory.thinning import plan_thin_out
    from chainmerge.live.libvirt.domains import domain_disks
    from chainmerge.merging.disks import merge_disks, plan_disks
    from chainmerge.merging.flattening import (
        flatten,
        flatten_disks,
        plan_flatten,
        plan_flatten_disks,
    )
    from chainmerge.merging.merge import merge
    from chainmerge.planning.dry_run import measure, plan
    from chainmerge.records.unfinished import status
    from chainmerge.repairing.bitmap_repair import bitmaps_repair, plan_bitmaps_repair
    from chainmerge.repairing.cancelling import cancel
    from chainmerge.repairing.checking import check_image
    from chainmerge.repairing.mending import plan_repair, repair, undo_repair
    from chainmerge.repairing.relinking import find_backing, relink

__all__ = [
    "bitmaps_add",
    "bitmaps_clear",
    "bitmaps_list",
    "bitmaps_list_disks",
    "bitmaps_merge",
    "bitmaps_remove",
    "bitmaps_remove_all",
    "bitmaps_repair",
    "cancel",
    "check_image",
    "disk_map",
    "domain_disks",
    "explain",
    "find_backing",
    "flatten",
    "flatten_disks",
    "inspect",
    "list_chains",
    "measure",
    "merge",
    "merge_disks",
    "picture_chain",
    "picture_chains",
    "plan",
    "plan_bitmaps_repair",
    "plan_disks",
    "plan_flatten",
    "plan_flatten_disks",
    "plan_repair",
    "plan_thin_out",
    "prune",
    "prune_disks",
    "prune_whole_disks",
    "relink",
    "repair",
    "save_scan",
    "scan",
    "status",
    "thin_out",
    "undo_repair",
]

_MODULES: Final = MappingProxyType(
    {
        "bitmaps_add": "chainmerge.bitmaps.editing",
        "bitmaps_clear": "chainmerge.bitmaps.editing",
        "bitmaps_list": "chainmerge.bitmaps.listing",
        "bitmaps_list_disks": "chainmerge.bitmaps.listing",
        "bitmaps_merge": "chainmerge.bitmaps.editing",
        "bitmaps_remove": "chainmerge.bitmaps.editing",
        "bitmaps_remove_all": "chainmerge.bitmaps.editing",
        "bitmaps_repair": "chainmerge.repairing.bitmap_repair",
        "cancel": "chainmerge.repairing.cancelling",
        "check_image": "chainmerge.repairing.checking",
        "disk_map": "chainmerge.chain.disk_map",
        "domain_disks": "chainmerge.live.libvirt.domains",
        "explain": "chainmerge.catalogue",
        "find_backing": "chainmerge.repairing.relinking",
        "flatten": "chainmerge.merging.flattening",
        "flatten_disks": "chainmerge.merging.flattening",
        "inspect": "chainmerge.chain.information",
        "list_chains": "chainmerge.inventory.overview",
        "measure": "chainmerge.planning.dry_run",
        "merge": "chainmerge.merging.merge",
        "merge_disks": "chainmerge.merging.disks",
        "picture_chain": "chainmerge.inventory.pictures",
        "picture_chains": "chainmerge.inventory.pictures",
        "plan": "chainmerge.planning.dry_run",
        "plan_bitmaps_repair": "chainmerge.repairing.bitmap_repair",
        "plan_disks": "chainmerge.merging.disks",
        "plan_flatten": "chainmerge.merging.flattening",
        "plan_flatten_disks": "chainmerge.merging.flattening",
        "plan_repair": "chainmerge.repairing.mending",
        "plan_thin_out": "chainmerge.inventory.thinning",
        "prune": "chainmerge.bitmaps.pruning",
        "prune_disks": "chainmerge.bitmaps.pruning",
        "prune_whole_disks": "chainmerge.bitmaps.pruning",
        "relink": "chainmerge.repairing.relinking",
        "repair": "chainmerge.repairing.mending",
        "save_scan": "chainmerge.inventory.tables",
        "scan": "chainmerge.inventory.scan",
        "status": "chainmerge.records.unfinished",
        "thin_out": "chainmerge.inventory.thin_out",
        "undo_repair": "chainmerge.repairing.mending",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return at_the_boundary(getattr(importlib.import_module(_MODULES[name]), name))
