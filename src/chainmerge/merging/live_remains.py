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
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import msgspec

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.bitmaps.stored import bitmap_results
from chainmerge.chain.comparing import first_difference
from chainmerge.documents.merge import MergeOutcome, MergeReport
from chainmerge.documents.progress import Stage
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.engines.metadata.leaks import everywhere_but, reclaim_leaks
from chainmerge.errors import ChainmergeError, NewerDataAtRisk, OutcomeUnknown
from chainmerge.merging.deleting import delete_recorded, require_no_users
from chainmerge.merging.errors import LivePivotUnfinished
from chainmerge.merging.verifying import verify_soundness
from chainmerge.planning.encryption import has_encrypted
from chainmerge.planning.leaks import from_note
from chainmerge.qcow2.check import check
from chainmerge.records.changes import data_changed
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
from chainmerge.records.request import command_of
from chainmerge.records.saved_bitmaps import forget_saved_bitmaps
from chainmerge.storage.files import WritablePort

if TYPE_CHECKING:
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.merging.job import Request
    from chainmerge.records.request import RecordedRequest


@dataclass(eq=False)
class LivePivotUnclear(NewerDataAtRisk, OutcomeUnknown):
    """The guest wrote last to top or to base, and the images do not show to which."""

    code: ClassVar[str] = "live-pivot-unclear"
    template: ClassVar[str] = (
        "a live merge of {top} into {base} was about to take effect; the two differ, and {top} "
        "may have been written to since"
    )
    hint: ClassVar[str] = (
        "find out which of them the VM used last, then run `{if_base}` if it was {base} (it was, "
        "unless the VM was started again with {top}), otherwise `{if_top}`"
    )
    explanation: ClassVar[str] = (
        "When the active layer has been merged, the VM switches from top to base, and the journal "
        "of the merge announces that right before. From then on base is the right one, unless the "
        "VM ended and was started with top again. Modification times show that for files that "
        "nobody has touched since; for block devices nothing shows it. Copying top into base could "
        "destroy what the guest has written. Nothing was changed."
    )
    top: str
    base: str
    if_base: str
    if_top: str


def pivot_unclear(request: RecordedRequest) -> LivePivotUnclear:
    """The error that nobody knows which image the guest wrote to, with commands that say it."""
    top, base = request.tops[-1], request.bases[-1]
    if_base, if_top = (
        command_of(msgspec.structs.replace(request, access={**request.access, "active": active}))
        for active in (base, top)
    )
    return LivePivotUnclear(top, base, if_base or f"--active {base}", if_top or f"--active {top}")


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
    if journal.top.path == record.top:
        forget_saved_bitmaps(base)
        forget_live_journal(base)


def took_effect(request: Request, journal: LiveJournal, target: Target, opened: OpenChain) -> bool:
    """Whether base is what the guest wrote to last, after the live merge of *journal*.

    Raises LivePivotUnclear, LivePivotUnfinished, LeftoverInUse.
    """
    if not may_be_same(journal.top, identify(target.chain.top.real_path)):
        return False
    if not _base_is_right(request, journal, target, opened):
        return False
    if request.options.direction == "pull" or request.options.keep_name:
        known = journal.known_request
        finish = command_of(known) or f"chainmerge merge {shlex.quote(known.tops[-1])}"
        raise LivePivotUnfinished(known.tops[-1], str(target.base.path), finish)
    if request.options.delete or journal.delete:
        overlays = [Path(one.path) for one in journal.overlays]
        require_no_users(str(target.base.path), overlays, request.access)
    return True


def _base_is_right(
    request: Request, journal: LiveJournal, target: Target, opened: OpenChain
) -> bool:
    top, base = target.chain.top, target.base
    active = request.access.active
    if active is not None:
        return os.path.realpath(active) == str(base.real_path)
    identities = (
        (journal.base, identify(base.real_path)),
        (journal.top, identify(top.real_path)),
    )
    certain = all(same_image(then, now) for then, now in identities)
    if certain and journal.top_since and journal.top_since == data_changed(top.real_path):
        return True
    merged, whole = opened.view(0, target.base_index + 1), opened.view()
    size = whole.virtual_size
    # Without the keys, which the VM had, nobody can tell.
    comparable = not has_encrypted(target.chain)
    if comparable and (
        first_difference(merged, whole, 0, size, should_stop=request.should_stop) is None
    ):
        return True
    raise pivot_unclear(request.recorded(base.path))


def finish_pivot(
    request: Request, journal: LiveJournal, target: Target, opened: OpenChain
) -> MergeReport:
    base = target.base
    """Finish an active merge that took effect in its VM: nothing is copied.

    Raises what verifying and deleting raise.
    """
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
    held = frozenset(one.identity for one in target.chain.images[target.base_index + 1 :])
    deleted = delete_recorded(record, held)
    forget_saved_bitmaps(base.real_path)
    forget_live_journal(base.real_path)
    note_deleted(target.chain.top.real_path, record)
    bitmaps = bitmap_results(image) if image is not None else ()
    broken = [one.name for one in bitmaps if one.state == BitmapState.IN_USE]
    warnings = []
    if broken:
        names = ", ".join(map(repr, broken))
        warnings.append(
            f"the VM did not shut down properly, so the bitmaps {names} are lost: the next backup "
            "that builds on them must be a full one (`chainmerge repair` removes them)"
        )
    readable = opened.images[target.base_index].readable
    return MergeReport(
        version=REPORT_VERSION,
        outcome=MergeOutcome.ALREADY_MERGED,
        plan=None,
        bitmaps=bitmaps,
        bytes_copied=0,
        seconds=time.monotonic() - request.started,
        image_end=check(image).image_end_offset if image is not None else readable.size,
        volume_size=readable.size,
        verified=tuple(verified),
        repointed=(),
        deleted=deleted,
        renamed=None,
        warnings=tuple(warnings),
    )


def _record_of_pivot(request: Request, journal: LiveJournal, target: Target) -> MergedRecord:
    """What is to be deleted, or, as nothing may be merged from it any more, is left."""
    base, top = target.base, target.chain.top.real_path
    merged = [DoomedImage(one.path, one) for one in reversed(journal.overlays)]
    record = MergedRecord(
        top=str(top),
        base=str(base.real_path),
        result=str(base.real_path),
        result_format=base.format,
        result_identity=identify(base.real_path),
        keep_name=False,
        delete=[],
        request=request.recorded(base.path),
    )
    doomed = [one for one in merged if not Path(one.path).is_block_device()]
    if doomed and (request.options.delete or journal.delete):
        return msgspec.structs.replace(record, delete=doomed)
    superseded = Superseded(merged, data_changed(top))
    return msgspec.structs.replace(record, superseded=superseded)
