# SPDX-License-Identifier: Apache-2.0
"""What base needs at most for a merge by the QEMU of a running VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from chainmerge.arithmetic.distinct import distinct
from chainmerge.arithmetic.rounding import divide_up
from chainmerge.engines.metadata.old_tree import bitmap_clusters
from chainmerge.options import Placement
from chainmerge.planning.leaks import counted_as_used, find_leaks, leaked_before
from chainmerge.planning.space.arrivals import BaseFacts, qemu_growth_obstacle
from chainmerge.planning.space.figures import SpaceSurvey, facts_of_need, without_figures
from chainmerge.planning.space.need import BitmapShape, MergeDemand, space_need
from chainmerge.planning.space.qemu import (
    allocated_by_qemu,
    arrivals_in_base,
    backing_size,
    end_obstacle,
    host_layout,
)
from chainmerge.planning.space.raw import survey_raw
from chainmerge.qcow2.check import check_with_references
from chainmerge.qcow2.runs import runs_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.planning.space.arrivals import Arrivals
    from chainmerge.qcow2.header import Header


def survey_for_live(
    target: Target, opened: OpenChain, stale: frozenset[str], stored: Sequence[BitmapShape]
) -> SpaceSurvey:
    """Work out how large base must be for a copy by the QEMU of a running VM.

    That QEMU does all of it: it removes the stale bitmaps, and when base is closed it stores the
    others beside what they have taken so far. An upper bound for data that is on disk already;
    the guest can add to it.

    Args:
        target: the merge.
        opened: its images.
        stale: names of base's bitmaps that are removed.
        stored: the bitmaps that base has in the end.
    """
    base = opened.images[target.base_index]
    top_size = target.chain.top.virtual_size
    if base.image is None:
        size_after = max(base.info.virtual_size, top_size)
        return survey_raw(target, opened, size_after, shares=False)
    image = base.image
    report, references = check_with_references(image)
    if not report.sound:
        return without_figures(report, None)
    # Nobody gives back what is leaked while a VM has the image open.
    leaks = find_leaks(image, report, references, leaked_before(base.info.real_path))
    layout = host_layout(image, counted_as_used(references, leaks.leaked).counts)
    about = BaseFacts(image.name, image.header, backing_size(target), layout.shared)
    obstacle = qemu_growth_obstacle(about, top_size) or end_obstacle(image, about, top_size)
    if obstacle is not None:
        return without_figures(report, obstacle)
    arrivals = arrivals_in_base(target, opened, about)
    staying = [name for name in base.entries if name not in stale]
    freed = bitmap_clusters(image, staying) if stale else np.zeros(0, dtype=np.int64)
    demand = MergeDemand(
        header=image.header,
        layout=layout,
        old_bitmaps=runs_of(distinct(freed)),
        prunes=bool(stale),
        stand_ins=(),
        final_bitmaps=tuple(stored),
        arrivals=arrivals,
        virtual_size_after=max(image.header.virtual_size, top_size),
    )
    space = facts_of_need(space_need(demand))
    slack = _slack_for_removals(image.header, arrivals, len(freed)) if stale else 0
    space = replace(
        space,
        required=space.required + slack,
        breakdown={**space.breakdown, **({"removals": slack} if slack else {})},
        new_clusters=arrivals.likely_clusters,
        new_l2_tables=arrivals.l2_tables,
    )
    space = replace(space, allocates=allocated_by_qemu(target, opened, space))
    return SpaceSurvey({Placement.IN_PLACE: space}, {}, report, None, leaks)


def _slack_for_removals(header: Header, arrivals: Arrivals, freed: int) -> int:
    """Bytes that removing bitmaps one by one takes, where *freed* clusters become free.

    Each removal writes a directory beside the one before, into what was freed. The last one cuts
    a run of free clusters in two, and the first of these can end too early for a request.
    """
    directory = 0 if header.bitmaps is None else header.bitmaps.directory_size
    wasted = min(arrivals.largest - 1, freed)
    return (2 * divide_up(directory, header.cluster_size) + wasted) * header.cluster_size
