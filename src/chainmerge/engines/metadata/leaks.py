# SPDX-License-Identifier: Apache-2.0
"""Giving back clusters that are marked used and that nothing uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.engines.metadata.preconditions import require_clean_bits, require_sound_report
from chainmerge.engines.metadata.refcount_blocks import Write, refcount_writes
from chainmerge.engines.metadata.steps import Port, Step, StepName, execute
from chainmerge.qcow2.check import check_with_references
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.refcounts import (
    U64Array,
    read_refcount_table,
    read_refcounts,
    refcounts_per_block,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.engines.metadata.allocation import Clusters
    from chainmerge.qcow2.references import ReferenceCounts

_CLUSTERS_AT_ONCE = 1 << 20


def reclaim_leaks(port: Port) -> int:
    """Set stored refcounts down to what the image's tables use; the number of clusters freed.

    Only ever frees what no table refers to, so an interruption leaves fewer leaks than
    before and nothing else. Left alone are clusters whose refcount of 2 or more should be
    1: their COPIED flags would have to change at the same instant. Only a deletion of an
    internal snapshot that was interrupted leaves such, and 'qemu-img check -r leaks' mends
    them.

    Raises:
        ImageDirty, ImageCorrupt, ImageDamaged: the image must be repaired first.
        RewriteFailed: some of the leaked clusters are left.
    """
    image = Qcow2Image(port)
    require_clean_bits(image)
    report, references = check_with_references(image)
    require_sound_report(report)
    table = read_refcount_table(image)
    reclaimed = 0

    def lowered() -> Iterator[Write]:
        nonlocal reclaimed
        for clusters, refcounts in _leaked(image, table, references):
            reclaimed += len(clusters)
            yield from refcount_writes(port, image.header, table, clusters, refcounts)

    execute(port, [Step(StepName.RELEASE, lowered)])
    return reclaimed


def _leaked(
    image: Qcow2Image, table: U64Array, references: ReferenceCounts
) -> Iterator[tuple[Clusters, U64Array]]:
    """Leaked clusters, ascending, and the refcounts that they should have.

    All refcount blocks are gone through, also for what lies behind the end of the file:
    such clusters would turn up as leaks once the file grows over them.
    """
    per_block = refcounts_per_block(image.header)
    at_once = max(1, _CLUSTERS_AT_ONCE // per_block)
    for index in np.unique(np.flatnonzero(table) // at_once).tolist():
        first = index * at_once * per_block
        count = min(at_once, len(table) - index * at_once) * per_block
        stored = read_refcounts(image, first, count)
        used = references.of(first, count)
        leaked = np.flatnonzero((stored > used) & (used != 1))
        yield leaked + first, used[leaked]
