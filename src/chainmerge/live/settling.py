# SPDX-License-Identifier: Apache-2.0
"""The end of a live merge: look at what the VM has now, close and delete what is merged.

Each step can be done again, so that a rerun goes on wherever an interrupted one stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.chain.discovery import discover
from chainmerge.chain.model import ChainPolicy, ImageFormat
from chainmerge.chain.opening import open_chain
from chainmerge.chain.reading import begins_as_qcow2, data_file_places
from chainmerge.documents.bitmaps import BitmapResult
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.live.bitmaps import faults
from chainmerge.live.errors import LiveVerificationFailed, VmRefused
from chainmerge.live.inspection import path_of
from chainmerge.live.merge_nodes import place_of
from chainmerge.merging.deleting import delete_recorded, not_deleted
from chainmerge.merging.verifying import verify_bitmaps, verify_content, verify_soundness
from chainmerge.qcow2.bitmaps import BitmapFlag
from chainmerge.qcow2.bits import BitSet, union_all
from chainmerge.records.changes import data_changed
from chainmerge.records.identity import identify, may_be_same
from chainmerge.records.live_journal import forget_live_journal
from chainmerge.records.merged_record import (
    DoomedImage,
    MergedRecord,
    Superseded,
    note_deleted,
    record_merged,
)
from chainmerge.records.saved_bitmaps import forget_saved_bitmaps, load_saved_bitmaps
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chainmerge.chain.opening import OpenChain, OpenImage
    from chainmerge.live.merge_nodes import Place
    from chainmerge.live.port import BlockGraph, BlockNode, LiveVm
    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.records.live_journal import LiveJournal, TombstoneName


@dataclass(frozen=True, slots=True)
class Settled:
    """What there is to report of a merge that took effect.

    Attributes:
        bitmaps: Base's, as the VM has them.
        verified: What was checked, a sentence each.
        deleted: Files that were deleted.
        warnings: What the user should know, a sentence each.
    """

    bitmaps: tuple[BitmapResult, ...]
    verified: tuple[str, ...]
    deleted: tuple[str, ...]
    warnings: tuple[str, ...]


def settle(
    vm: LiveVm,
    journal: LiveJournal,
    report: Callable[[ProgressEvent], None],
    announce: Callable[[Stage], None],
) -> Settled:
    """Verify a merge that took effect, and delete the merged images, which the VM has closed.

    Raises:
        LiveVerificationFailed, VerificationFailed: nothing is deleted.
    """
    announce(Stage.VERIFY)
    place = _merged_place(vm, journal)
    verified = list(_verify_in_vm(journal, place))
    if not journal.is_active:
        verified += verify_on_disk(vm.layout(), journal, journal.tombstones, report, verify_bitmaps)
    announce(Stage.SETTLE)
    warnings: list[str] = []
    is_closed = not _merged_place(vm, journal).left_over
    if journal.delete and not is_closed:
        warnings.append("merged images that the VM keeps open were not deleted")
    deleted = take_leave(journal, warnings) if is_closed else record_superseded(journal)
    place = _merged_place(vm, journal)
    forget(journal, keep_saved=False)
    return Settled(tuple(results_of(place.base)), tuple(verified), deleted, tuple(warnings))


def forget(journal: LiveJournal, *, keep_saved: bool) -> None:
    """Remove what the merge has left beside base; the saved bitmaps only if they are not needed."""
    base = Path(journal.base.path)
    if not keep_saved:
        saved = load_saved_bitmaps(base)
        if saved is not None and may_be_same(saved.base, journal.base):
            forget_saved_bitmaps(base)
    forget_live_journal(base)


def _merged_place(vm: LiveVm, journal: LiveJournal) -> Place:
    place = place_of(vm.graph(), journal)
    if place is None or not place.merged:
        raise LiveVerificationFailed(journal.base.path, "the VM's chain is not the merged one")
    return place


def _verify_in_vm(journal: LiveJournal, place: Place) -> Iterator[str]:
    if journal.is_active:
        if place.above is not None:
            difference = f"node {place.active.name} stands on it, and nothing should"
            raise LiveVerificationFailed(journal.base.path, difference)
        yield f"the guest reads and writes {journal.base.path}, as the VM says"
    else:
        if place.above is None or place.above.backing != place.base.name:
            difference = "the image above does not stand on it"
            raise LiveVerificationFailed(journal.base.path, difference)
        yield f"{_above(journal)} stands on {journal.base.path}, as the VM says"
    for fault in faults(journal, place.base):
        raise LiveVerificationFailed(journal.base.path, fault)
    yield (
        f"bitmaps of base, as the VM says: {len(journal.kept)} kept and recording, "
        f"{len(journal.stale)} stale ones gone"
    )


def _above(journal: LiveJournal) -> str:
    return journal.above.path if journal.above is not None else ""


def verify_on_disk(
    layout: BlockGraph,
    journal: LiveJournal,
    tombstones: Sequence[TombstoneName],
    report: Callable[[ProgressEvent], None],
    compare: Callable[[Qcow2Image, Sequence[StoredBitmap]], str],
) -> Iterator[str]:
    """Read base back: nobody writes to it now.

    Args:
        layout: the VM's block graph.
        journal: of the merge.
        tombstones: those that base has to have.
        report: told how far the comparison of content is.
        compare: looks at base's bitmaps: :func:`chainmerge.merging.verifying.verify_bitmaps`, or
            a weaker one.
    """
    top = Path(journal.top.path)
    if not top.exists() or not may_be_same(identify(top), journal.top):
        return
    with open_chain(discover(top, _trusting(layout, journal))) as opened:
        index = _index_of_base(opened, journal)
        base = opened.images[index]
        if base.image is not None:
            verify_soundness(base.image)
            yield "refcounts of base recomputed from the tables: no corruption"
            marks = _expected_tombstones(tombstones, base)
            yield compare(base.image, (*_expected(journal, opened, base), *marks))
        if journal.full_verify:
            size = opened.view().virtual_size
            yield verify_content(
                journal.base.path,
                opened.view(0, index + 1),
                opened.view(),
                lambda done: report(ProgressEvent(Stage.VERIFY, done, size)),
                lambda: False,
            )


def _index_of_base(opened: OpenChain, journal: LiveJournal) -> int:
    for number, image in enumerate(opened.images):
        if may_be_same(identify(image.info.real_path), journal.base):
            return number
    difference = f"the headers from {journal.top.path} on do not lead to it any more"
    raise LiveVerificationFailed(journal.base.path, difference)


def _trusting(layout: BlockGraph, journal: LiveJournal) -> ChainPolicy:
    """The VM has opened these images itself, wherever they lie, and what holds their data.

    What was allowed when the merge was asked for was looked at then. The process that reads them
    now may be another, which was told nothing.
    """
    nodes = {path: node for node in layout.chain() if (path := path_of(node, layout)) is not None}
    overlays = [path for one in journal.overlays if (path := Path(one.path)).exists()]
    qcow2 = [path for path, node in nodes.items() if node.driver == ImageFormat.QCOW2]
    return ChainPolicy(
        allow_backing=(Path("/"),),
        allow_data_files=tuple(
            place for image in (*qcow2, *overlays) for place in data_file_places(image)
        ),
        formats={path: node.driver for path, node in nodes.items()},
    )


def _expected(journal: LiveJournal, opened: OpenChain, base: OpenImage) -> Iterator[StoredBitmap]:
    """What base has to hold: what was saved of it, united with what the overlays hold."""
    size = base.info.virtual_size
    saved = load_saved_bitmaps(Path(journal.base.path))
    before = {one.name: one.in_base for one in saved.bitmaps} if saved is not None else {}
    at = opened.images.index(base)
    for kept in journal.kept:
        sources = [opened.images[at + 1 + index].bits(kept.name) for index in kept.sources]
        own = before.get(kept.name)
        if own is not None:
            sources.append(own)
        elif kept.in_base:
            # An earlier run has settled this far and forgotten what it had saved.
            sources.append(base.bits(kept.name))
        yield StoredBitmap(kept.name, union_all(sources, size, kept.granularity), BitmapFlag.AUTO)


def _expected_tombstones(
    tombstones: Sequence[TombstoneName], base: OpenImage
) -> Iterator[StoredBitmap]:
    """Disabled bitmaps without bits, of whatever granularity they have; one may be missing."""
    for wanted in tombstones:
        found = base.entries.get(wanted.name)
        granularity = wanted.granularity if found is None else found.granularity
        bits = BitSet.empty(base.info.virtual_size, granularity)
        yield StoredBitmap(wanted.name, bits, BitmapFlag(0))


def close_merged(vm: LiveVm, journal: LiveJournal) -> Iterator[str]:
    """Have the VM close the merged images, the upper ones first; yields warnings."""
    for node in _merged_place(vm, journal).left_over:
        try:
            vm.forget_node(node.name)
        except VmRefused as refused:
            yield f"the VM keeps {node.filename or node.name} open: {refused.reason}"


def take_leave(journal: LiveJournal, warnings: list[str]) -> tuple[str, ...]:
    """Delete the merged images, upper ones first, or record that nothing may come from them.

    Args:
        journal: of the merge, whose images the VM has closed.
        warnings: gets what could not be deleted, and why.

    Returns:
        What was deleted.
    """
    if not journal.delete:
        return record_superseded(journal)
    doomed = _doomed(journal)
    devices = [one.path for one in doomed if Path(one.path).is_block_device()]
    if devices:
        warnings.append(f"block devices are not deleted: {', '.join(devices)}")
        return record_superseded(journal)
    record = _record(journal, doomed, None)
    record_merged(Path(journal.top.path), record)
    try:
        deleted = delete_recorded(record)
    except OSError as error:
        warnings.append(f"not all merged images could be deleted: {error}")
        return ()
    warnings += (left := list(not_deleted(record)))
    if not left:
        note_deleted(Path(journal.top.path), record)
    return deleted


def record_superseded(journal: LiveJournal) -> tuple[()]:
    """Record that nothing may be merged from what is left: the guest writes to base, or above.

    In top's header nothing tells of that. Merged again, it would put old data over new.
    """
    top = Path(journal.top.path)
    if top.exists() and may_be_same(identify(top), journal.top):
        superseded = Superseded(_doomed(journal), data_changed(top))
        record_merged(top, _record(journal, [], superseded))
    return ()


def _doomed(journal: LiveJournal) -> list[DoomedImage]:
    return [DoomedImage(one.path, one) for one in reversed(journal.overlays)]


def _record(
    journal: LiveJournal, doomed: list[DoomedImage], superseded: Superseded | None
) -> MergedRecord:
    return MergedRecord(
        top=journal.top.path,
        base=journal.base.path,
        result=journal.base.path,
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


def results_of(base: BlockNode) -> Iterator[BitmapResult]:
    """The bitmaps of a node, for a report."""
    for bitmap in sorted(base.bitmaps, key=lambda one: one.name):
        state = BitmapState.VALID if bitmap.recording else BitmapState.DISABLED
        if bitmap.inconsistent:
            state = BitmapState.IN_USE
        dirty = None if bitmap.inconsistent else bitmap.dirty_bytes
        yield BitmapResult(
            name=bitmap.name,
            state=state,
            granularity=bitmap.granularity,
            dirty_bytes=dirty,
            tombstone=state is BitmapState.DISABLED and dirty == 0,
        )
