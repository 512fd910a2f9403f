# SPDX-License-Identifier: Apache-2.0
"""The end of a live merge: verify what the VM has now, and delete what is merged.

Each step can be done again, so that a rerun goes on wherever an interrupted one stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainmerge.chain.model import ImageFormat
from chainmerge.chain.reading import begins_as_qcow2
from chainmerge.documents.progress import Stage
from chainmerge.errors import ChainmergeError
from chainmerge.live.deletion import any_to_be_left, warned_of_images_left
from chainmerge.live.pull_record import delete_pulled, note_settled
from chainmerge.live.reporting import LiveOutcome
from chainmerge.live.verifying import verify_in_vm, verify_on_disk
from chainmerge.merging.deleting import delete_recorded, not_deleted
from chainmerge.merging.live_remains import merged_images, require_none_needed
from chainmerge.records.changes import data_changed
from chainmerge.records.identity import identify, may_be_same
from chainmerge.records.merged_record import (
    DoomedImage,
    MergedRecord,
    Superseded,
    note_deleted,
    record_merged,
)
from chainmerge.storage.files import FileReadable
from chainmerge.storage.lvm_volumes import lasting_path

if TYPE_CHECKING:
    from chainmerge.live.driver import LiveDriver
    from chainmerge.records.live_journal import LiveJournal


def settle_live_merge(driver: LiveDriver[Any]) -> LiveOutcome:
    """Verify a merge that took effect, and delete the merged images, which the VM has closed.

    Raises:
        LiveVerificationFailed, VerificationFailed: nothing is deleted.
    """
    journal = driver.journal
    driver.announce(Stage.VERIFY)
    layout = driver.disk.layout()
    verified = list(verify_in_vm(driver, driver.merged_nodes(layout)))
    if not journal.is_active:
        verified += verify_on_disk(driver, layout)
    driver.announce(Stage.SETTLE)
    is_closed = not driver.merged_nodes(driver.disk.layout()).still_open
    if journal.delete and not is_closed:
        driver.warnings.append("merged images that the VM keeps open were not deleted")
    deleted = _settled(journal, driver.warnings, is_closed=is_closed)
    result = driver.merged_nodes(driver.disk.graph()).result
    driver.forget_records()
    return LiveOutcome(driver.final_bitmaps(result), tuple(verified), deleted)


def _settled(journal: LiveJournal, warnings: list[str], *, is_closed: bool) -> tuple[str, ...]:
    """Delete what is merged, as far as it can be, and record how it is; returns what is gone."""
    if journal.pulls:
        deleted = delete_pulled(journal, warnings) if is_closed else ()
        note_settled(journal)
        return deleted
    if journal.delete and is_closed:
        return _delete_merged(journal, warnings)
    return _record_superseded(journal)


def _delete_merged(journal: LiveJournal, warnings: list[str]) -> tuple[str, ...]:
    """Delete the merged images, upper ones first.

    Block devices that are no logical volumes are left, and so are all then.

    Args:
        journal: of the merge, whose images the VM has closed.
        warnings: gets what could not be deleted, and why.

    Returns:
        What was deleted.
    """
    doomed = merged_images(journal)
    if any_to_be_left(doomed, warnings):
        return _record_superseded(journal)
    try:
        require_none_needed(journal, doomed)
    except ChainmergeError as error:
        warnings.append(f"merged images are not deleted: {error.sentence}")
        return _record_superseded(journal)
    record = _merged_record(journal, doomed, None)
    record_merged(Path(journal.top.path), record)
    deleted: tuple[str, ...] | None = None
    with warned_of_images_left(warnings):
        deleted = delete_recorded(record)
    if deleted is None:
        return ()
    warnings += (left := list(not_deleted(record)))
    if not left:
        note_deleted(Path(journal.top.path), record)
    return deleted


def _record_superseded(journal: LiveJournal) -> tuple[()]:
    """Record that nothing may be merged from what is left: the guest writes to base, or above.

    In top's header nothing tells of that. Merged again, it would put old data over new.
    """
    top = Path(journal.top.path)
    if top.exists() and may_be_same(identify(top), journal.top):
        superseded = Superseded(merged_images(journal), data_changed(top))
        record_merged(top, _merged_record(journal, [], superseded))
    return ()


def _merged_record(
    journal: LiveJournal, doomed: list[DoomedImage], superseded: Superseded | None
) -> MergedRecord:
    top, base = journal.top.path, journal.base.path
    if doomed:
        # Nothing else tells of volumes that are gone.
        top, base = doomed[0].path, str(lasting_path(Path(base)))
    return MergedRecord(
        top=top,
        base=base,
        result=base,
        result_format=_format_of(Path(journal.base.path)),
        result_identity=journal.base,
        keep_name=False,
        delete=doomed,
        superseded=superseded,
        request=journal.request,
    )


def _format_of(base: Path) -> str:
    with FileReadable(base) as readable:
        return ImageFormat.QCOW2 if begins_as_qcow2(readable) else ImageFormat.RAW
