# SPDX-License-Identifier: Apache-2.0
"""Rewriting the metadata of a closed qcow2 image, all or nothing.

The caller holds the image's lock. ``docs/metadata-rewrite.md`` gives the order of the
writes and why it is safe to be interrupted anywhere in it.
"""

from __future__ import annotations

from chainmerge.engines.metadata.backing import change_backing
from chainmerge.engines.metadata.bitmap_set import AnyBitmap, KeptBitmap, StoredBitmap
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.metadata.preconditions import without_bitmaps
from chainmerge.engines.metadata.rebuilding import (
    clear_marks,
    count_doubles,
    plan_rebuild,
    rebuild,
)
from chainmerge.engines.metadata.replacement import (
    MetadataRewrite,
    RewriteOutcome,
    kept_where_unchanged,
    names_kept,
    plan_bitmap_set,
    replace_bitmaps,
)
from chainmerge.engines.metadata.salvage import (
    Tables,
    clusters_of_bitmap,
    directory_clusters,
    image_without_refcounts,
    overwritten_metadata,
    tables_of,
    tables_with_bitmaps,
)
from chainmerge.engines.metadata.snapshot_removal import (
    SnapshotRemoval,
    plan_snapshot_removal,
    remove_snapshots,
)
from chainmerge.engines.metadata.steps import Port

__all__ = [
    "AnyBitmap",
    "KeptBitmap",
    "MetadataRewrite",
    "Port",
    "RewriteOutcome",
    "SnapshotRemoval",
    "StoredBitmap",
    "Tables",
    "change_backing",
    "clear_marks",
    "clusters_of_bitmap",
    "count_doubles",
    "directory_clusters",
    "image_without_refcounts",
    "kept_where_unchanged",
    "names_kept",
    "overwritten_metadata",
    "plan_bitmap_set",
    "plan_rebuild",
    "plan_snapshot_removal",
    "rebuild",
    "reclaim_leaks",
    "remove_snapshots",
    "replace_bitmaps",
    "tables_of",
    "tables_with_bitmaps",
    "without_bitmaps",
]
