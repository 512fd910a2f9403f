# SPDX-License-Identifier: Apache-2.0
"""Whether a plan is still the one that was looked at."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import msgspec

from chainmerge.documents.plan import Role

if TYPE_CHECKING:
    from chainmerge.documents.plan import MergePlan

_PARTS: Final = frozenset({Role.BASE, Role.MIDDLE, Role.TOP})


def plan_digest_of(plan: MergePlan) -> str:
    """Return the same for two plans that do the same to the same images.

    What is left out changes without anybody's doing: free space, sizes of files, an overlay above
    that the guest writes to.
    """
    images = [
        (image.path, image.role, image.format, image.virtual_size, image.cluster_size, image.parent)
        for image in plan.images
        if image.role in _PARTS
    ]
    fates = [(bitmap.name, bitmap.fate, bitmap.dirty_bytes) for bitmap in plan.bitmaps]
    acts = [plan.repoint, plan.delete, plan.rename, plan.directions.chosen, plan.verify]
    what = [images, plan.movement, fates, plan.snapshots, acts]
    return hashlib.sha256(msgspec.json.encode(what, order="deterministic")).hexdigest()[:32]


def images_of_chain(plan: MergePlan) -> list[str]:
    """Return the images that a plan is about, and those below, from the root up to its top."""
    return [image.path for image in plan.images if image.role in {*_PARTS, Role.BELOW}]
