# SPDX-License-Identifier: Apache-2.0
"""Giving back clusters that are marked used and that nothing uses.

Which of them may be given back is for :mod:`chainmerge.planning.leaks` to say: nothing but the
refcount keeps what they hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from chainmerge.arithmetic.distinct import distinct
from chainmerge.engines.metadata.preconditions import require_clean_bits, require_sound_report
from chainmerge.engines.metadata.refcount_blocks import Write, refcount_writes
from chainmerge.engines.metadata.steps import Port, Step, StepName, write_steps
from chainmerge.qcow2.check import check_with_references
from chainmerge.qcow2.gather import read_pieces
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import COMPRESSED, OFFSET_MASK
from chainmerge.qcow2.refcounts import read_refcount_table, read_refcounts, refcounts_per_block
from chainmerge.qcow2.runs import Runs, without_runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.arithmetic.arrays import BoolArray, U64Array
    from chainmerge.qcow2.references import Counts, ReferenceCounts
    from chainmerge.qcow2.runs import Clusters

_CLUSTERS_AT_ONCE = 1 << 20
_TABLE_BYTES_AT_ONCE = 4 << 20
# Host offsets have 56 bits, and no cluster is smaller than a sector.
_MOST_CLUSTERS: Final = 1 << 47

EVERYWHERE: Final = Runs(np.zeros(1, dtype=np.int64), np.full(1, _MOST_CLUSTERS, dtype=np.int64))
"""All clusters that an image can have, and what lies behind its end."""


def everywhere_but(kept: Runs) -> Runs:
    """All clusters but *kept*, which is ascending."""
    return without_runs(EVERYWHERE, kept)


def with_kept(counts: Counts, kept: Runs) -> Counts:
    """The same refcounts, but at least 1 for clusters that are *kept* though nothing uses them."""
    raised = counts.copy()
    for start, end in zip(kept.start.tolist(), kept.end.tolist(), strict=True):
        part = raised[start:end]
        part[part == 0] = 1
    return raised


def reclaim_leaks(port: Port, within: Runs = EVERYWHERE) -> int:
    """Set stored refcounts down to what the image's tables use; the number of clusters freed.

    Only those of clusters *within* (ascending), whatever else is leaked.

    Only ever frees what no table refers to, so an interruption leaves fewer leaks than
    before and nothing else. Left alone are clusters whose refcount of 2 or more should be
    1 where it is the active tables that name them, by a plain entry: its COPIED flag would
    have to change at the same instant. Only a deletion of an internal snapshot that was
    interrupted leaves such, and a rebuilding of all refcounts mends them. A snapshot's entries
    and those of compressed clusters have no such flag.

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
        for clusters, refcounts in _leaked(image, table, references, within):
            reclaimed += len(clusters)
            yield from refcount_writes(port, image.header, table, clusters, refcounts)

    write_steps(port, [Step(StepName.RELEASE, lowered)])
    return reclaimed


def _leaked(
    image: Qcow2Image, table: U64Array, references: ReferenceCounts, within: Runs
) -> Iterator[tuple[Clusters, U64Array]]:
    """Leaked clusters *within*, ascending, and the refcounts that they should have.

    All refcount blocks are gone through, also for what lies behind the end of the file:
    such clusters would turn up as leaks once the file grows over them.
    """
    per_block = refcounts_per_block(image.header)
    at_once = max(1, _CLUSTERS_AT_ONCE // per_block)
    for index in distinct(np.flatnonzero(table) // at_once).tolist():
        first = index * at_once * per_block
        count = min(at_once, len(table) - index * at_once) * per_block
        stored = read_refcounts(image, first, count)
        used = references.of(first, count)
        leaked = np.flatnonzero(stored > used)
        leaked = leaked[are_within(leaked + first, within)]
        single = leaked[used[leaked] == 1]
        if len(single):
            flagged = single[_named_plainly(image, single + first)]
            leaked = np.setdiff1d(leaked, flagged, assume_unique=True)
        yield leaked + first, used[leaked]


def are_within(clusters: Clusters, runs: Runs) -> BoolArray:
    """Which of *clusters* lie in *runs*, which are ascending."""
    if not len(runs.start):
        return np.zeros(len(clusters), dtype=np.bool_)
    at = np.searchsorted(runs.start, clusters, "right") - 1
    inside: BoolArray = (at >= 0) & (clusters < runs.end[at])
    return inside


def _named_plainly(image: Qcow2Image, clusters: Clusters) -> BoolArray:
    """Which of *clusters* (ascending) the active tables name by entries with a COPIED flag."""
    header = image.header
    named = np.zeros(len(clusters), dtype=np.bool_)

    def mark(offsets: U64Array) -> None:
        hosts = (offsets[offsets != 0] >> np.uint64(header.cluster_bits)).astype(np.int64)
        named[np.isin(clusters, hosts)] = True

    at_once = max(1, _TABLE_BYTES_AT_ONCE // header.cluster_size)
    for first in range(0, header.l1_size, at_once):
        tables = image.read_l1(first, first + at_once) & np.uint64(OFFSET_MASK)
        tables = tables[tables != 0]
        if not len(tables):
            continue
        mark(tables)
        words = np.frombuffer(read_pieces(image.readable, tables, header.cluster_size), ">u8")
        entries = (words[::2] if header.extended_l2 else words).astype(np.uint64)
        mark(entries[entries & np.uint64(COMPRESSED) == 0] & np.uint64(OFFSET_MASK))
    return named
