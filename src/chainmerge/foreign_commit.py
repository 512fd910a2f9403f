# SPDX-License-Identifier: Apache-2.0
"""Evidence of a ``qemu-img commit`` that did not come to its end. Reads only.

Such a commit copies top's data into base, from the beginning of the disk to its end, and
empties top only when all is there. Killed before that it leaves top as it was, and base half
written below it. Top still shows the right content, base alone shows neither the old nor the
new. Data for which base had no clusters may not be seen in it: QEMU (7.2) keeps new tables in
memory as long as it can, and they die with it.

Nothing in the images names it. What shows it is that top's data stands in base already, from
its beginning on. A guest can have written the same again, so that alone is not enough: base
must also have the marks of a writer that died (bitmaps in-use, leaked clusters, the dirty
bit), which it cannot have got by being read.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.chain import discover
from chainmerge.checkpoints import BitmapState
from chainmerge.errors import ChainmergeError
from chainmerge.inspection import OpenImage, open_chain, policy_of
from chainmerge.qcow2.check import check
from chainmerge.qcow2.mapping import Kind
from chainmerge.records.merge_journal import journal_file
from chainmerge.records.merged_record import load_merged_record
from chainmerge.records.remains import is_left_over
from chainmerge.records.saved_bitmaps import load_saved_bitmaps
from chainmerge.results import state_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.options import Access
    from chainmerge.view import GuestView

# QEMU has at most 16 MiB of a commit under way at a time.
_LOOK_AT: Final = 64 << 20
_PIECE: Final = 1 << 20
# A guest that writes what is there already does not write so much of it, in so many places.
_CONVINCING: Final = 1 << 20
_CONVINCING_CLUSTERS: Final = 16


@dataclass(frozen=True, slots=True)
class HalfDoneCommit:
    """A commit of *top* into *base* that somebody else began."""

    base: Path
    top: Path
    copied: int
    """Guest bytes at the beginning of top's data that base has already, at least."""
    is_certain: bool
    """Whether base has the marks of a writer that died."""


def half_done_commit(top: Path, access: Access) -> HalfDoneCommit | None:
    """Whether a commit of *top* into its backing file was interrupted.

    Says no where the chain cannot be read, or is that of an interrupted merge of ours.
    """
    with contextlib.suppress(ChainmergeError):
        chain = discover(top, policy_of(access))
        if len(chain.images) < 2:
            return None
        base, uppermost = chain.base, chain.top.real_path
        if journal_file(base.real_path).exists() or load_saved_bitmaps(base.real_path) is not None:
            return None
        if is_left_over(load_merged_record(uppermost), base.real_path, uppermost):
            # Ours, and it came to its end.
            return None
        with open_chain(chain) as opened:
            index = chain.base_index
            if not all(_can_be_compared(image) for image in opened.images[index:]):
                return None
            copied = _copied(opened.view(index + 1), opened.view(index, index + 1))
            if copied is not None:
                is_certain = _died_writing(opened.images[index])
                return HalfDoneCommit(base.path, chain.top.path, copied, is_certain)
    return None


def _can_be_compared(image: OpenImage) -> bool:
    """Whether what an image's tables lead to is its own."""
    return image.image is None or not check(image.image).corruptions


def _died_writing(base: OpenImage) -> bool:
    image = base.image
    if image is None:
        return False
    if image.header.dirty:
        return True
    if any(state_of(image, entry) is BitmapState.IN_USE for entry in base.info.bitmaps):
        return True
    return check(image).leaks > 0


def _copied(top: GuestView, base: GuestView) -> int | None:
    """How much of the beginning of top's data base has; None where that proves nothing."""
    # What a guest does not write of a cluster is copied up from base, and is the same there.
    cluster = max(layer.cluster_size for layer in top.layers)
    convincing = max(_CONVINCING, _CONVINCING_CLUSTERS * cluster)
    copied = 0
    for start, end in _data(top):
        if start >= base.virtual_size:
            break
        ours, theirs = top.read(start, end - start), base.read(start, end - start)
        if ours != theirs:
            return copied if copied >= convincing else None
        if any(ours):
            copied += end - start
        if copied >= max(_LOOK_AT, convincing):
            return copied
    return copied or None


def _data(view: GuestView) -> Iterator[tuple[int, int]]:
    """The ranges of guest bytes of which an image has data, in pieces."""
    for runs in view.resolve():
        stored = (runs.kind == Kind.DATA) | (runs.kind == Kind.COMPRESSED)
        starts, lengths = runs.guest[stored].tolist(), runs.length[stored].tolist()
        for start, length in zip(starts, lengths, strict=True):
            for at in range(start, start + length, _PIECE):
                yield at, min(at + _PIECE, start + length)
