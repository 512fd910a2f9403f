# SPDX-License-Identifier: Apache-2.0
"""The end of a merge in a libvirt domain: have libvirt validate what came of it, delete.

libvirt closes merged images by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.documents.bitmaps import BitmapResult
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.live.errors import LiveVerificationFailed
from chainmerge.live.merge_nodes import Place, place_of
from chainmerge.live.settling import (
    Settled,
    forget,
    results_of,
    take_leave,
    verify_on_disk,
)
from chainmerge.merging.verifying import verify_bitmaps_cover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.live.libvirt.disk import DomainDisk
    from chainmerge.live.port import BlockNode
    from chainmerge.records.live_journal import LiveJournal


def settle_in_domain(
    disk: DomainDisk,
    journal: LiveJournal,
    report: Callable[[ProgressEvent], None],
    announce: Callable[[Stage], None],
) -> Settled:
    """Verify a merge that took effect, and delete the merged images if that was asked for.

    Raises:
        LiveVerificationFailed, VerificationFailed: nothing is deleted.
    """
    announce(Stage.VERIFY)
    place = _merged_place(disk, journal)
    verified = list(_verify_in_domain(disk, journal, place))
    if not journal.is_active:
        # libvirt has base's bitmaps record what is copied, in whole clusters.
        verified += verify_on_disk(disk.layout(), journal, (), report, verify_bitmaps_cover)
    announce(Stage.SETTLE)
    warnings: list[str] = []
    deleted = take_leave(journal, warnings)
    base = disk.graph().nodes[place.base.name]
    forget(journal, keep_saved=False)
    return Settled(tuple(_results_of(base, journal)), tuple(verified), deleted, tuple(warnings))


def _results_of(base: BlockNode, journal: LiveJournal) -> Iterator[BitmapResult]:
    """Base's bitmaps; those included that it has not stored yet, and that libvirt found sound."""
    yield from results_of(base)
    for kept in journal.kept:
        if base.bitmap(kept.name) is None:
            yield BitmapResult(kept.name, BitmapState.VALID, kept.granularity, None)


def names_to_remove(journal: LiveJournal) -> tuple[str, ...]:
    """The names that go from all images of the chain.

    Journals of earlier versions have some of them as tombstones, which libvirt leaves none of.
    """
    return (*journal.stale, *(one.name for one in journal.tombstones))


def _merged_place(disk: DomainDisk, journal: LiveJournal) -> Place:
    place = place_of(disk.layout(), journal)
    if place is None or not place.merged:
        raise LiveVerificationFailed(journal.base.path, "the domain's chain is not the merged one")
    return place


def _verify_in_domain(disk: DomainDisk, journal: LiveJournal, place: Place) -> Iterator[str]:
    if journal.is_active:
        if place.above is not None:
            difference = f"{place.active.filename} stands on it, and nothing should"
            raise LiveVerificationFailed(journal.base.path, difference)
        yield f"the guest reads and writes {journal.base.path}, as libvirt says"
    else:
        above = journal.above.path if journal.above is not None else ""
        if place.above is None or place.above.backing != place.base.name:
            raise LiveVerificationFailed(journal.base.path, f"{above} does not stand on it")
        yield f"{above} stands on {journal.base.path}, as libvirt says"
    for kept in journal.kept:
        # In an internal merge images above can lack it, and then nobody could use it before.
        if journal.is_active and not disk.passes(kept.name):
            difference = f"libvirt does not find bitmap {kept.name!r} sound"
            raise LiveVerificationFailed(journal.base.path, difference)
    gone = set(names_to_remove(journal))
    left = gone & set(disk.stored_names(place.base))
    if left and not journal.is_active:
        raise LiveVerificationFailed(journal.base.path, f"bitmap {min(left)!r} is still there")
    yield (
        f"bitmaps of base: {len(journal.kept)} kept, {len(gone)} stale ones removed from the chain"
    )
