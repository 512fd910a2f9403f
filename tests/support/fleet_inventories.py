# SPDX-License-Identifier: Apache-2.0
"""What a fleet might know of its hosts, for tests that need no host."""

from __future__ import annotations

from chainmerge.documents.fleet_inventory import (
    FleetPictures,
    HostInventory,
    InventoryChain,
    InventoryPlace,
    OutcomeCount,
    PlaceKind,
    SharedPlace,
)
from chainmerge.documents.plan import Finding
from chainmerge.documents.trends import TrendPoint
from chainmerge.report.fleet_plan_view import FleetPlanRow, FleetPlanView, LeftOutReason

NOW = 1_800_000_000
GIB = 1 << 30


def fleet_pictures(name: str) -> FleetPictures:
    """All that a page of a fleet can have, with a name wherever one can be."""
    group = InventoryPlace(PlaceKind.VOLUME_GROUP, "uuid", name, "", False, False, None)
    chain = InventoryChain(
        leaf=name,
        base=name,
        base_id="0" * 32,
        image_ids=("0" * 32,),
        digest="0" * 32,
        images=7,
        virtual_size=9 * GIB,
        occupied_bytes=4 * GIB,
        freed_bytes=2 * GIB,
        bytes_to_copy=GIB,
        stale_bytes=GIB,
        free_bytes=GIB,
        storages=(name,),
        places=(name,),
        unfinished=True,
        in_use=True,
        domain=name,
        target="vda",
        domain_uuid=None,
        problem=name,
        refusals=(Finding(name, name, name),),
    )
    host = HostInventory(
        1, name, "0" * 32, NOW, 9, 4 * GIB, 2 * GIB, (group,), (chain,), GIB, 1, (name,)
    )
    shared = SharedPlace(PlaceKind.VOLUME_GROUP, name, (name, name), (name, name), True, True, name)
    return FleetPictures(
        version=1,
        made_at=NOW,
        hosts=(host,),
        never_scanned=(name,),
        shared=(shared,),
        outcomes=(OutcomeCount("done", 3), OutcomeCount("refused", 1)),
        trends=(TrendPoint(NOW - 9, 9, 5, 4), TrendPoint(NOW, 7, 4, 2)),
    )


def fleet_plan(name: str) -> FleetPlanView:
    """All that a page of a plan can have."""
    job = FleetPlanRow(name, name, "merge", (name, name), 7, GIB, GIB, GIB, (name,))
    return FleetPlanView(
        made_at=NOW,
        jobs=(job, job),
        left_out=(LeftOutReason("in-use", 3, name, name),),
        limits=(name,),
        warnings=(name,),
    )
