# SPDX-License-Identifier: Apache-2.0
"""Rewriting the metadata of a closed qcow2 image, all or nothing.

The caller holds the image's lock. ``docs/metadata-rewrite.md`` gives the order of the
writes and why it is safe to be interrupted anywhere in it.
"""

from __future__ import annotations

from chainmerge.engines.metadata.backing import change_backing
from chainmerge.engines.metadata.bitmap_set import AnyBitmap, KeptBitmap, StoredBitmap
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.metadata.replacement import (
    MetadataRewrite,
    RewriteOutcome,
    kept_where_unchanged,
    names_kept,
    plan_bitmap_set,
    replace_bitmaps,
)
from chainmerge.engines.metadata.steps import Port

__all__ = [
    "AnyBitmap",
    "KeptBitmap",
    "MetadataRewrite",
    "Port",
    "RewriteOutcome",
    "StoredBitmap",
    "change_backing",
    "kept_where_unchanged",
    "names_kept",
    "plan_bitmap_set",
    "reclaim_leaks",
    "replace_bitmaps",
]
