# SPDX-License-Identifier: Apache-2.0
"""Which clusters a rewrite may free: those that nothing but the old bitmaps used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.arithmetic.distinct import distinct, distinct_with_counts
from chainmerge.arithmetic.rounding import divide_up
from chainmerge.engines.metadata.allocation import slices_by
from chainmerge.qcow2.bitmaps import (
    TABLE_ALL_ONES,
    TABLE_ENTRY_SIZE,
    BitmapEntry,
    read_directory,
    read_table,
)
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.refcounts import read_refcounts, refcounts_per_block
from chainmerge.qcow2.runs import NO_CLUSTERS

if TYPE_CHECKING:
    from collections.abc import Collection

    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.qcow2.runs import Clusters


def bitmap_clusters(image: Qcow2Image, staying: Collection[str] = ()) -> Clusters:
    """Clusters of the directory, the tables and the data of the image's bitmaps.

    Those of the bitmaps named by *staying* are left out, except for the directory.

    Ascending, with repetitions where something is used twice. Empty if the autoclear
    bit does not vouch for the bitmaps, or where they cannot be read to the end: what they
    used is leaked then, and told from what is in use by recomputing the refcounts.
    """
    return _bitmap_clusters(image, staying) if image.header.bitmaps_trusted else NO_CLUSTERS


def void_bitmap_clusters(image: Qcow2Image) -> Clusters:
    """Clusters of bitmaps for which the autoclear bit does not vouch, ascending, each once.

    Some may be in use for something else by now. Empty if the bitmaps cannot be read to the
    end.
    """
    return NO_CLUSTERS if image.header.bitmaps_trusted else distinct(_bitmap_clusters(image, ()))


def _bitmap_clusters(image: Qcow2Image, staying: Collection[str]) -> Clusters:
    extension = image.header.bitmaps
    if extension is None:
        return NO_CLUSTERS
    try:
        entries = read_directory(image)
        parts = [_span(extension.directory_offset, extension.directory_size, image)]
        for entry in entries:
            if entry.name not in staying:
                parts += _clusters_of(image, entry)
    except FormatError:
        return NO_CLUSTERS
    return np.sort(np.concatenate(parts))


def _clusters_of(image: Qcow2Image, entry: BitmapEntry) -> list[Clusters]:
    table = _span(entry.table_offset, entry.table_size * TABLE_ENTRY_SIZE, image)
    offsets = read_table(image, entry)
    stored = offsets[offsets > TABLE_ALL_ONES] // np.uint64(image.header.cluster_size)
    return [table, stored.astype(np.int64)]


def refcount_table_clusters(image: Qcow2Image) -> Clusters:
    """Clusters of the refcount table itself."""
    header = image.header
    length = header.refcount_table_clusters * header.cluster_size
    return _span(header.refcount_table_offset, length, image)


def used_once(image: Qcow2Image, clusters: Clusters) -> Clusters:
    """Those of *clusters* (ascending) that are there once and have a stored refcount of 1."""
    values, counts = distinct_with_counts(clusters)
    single = values[counts == 1]
    kept = [NO_CLUSTERS]
    per_block = refcounts_per_block(image.header)
    for part in slices_by(single, per_block):
        group = single[part]
        low = int(group[0])
        refcounts = read_refcounts(image, low, int(group[-1]) - low + 1)
        kept.append(group[refcounts[group - low] == 1])
    return np.concatenate(kept)


def _span(offset: int, length: int, image: Qcow2Image) -> Clusters:
    cluster_size = image.header.cluster_size
    first = offset // cluster_size
    return np.arange(first, divide_up(offset + length, cluster_size), dtype=np.int64)
