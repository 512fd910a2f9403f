# SPDX-License-Identifier: Apache-2.0
"""Whether a recorded merge is the one that is requested."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.records.changes import data_changed, what_stands_at
from chainmerge.records.errors import LeftoverUnclear
from chainmerge.records.identity import Sameness, identify, same_image
from chainmerge.records.merged_record import MergedRecord, Superseded, is_pulled, merged_record_file
from chainmerge.storage.files import drop_cached
from chainmerge.storage.lvm_volumes import is_name_taken
from chainmerge.storage.volume_names import mapper_name_in

if TYPE_CHECKING:
    from chainmerge.options import MergeOptions


def finished_before(
    record: MergedRecord | None,
    top: Path,
    base: Path | None,
    options: MergeOptions,
    active: str | None,
) -> bool:
    """Whether *record* says that the merge which is asked for was done, except for deletions.

    Args:
        record: what was recorded under top's name.
        top: as it was asked for, and so are *base* and *options*.
        base: see there.
        options: see there.
        active: what the guest is said to write to; None if nobody has said.

    Raises:
        LeftoverUnclear: nothing tells whether the result is still the image that it was.
        LvmMissing, LvmFailed: nothing tells whether top is gone.
    """
    if record is None:
        return False
    if record.pulled is not None and not _may_pull(options):
        return False
    if base is not None and not record.names_base(base):
        return False
    if is_top_inactive(record):
        return False
    result = what_stands_at(record.result, record.result_identity)
    if result is Sameness.OTHER:
        return is_to_be_renamed(record)
    if record.pulled is not None:
        drop_cached(record.result)
        if not is_pulled(record, record.pulled, top):
            return False
    elif record.superseded is None and not record.keep_name and top.exists():
        return False
    if result is Sameness.UNKNOWN:
        file = str(merged_record_file(top))
        raise LeftoverUnclear(file, record.result, "that changes no image")
    if record.pulled is not None:
        return True
    if record.superseded is not None:
        in_base = active is not None and os.path.realpath(active) == record.base
        return is_superseded(record.superseded, top, in_base=in_base)
    return True


def is_top_inactive(record: MergedRecord) -> bool:
    """Whether a volume has the name of top that is not active: the same one still, or another.

    Raises LvmMissing, LvmFailed.
    """
    top = Path(record.top)
    if mapper_name_in(top) is None or os.path.lexists(top):
        return False
    return is_name_taken(record.top, top)


def is_to_be_renamed(record: MergedRecord) -> bool:
    """Whether nothing has the name of top, as its volume is gone, and base has yet to get it."""
    if record.renames_volume is None or os.path.lexists(record.result):
        return False
    return what_stands_at(record.base, record.result_identity) is Sameness.SAME


def is_superseded(superseded: Superseded, top: Path, *, in_base: bool) -> bool:
    """Whether *top* is what a live merge has left, or nothing is left of it.

    *in_base* says that the guest writes to base. Only that tells of a block device: it may have
    become another overlay in the meantime, of which nothing is merged.
    """
    try:
        is_left = same_image(identify(top), superseded.images[0].identity)
    except (OSError, ValueError):
        return True
    if not superseded.since:
        return is_left and in_base
    return is_left and superseded.since == data_changed(top)


def _may_pull(options: MergeOptions) -> bool:
    return options.direction == "pull" or (options.direction == "auto" and options.keep_name)
