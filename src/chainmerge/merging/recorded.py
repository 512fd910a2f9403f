# SPDX-License-Identifier: Apache-2.0
"""The end of a merge that only a record still describes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.merging.deleting import (
    delete_recorded,
    delete_superseded,
    not_deleted,
)
from chainmerge.merging.live_remains import forget_left_behind
from chainmerge.merging.reporting import build_report, verified_before
from chainmerge.merging.resuming import finish_recorded
from chainmerge.records.identity import same_image
from chainmerge.records.merged_record import MergedRecord, load_merged_record, note_deleted
from chainmerge.records.saved_bitmaps import forget_saved_bitmaps, load_saved_bitmaps
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.storage.other_hosts import held_by_this_host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.merge import MergeReport
    from chainmerge.merging.job import Request


def finish_recorded_merge(request: Request, record: MergedRecord) -> MergeReport:
    """Delete what the record still names, and do what else was left to do."""
    renamed = None
    if record.renames_volume is not None and os.path.lexists(record.base):
        renamed = (record.base, record.result)
    with volumes_held(request, record):
        deleted = delete_recorded(record)
        if request.options.delete:
            deleted += delete_superseded(record)
    _forget_bitmaps_saved_for(record)
    forget_left_behind(record)
    warnings = (*not_deleted(record), *finish_recorded(request, record))
    if not any(not_deleted(record)):
        # Of a pull it says by now that nothing of it is leaked any more.
        note_deleted(request.top, load_merged_record(request.top) or record)
    images = (record.top, record.base) if record.pulled is None else (record.base, record.top)
    verified = (verified_before(*images),)
    result = Path(record.result)
    return build_report(
        result,
        record.result_format,
        request.started,
        verified=verified,
        deleted=deleted,
        renamed=renamed,
        warnings=warnings,
    )


@contextlib.contextmanager
def volumes_held(request: Request, record: MergedRecord) -> Iterator[None]:
    """Have the volumes that are going to be removed or renamed for this host alone.

    One that is renamed is locked, and so open: it cannot become another one meanwhile.
    """
    superseded = () if record.superseded is None else record.superseded.images
    volumes = [Path(one.path) for one in (*record.delete, *superseded) if one.volume is not None]
    with contextlib.ExitStack() as stack:
        if record.renames_volume is not None:
            volumes.append(record.beside)
        stack.enter_context(held_by_this_host(volumes, request.access))
        if record.renames_volume is not None:
            wait = request.access.lock_wait
            stack.enter_context(lock_image(record.beside, LockMode.WRITER, wait))
        yield


def _forget_bitmaps_saved_for(record: MergedRecord) -> None:
    """Remove what that merge saved, and not what another one into the same base has saved."""
    saved = load_saved_bitmaps(record.beside)
    if saved is None or not same_image(saved.base, record.result_identity):
        return
    if record.keep_name or any(
        same_image(saved.overlay, doomed.identity) for doomed in record.delete
    ):
        forget_saved_bitmaps(record.beside)
