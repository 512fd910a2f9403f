# SPDX-License-Identifier: Apache-2.0
"""What can be done while a merge is unfinished: may the VM start, and can the merge be undone.

The rule: as long as top is there, it shows what the guest saw last. A commit writes what top hides
until base is switched, and from then on both show the same; a pull changes top in one write.
A guest that writes to top before the merge is finished costs time and nothing else: the rerun sees
it, and merges once more. Base must not be used by itself in that time: a rerun would take what a
guest has written there for its own work. Only a live merge of the active layer is another case, as
its guest goes on in base.

``docs/design.md`` has what a kill leaves in each state.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.documents.plan import EngineName
from chainmerge.errors import ChainmergeError
from chainmerge.records.changes import is_there, what_stands_at
from chainmerge.records.identity import Sameness
from chainmerge.records.merge_journal import is_without_effect
from chainmerge.records.merged_record import is_pulled
from chainmerge.records.request import shell_line

if TYPE_CHECKING:
    from chainmerge.records.disks import DiskEntry
    from chainmerge.records.identity import ImageIdentity
    from chainmerge.records.live_journal import LiveJournal
    from chainmerge.records.merge_journal import Journal
    from chainmerge.records.merged_record import MergedRecord, Pulled
    from chainmerge.records.saved_bitmaps import SavedBitmaps
    from chainmerge.records.thinning import Thinning


class VmStart(Struct, frozen=True):
    """Whether the VM may start.

    Attributes:
        may: Whether it may, from ``image`` or from one on it.
        image: What shows what the guest wrote last; None if that is not known.
        reason: Why, in a sentence.
    """

    may: bool
    image: str | None
    reason: str


class WaysOut(Struct, frozen=True):
    """What can be done while a merge is unfinished.

    Attributes:
        start: Whether the VM may start.
        cancel: The image to name for the merge to be undone; None if it cannot be.
        no_cancel: Why it cannot be, in a sentence; empty if it can.
    """

    start: VmStart
    cancel: str | None = None
    no_cancel: str = ""

    @property
    def cancel_command(self) -> str | None:
        """What undoes the merge, as one types it into a shell."""
        return None if self.cancel is None else shell_line(["chainmerge", "cancel", self.cancel])


_NOT_BEFORE: Final = "not before the merge is finished"
_NOBODY_KNOWS: Final = "what is recorded does not show which image is right"
_HALF_WRITTEN: Final = (
    "data has been written over base's own, so that base is neither the old nor the new image; "
    "only finishing the merge changes that"
)
_TOOK_EFFECT: Final = "the merge has taken effect, and can only be finished"
_BEGUN_IN_VM: Final = (
    "it was begun in a running VM: `chainmerge live resume` continues it while the VM is "
    "running, and a merge of the closed images finishes it afterwards"
)
_UNKNOWN_STATE: Final = "what is recorded does not show how far the merge got"
NOT_KNOWN: Final = WaysOut(
    VmStart(may=False, image=None, reason=f"{_NOT_BEFORE}: {_NOBODY_KNOWS}"),
    no_cancel=_UNKNOWN_STATE,
)


def of_journal(
    journal: Journal, saved: SavedBitmaps | None, base: Path | None, *, holds: bool | None
) -> WaysOut:
    """Of a merge of closed images into *base*, which *holds* everything; None if nobody knows.

    *saved* are the bitmaps of base that some merge has saved.
    """
    if base is None:
        return NOT_KNOWN
    without_effect = is_without_effect(journal, saved, holds=holds)
    start = _start_in_commit(journal, base, holds=holds, without_effect=without_effect)
    if without_effect:
        return WaysOut(start, cancel=journal.top.path)
    if holds:
        return WaysOut(start, no_cancel=_TOOK_EFFECT)
    if journal.engine == EngineName.QEMU or holds is False:
        return WaysOut(start, no_cancel=_HALF_WRITTEN)
    return WaysOut(start, no_cancel=_UNKNOWN_STATE)


def _start_in_commit(
    journal: Journal, base: Path, *, holds: bool | None, without_effect: bool
) -> VmStart:
    top = journal.top.path
    by_qemu = journal.engine == EngineName.QEMU
    if _stands_there(journal.top):
        if holds is None and not by_qemu:
            return NOT_KNOWN.start
        if holds:
            return _yes(top, f"{top} shows everything, and so does base; do not start it from base")
        if without_effect:
            return _yes(top, "both show the same as before the merge")
        reason = "it hides the half-written data in base; do not start anything from base itself"
        return _yes(top, f"{reason}, and make no backup by bitmaps" if by_qemu else reason)
    if os.path.realpath(top) == str(base):
        return _yes(top, "base has taken its place, and holds everything, verified")
    # Top is deleted last of all that base needs, and only once base is verified.
    if not os.path.lexists(top) and holds is not False:
        return _yes(str(base), f"it holds everything, verified; {top} is deleted")
    return NOT_KNOWN.start


def of_live_journal(journal: LiveJournal, base: Path | None) -> WaysOut:
    """Of a merge in a VM that does not run."""
    if base is None:
        return WaysOut(NOT_KNOWN.start, no_cancel=_BEGUN_IN_VM)
    above, top = journal.above, journal.top.path
    if above is not None and _stands_there(above):
        start = _yes(above.path, "it shows the same on top and on base")
    elif journal.took_effect and journal.is_active:
        reason = f"{_NOT_BEFORE}: the guest may have written to base since, and not to {top}"
        start = VmStart(may=False, image=str(base), reason=reason)
    elif journal.is_active and _stands_there(journal.top):
        start = _yes(top, "it hides the half-written data in base")
    else:
        start = NOT_KNOWN.start
    return WaysOut(start, no_cancel=_BEGUN_IN_VM)


def of_live_pull(journal: LiveJournal, *, there: bool) -> WaysOut:
    """Of a pull in a VM that does not run; *there* says whether top is where it was."""
    if not there:
        return WaysOut(NOT_KNOWN.start, no_cancel=_BEGUN_IN_VM)
    above = journal.above
    image = journal.top.path if above is None else above.path
    return WaysOut(_yes(image, "top shows the same all the time"), no_cancel=_BEGUN_IN_VM)


def of_saved_bitmaps(saved: SavedBitmaps) -> WaysOut:
    """Of a merge of which only what it saved is left: who copied also wrote over base."""
    if saved.request is None or saved.request.is_live or not is_there(saved.overlay):
        return NOT_KNOWN
    (top, *_) = saved.request.tops
    if not os.path.exists(top):  # noqa: PTH110 (any name will do)
        return NOT_KNOWN
    reason = (
        "it hides the half-written data in base; do not start anything from base itself, and make "
        "no backup by bitmaps"
    )
    return WaysOut(_yes(top, reason), no_cancel=_HALF_WRITTEN)


def of_pull(record: MergedRecord, pulled: Pulled) -> WaysOut:
    """Of a pull, by its record."""
    if not is_there(record.result_identity):
        return NOT_KNOWN
    top = record.result
    try:
        done = is_pulled(record, pulled, Path(record.known_request.tops[0]))
    except ChainmergeError:
        return NOT_KNOWN
    if done:
        return WaysOut(_yes(top, "it holds everything, verified"), no_cancel=_TOOK_EFFECT)
    return WaysOut(_yes(top, "it shows the same as before the merge"), cancel=top)


def of_record(record: MergedRecord, left: list[str], *, holds: bool, unnamed: bool) -> WaysOut:
    """Of a commit that base holds; *left* is still to be deleted, or base is still *unnamed*.

    Nothing else is left of it: nobody can tell whether a VM did it, whose guest went on in base.
    """
    if holds and not unnamed and record.top not in left:
        start = _yes(record.result, "it holds everything, verified")
    else:
        image = record.base if holds else None
        reason = f"{_NOT_BEFORE}: {record.top} is about to be deleted or replaced"
        start = VmStart(may=False, image=image, reason=reason)
    return WaysOut(start, no_cancel=_TOOK_EFFECT)


def of_disk(entry: DiskEntry) -> WaysOut:
    """Of one of several disks that has no other file: it has not begun, or is done."""
    if not os.path.exists(entry.top):  # noqa: PTH110 (any name will do)
        return WaysOut(NOT_KNOWN.start, cancel=entry.base)
    start = _yes(entry.top, "nothing is half done")
    return WaysOut(start, cancel=entry.top)


def of_thinning(thinning: Thinning, *, is_done: bool) -> WaysOut:
    """Of snapshots that are thinned out, as long as none of the merges is half done.

    *is_done* says that all of them are done, which was not noted any more.
    """
    if is_done:
        return WaysOut(_yes(thinning.leaf, "all is merged"), no_cancel=_TOOK_EFFECT)
    if not os.path.exists(thinning.leaf):  # noqa: PTH110 (any name will do)
        return WaysOut(NOT_KNOWN.start, cancel=thinning.leaf)
    return WaysOut(_yes(thinning.leaf, "nothing is half done"), cancel=thinning.leaf)


def _yes(image: str, reason: str) -> VmStart:
    return VmStart(may=True, image=image, reason=reason)


def _stands_there(image: ImageIdentity) -> bool:
    """Whether nothing says that another image has its name now, or none."""
    try:
        return what_stands_at(image.path, image) is not Sameness.OTHER
    except OSError:
        return False
