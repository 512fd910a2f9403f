# SPDX-License-Identifier: Apache-2.0
"""The map that a plan or a description of an image shows as a strip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge import api
from chainmerge.errors import ChainmergeError

if TYPE_CHECKING:
    from chainmerge.documents.disk_map import DiskMap
    from chainmerge.documents.plan import MergePlan
    from chainmerge.options import Access


def upper_end(plan: MergePlan) -> str:
    """Return the image that the guest uses, as far as that is known; else the one merged."""
    return plan.leaves[0] if len(plan.leaves) == 1 else plan.top


def map_for_strip(image: str, access: Access) -> DiskMap | None:
    """Return the map of a disk; None if the chain cannot be read to its end.

    It is asked for when text is shown: programs, and jobs that nobody watches, do not wait for it.
    """
    from chainmerge.report.map_strip import STRIP_COLUMNS  # noqa: PLC0415 (with the tables)

    try:
        return api.disk_map(image, access, STRIP_COLUMNS)
    except ChainmergeError:
        # What matters of it is said elsewhere: this only adds to that.
        return None
