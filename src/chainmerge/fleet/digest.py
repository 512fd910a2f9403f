# SPDX-License-Identifier: Apache-2.0
"""By what the plan of a merge is known again, and which images it is about."""

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
    fates = [(bitmap.name, bitmap.fate, bitmap.dirty_bytes) for bitmap in plan.bitmaps]
    what = [_images_of(plan), plan.movement, fates, plan.snapshots, _acts_of(plan)]
    return short_digest_of(what)


def live_plan_digest_of(plan: MergePlan) -> str:
    """Return the same for two plans by which a virtual machine does the same to the same images.

    What its guest writes is left out, too: how much there is to copy, what bitmaps have recorded.
    """
    fates = [(bitmap.name, bitmap.fate) for bitmap in plan.bitmaps]
    return short_digest_of([_images_of(plan), fates, plan.snapshots, _acts_of(plan)])


def short_digest_of(what: object) -> str:
    """Return the same for what is the same as JSON."""
    return hashlib.sha256(msgspec.json.encode(what, order="deterministic")).hexdigest()[:32]


def _images_of(plan: MergePlan) -> list[object]:
    return [
        (image.path, image.role, image.format, image.virtual_size, image.cluster_size, image.parent)
        for image in plan.images
        if image.role in _PARTS
    ]


def images_merged_by(plan: MergePlan) -> tuple[str, ...]:
    """Return the images from a plan's base up to its top."""
    return tuple(image.path for image in plan.images if image.role in _PARTS)


def images_of_chain(plan: MergePlan) -> tuple[str, ...]:
    """Return the images that a plan is about, and those below, from the root up to its top."""
    roles = {*_PARTS, Role.BELOW}
    return tuple(image.path for image in plan.images if image.role in roles)


def _acts_of(plan: MergePlan) -> list[object]:
    return [plan.repoint, plan.delete, plan.rename, plan.directions.chosen, plan.verify]
