# SPDX-License-Identifier: Apache-2.0
"""What can be done about unfinished merges of ours. Reads only.

What had not taken effect can be undone: the image is the old one, with some clusters leaked.
What had, or has half done so, is finished by doing the same merge again.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.errors import ChainmergeError
from chainmerge.options import MergeOptions
from chainmerge.records.changes import is_there
from chainmerge.records.identity import BlockDevices
from chainmerge.records.live_journal import LIVE_JOURNAL
from chainmerge.records.merge_journal import Journal, forget_journal
from chainmerge.records.merged_record import MergedRecord, forget_merged_record, is_pulled
from chainmerge.records.remains import read_leftover
from chainmerge.records.request import options_of
from chainmerge.records.saved_bitmaps import SavedBitmaps, forget_saved_bitmaps
from chainmerge.records.unfinished import status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.documents.status import UnfinishedMerge
    from chainmerge.options import DirectionChoice
    from chainmerge.records.request import RecordedRequest


class Ending(Enum):
    """How an interrupted merge can be ended."""

    FINISH = "do it again, which does what is left"
    UNDO = "forget it: it has not taken effect"
    BY_HAND = "only the person who started it knows what it was for"


class InterruptedMerge(Struct, frozen=True):
    """A merge that was not finished.

    Attributes:
        base: The image merged into.
        top: The uppermost image that is merged; None if that is not known.
        written: The image that the merge writes to.
        ending: What is to be done about it.
        options: What it was to do, as far as it is recorded.
        sentence: How far it got.
    """

    base: Path
    top: Path | None
    written: Path
    ending: Ending
    options: MergeOptions
    sentence: str


def interrupted_merges(image: Path) -> tuple[InterruptedMerge, ...]:
    """The interrupted merges in which *image* takes part; it must not be locked by the caller.

    Raises:
        SearchPathUnusable: the image's directory cannot be read.
    """
    devices = BlockDevices()
    return tuple(
        merge
        for unfinished in status([image]).merges
        if not unfinished.base_is_locked
        for merge in _judged(unfinished, devices)
    )


def forget_merge(merge: InterruptedMerge) -> None:
    """Forget a merge of which nothing has taken effect. The images must be locked."""
    forget_journal(merge.base)
    # Of a native merge these say what base lacks. Base has all that it ever had.
    forget_saved_bitmaps(merge.base)
    if merge.written != merge.base and merge.top is not None:
        forget_merged_record(merge.top)


def _judged(unfinished: UnfinishedMerge, devices: BlockDevices) -> Iterator[InterruptedMerge]:
    """One that is what the first of its files says: a journal says the most.

    One that is only known to be one of several disks has not begun, and its images are whole. A
    live merge is for ``chainmerge live resume``, or the same merge cold, to finish.
    """
    file = Path(unfinished.files[0])
    if LIVE_JOURNAL.is_called(file.name):
        return
    try:
        match read_leftover(file, devices):
            case Journal() as journal:
                yield _of_journal(unfinished, journal)
            case SavedBitmaps() as saved:
                yield _of_saved(unfinished, saved, file)
            case MergedRecord() as record:
                yield _of_record(unfinished, record)
    except ChainmergeError as error:
        yield _by_hand(unfinished, error.sentence)


def _by_hand(unfinished: UnfinishedMerge, why: str) -> InterruptedMerge:
    top = None if unfinished.top is None else Path(unfinished.top)
    base = Path(unfinished.base)
    sentence = f"a merge into {base} was interrupted: {why}"
    return InterruptedMerge(base, top, base, Ending.BY_HAND, MergeOptions(), sentence)


def _of_journal(unfinished: UnfinishedMerge, journal: Journal) -> InterruptedMerge:
    if unfinished.command is None:
        return _by_hand(unfinished, unfinished.progress)
    base, top = Path(journal.base.path), Path(journal.top.path)
    return InterruptedMerge(
        base=base,
        top=top,
        written=base,
        ending=Ending.FINISH if unfinished.cancel_command is None else Ending.UNDO,
        options=_asked(journal.known_request, "commit"),
        sentence=f"a merge of {top} into {base} was interrupted: {unfinished.progress}",
    )


def _of_saved(unfinished: UnfinishedMerge, saved: SavedBitmaps, file: Path) -> InterruptedMerge:
    for one in (saved.base, saved.overlay):
        if not is_there(one):
            return _by_hand(unfinished, f"{one.path} does not exist any more")
    base, top = Path(saved.base.path), Path(saved.overlay.path)
    options = MergeOptions(direction="commit")
    if saved.request is not None:
        top, options = Path(saved.request.tops[0]), _asked(saved.request, "commit")
    return InterruptedMerge(
        base=base,
        top=top,
        written=base,
        ending=Ending.FINISH,
        options=options,
        sentence=(
            f"a merge of {top} into {base} was interrupted while data was being copied, and "
            f"{base} is half written; its bitmaps are saved in {file}"
        ),
    )


def _of_record(unfinished: UnfinishedMerge, record: MergedRecord) -> InterruptedMerge:
    base, top = Path(record.base), Path(record.top)
    if record.pulled is None:
        options = _asked(record.known_request, "commit")
        sentence = f"a merge of {top} into {base} was interrupted: {unfinished.progress}"
        return InterruptedMerge(base, top, base, Ending.FINISH, options, sentence)
    options = _asked(record.known_request, "pull")
    done = is_pulled(record, record.pulled, Path(record.known_request.tops[0]))
    how_far = (
        "all data is there, but nothing is cleaned up yet" if done else "nothing had taken effect"
    )
    sentence = f"a pull from {base} up into {top} was interrupted: {how_far}"
    ending = Ending.FINISH if done else Ending.UNDO
    return InterruptedMerge(base, top, top, ending, options, sentence)


def _asked(request: RecordedRequest, direction: DirectionChoice) -> MergeOptions:
    """What was asked for, in the direction that it took."""
    return replace(options_of(request) or MergeOptions(), direction=direction)
