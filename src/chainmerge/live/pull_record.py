# SPDX-License-Identifier: Apache-2.0
"""The record of a pull in a running VM, and its end.

As of a cold pull it stands beside top before top's header loses what shows that there was
something to pull (:mod:`chainmerge.records.merged_record`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chainmerge.live.deletion import any_to_be_left, warned_of_images_left
from chainmerge.merging.deleting import deletable, delete_recorded, not_deleted
from chainmerge.merging.live_remains import merged_images, require_none_needed
from chainmerge.records.identity import same_image
from chainmerge.records.merged_record import (
    DoomedImage,
    MergedRecord,
    Pulled,
    forget_merged_record,
    load_merged_record,
    record_merged,
)
from chainmerge.storage.lvm_volumes import lasting_path

if TYPE_CHECKING:
    from chainmerge.records.live_journal import LiveJournal


def record_live_pull(journal: LiveJournal) -> None:
    """Record that a pull is about to take effect.

    Raises what :func:`chainmerge.records.merged_record.record_merged` raises.
    """
    record_merged(Path(journal.top.path), _record_of(journal))


def _record_of(journal: LiveJournal) -> MergedRecord:
    top = journal.top.path
    return MergedRecord(
        top=top,
        # Of a volume that is gone only this name is known.
        base=str(lasting_path(Path(journal.base.path))),
        result=top,
        result_format="qcow2",
        result_identity=journal.top,
        keep_name=False,
        delete=_doomed(journal),
        pulled=Pulled(journal.backing_name, journal.onto, journal.leaked_before, journal.base),
        request=journal.request,
    )


def _doomed(journal: LiveJournal) -> list[DoomedImage]:
    """What is to be deleted, upper ones first.

    Block devices that are no logical volumes are left, and so are all then.
    """
    merged = merged_images(journal)
    return merged if journal.delete and deletable(merged) == merged else []


def forget_pull(journal: LiveJournal) -> None:
    """Forget the record of a pull that took no effect."""
    if _recorded(journal) is not None:
        forget_merged_record(Path(journal.top.path))


def _recorded(journal: LiveJournal) -> MergedRecord | None:
    """The record of this pull, if it was written."""
    record = load_merged_record(Path(journal.top.path))
    if record is None or record.pulled is None or record.pulled.base is None:
        return None
    is_same = same_image(record.pulled.base, journal.base) and record.request == journal.request
    return record if is_same else None


def delete_pulled(journal: LiveJournal, warnings: list[str]) -> tuple[str, ...]:
    """Delete what top does without, as far as that was requested.

    Args:
        journal: of the pull, whose images the VM has closed.
        warnings: gets what could not be deleted, and why.

    Returns:
        What was deleted.
    """
    if not journal.delete:
        return ()
    merged = merged_images(journal)
    if any_to_be_left(merged, warnings):
        return ()
    record = _record_of(journal)
    deleted: tuple[str, ...] | None = None
    with warned_of_images_left(warnings):
        require_none_needed(journal, merged)
        deleted = delete_recorded(record)
    if deleted is None:
        return ()
    warnings += not_deleted(record)
    return deleted


def note_settled(journal: LiveJournal) -> None:
    """Record that nothing is left to do: what comes to stand there is another merge's."""
    # Base may be deleted, and its name be known by what was recorded before.
    record = _recorded(journal) or _record_of(journal)
    pulled = record.pulled
    assert pulled is not None
    settled = msgspec.structs.replace(pulled, leaked_before=None)
    done = msgspec.structs.replace(record, delete=[], pulled=settled)
    record_merged(Path(journal.top.path), done)
