# SPDX-License-Identifier: Apache-2.0
"""What a live merge has left behind, for a cold merge of the same images to finish.

Before the journal says that the merge takes effect (:attr:`LiveState.SWITCHING`), a cold merge
does it all again: top is right, base's bitmaps are saved. After that base is right. Where top
was not what the guest wrote to, both hold the same, and a cold merge finds that. In an active
merge the guest writes to base from then on, and nothing must be copied from top any more.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from chainmerge.bitmaps.pulled import bitmaps_restored
from chainmerge.bitmaps.rules import BitmapState
from chainmerge.chain.comparing import base_shows_all
from chainmerge.documents.progress import Stage
from chainmerge.engines.metadata.leaks import everywhere_but, reclaim_leaks
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.errors import ChainmergeError
from chainmerge.merging.deleting import (
    deletable,
    delete_recorded,
    require_no_users,
    require_nobody_needs,
)
from chainmerge.merging.reporting import build_report
from chainmerge.merging.settling import release_volumes
from chainmerge.merging.verifying import verify_soundness
from chainmerge.options import Access
from chainmerge.planning.encryption import has_encrypted
from chainmerge.planning.leaks import from_note
from chainmerge.planning.pivot import base_was_written_last, pivot_unclear, require_base_as_result
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.changes import data_changed, is_there
from chainmerge.records.identity import identify, may_be_same, same_image
from chainmerge.records.live_journal import (
    LiveJournal,
    forget_live_journal,
    load_live_journal,
)
from chainmerge.records.merged_record import (
    DoomedImage,
    MergedRecord,
    Superseded,
    note_deleted,
    record_merged,
)
from chainmerge.records.request import access_of
from chainmerge.records.saved_bitmaps import forget_saved_bitmaps, load_saved_bitmaps
from chainmerge.storage.files import WritablePort
from chainmerge.storage.lvm_volumes import lasting_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.documents.merge import MergeReport
    from chainmerge.merging.job import Request
    from chainmerge.storage.locks import ImageLock


def merged_images(journal: LiveJournal) -> list[DoomedImage]:
    """The images that a live merge makes superfluous, in the order in which they are deleted."""
    return [
        DoomedImage(str(lasting_path(Path(one.path))) if is_there(one) else one.path, one)
        for one in reversed(journal.merged)
    ]


def require_none_needed(journal: LiveJournal, merged: Sequence[DoomedImage]) -> None:
    """Make sure that nobody has begun to use *merged* while the VM was merging them.

    Nothing keeps others from that, and it can have taken hours.

    Raises what :func:`chainmerge.merging.deleting.require_nobody_needs` raises.
    """
    there = [Path(one.path) for one in merged if is_there(one.identity)]
    access = access_of(journal.known_request) or Access()
    require_nobody_needs(journal.base.path, there, access)


def require_clear(request: Request, record: MergedRecord | None) -> None:
    """Make sure that top is not what a live merge has left, and somebody has written to since.

    Raises LivePivotUnclear, unless ``active`` says that top is what the guest wrote to.
    """
    if record is None or record.superseded is None or not request.top.exists():
        return
    left = record.superseded.images[0].identity
    if not may_be_same(identify(request.top), left):
        return
    active = request.access.active
    if active is None or os.path.realpath(active) != os.path.realpath(request.top):
        raise pivot_unclear(request.recorded(Path(record.base)))


def forget_left_behind(record: MergedRecord) -> None:
    """Remove what a live merge has kept beside base, once its record says that it is done."""
    base = Path(record.base)
    journal = load_live_journal(base)
    if journal is None or not same_image(journal.base, record.result_identity):
        return
    if record.top in (journal.top.path, merged_images(journal)[0].path) or any(
        same_image(one.identity, journal.top) for one in record.delete
    ):
        forget_saved_bitmaps(base)
        forget_live_journal(base)


def forget_live_pull(top: Path) -> None:
    """Remove what a pull in a VM has kept beside top, which holds everything."""
    journal, saved = load_live_journal(top), load_saved_bitmaps(top)
    if saved is not None and saved.is_of_pull:
        forget_saved_bitmaps(top)
    if journal is not None and journal.pulls:
        forget_live_journal(top)


def restore_bitmaps(top: WritablePort, path: Path) -> None:
    """Put checkpoints of *top*, at *path*, back that a VM left in-use which had pulled into it.

    Raises what :func:`chainmerge.engines.metadata.replacement.replace_bitmaps` raises.
    """
    restored = bitmaps_restored(Qcow2Image(top), load_saved_bitmaps(path))
    if restored is not None:
        replace_bitmaps(top, restored)


def took_effect(request: Request, journal: LiveJournal, target: Target, opened: OpenChain) -> bool:
    """Whether base is what the guest wrote to last, after the live merge of *journal*.

    Raises LivePivotUnclear, LivePivotUnfinished, LeftoverInUse.
    """
    base_is_right = base_was_written_last(journal, target, request.access)
    if base_is_right is None:
        require_same_content(request, target, opened)
    elif not base_is_right:
        return False
    require_base_as_result(journal, target, request.options)
    if request.options.delete or journal.delete:
        overlays = [Path(one.path) for one in journal.overlays]
        require_no_users(str(target.base.path), overlays, request.access)
    return True


def require_same_content(request: Request, target: Target, opened: OpenChain) -> None:
    """Raise LivePivotUnclear unless base shows what top shows: then either is right."""
    # Without the keys, which the VM had, nobody can tell.
    if not has_encrypted(target.chain) and base_shows_all(
        opened, target.base_index, request.should_stop
    ):
        return
    raise pivot_unclear(request.recorded(target.base.path))


def finish_pivot(
    request: Request,
    journal: LiveJournal,
    target: Target,
    opened: OpenChain,
    locks: Sequence[ImageLock],
) -> MergeReport:
    """Finish an active merge that took effect in its VM: nothing is copied.

    *locks* are held on the images.

    Raises what verifying and deleting raise.
    """
    base = target.base
    verified = ["a live merge was completed: since then the guest has written to base"]
    image = opened.images[target.base_index].image
    if image is not None:
        verify_soundness(image)
        verified.append("refcounts of base recomputed from the tables: no corruption")
        # What QEMU had taken and not used yet when it died.
        with WritablePort(base.real_path) as port:
            reclaim_leaks(port, everywhere_but(from_note(journal.leaked_before)))
    request.announce(Stage.SETTLE)
    record = _record_of_pivot(request, journal, target)
    # Where nothing is deleted the record only warns who comes later.
    with contextlib.nullcontext() if record.delete else contextlib.suppress(ChainmergeError):
        record_merged(target.chain.top.real_path, record)
    overlays = target.chain.images[target.base_index + 1 :]
    held = frozenset(one.identity for one in overlays)
    if record.delete:
        release_volumes(overlays, locks)
    deleted = delete_recorded(record, held)
    forget_saved_bitmaps(base.real_path)
    forget_live_journal(base.real_path)
    note_deleted(target.chain.top.real_path, record)
    report = build_report(
        base.real_path, base.format, request.started, verified=verified, deleted=deleted
    )
    broken = [one.name for one in report.bitmaps if one.state == BitmapState.IN_USE]
    if not broken:
        return report
    names = ", ".join(map(repr, broken))
    warning = (
        f"the VM did not shut down properly, so these bitmaps are lost: {names}; the next backup "
        "that builds on them must be a full one (`chainmerge bitmaps repair LEAF` drops them)"
    )
    return replace(report, warnings=(warning,))


def _record_of_pivot(request: Request, journal: LiveJournal, target: Target) -> MergedRecord:
    """What is to be deleted, or, as nothing may be merged from it any more, is left."""
    base, top = target.base, target.chain.top.real_path
    merged = merged_images(journal)
    doomed = deletable(merged) if request.options.delete or journal.delete else []
    names = [str(lasting_path(path) if doomed else path) for path in (top, base.real_path)]
    record = MergedRecord(
        top=names[0],
        base=names[1],
        result=names[1],
        result_format=base.format,
        result_identity=identify(base.real_path),
        keep_name=False,
        delete=[],
        request=request.recorded(base.path),
    )
    if doomed:
        return msgspec.structs.replace(record, delete=doomed)
    superseded = Superseded(merged, data_changed(top))
    return msgspec.structs.replace(record, superseded=superseded)
