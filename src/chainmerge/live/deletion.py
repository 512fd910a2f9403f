# SPDX-License-Identifier: Apache-2.0
"""What keeps merged images from being deleted at the end of a live merge, as warnings."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chainmerge.errors import ChainmergeError
from chainmerge.merging.deleting import deletable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.records.merged_record import DoomedImage


def any_to_be_left(merged: Sequence[DoomedImage], warnings: list[str]) -> bool:
    """Whether some are block devices that are no logical volumes, which *warnings* gets then."""
    kept = deletable(merged)
    devices = [one.path for one in merged if one not in kept]
    if devices:
        warnings.append(f"block devices are not deleted: {', '.join(devices)}")
    return bool(devices)


@contextlib.contextmanager
def warned_of_images_left(warnings: list[str]) -> Iterator[None]:
    """Have *warnings* get what ends the block, in which images are deleted."""
    try:
        yield
    except (OSError, ChainmergeError) as error:
        reason = error.sentence if isinstance(error, ChainmergeError) else str(error)
        warnings.append(f"not all merged images could be deleted: {reason}")
