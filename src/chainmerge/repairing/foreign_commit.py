# SPDX-License-Identifier: Apache-2.0
"""Evidence of an unfinished ``qemu-img commit``. Reads only.

Such a commit copies top's data into base, from the beginning of the disk to its end, and
empties top only when all is there. Killed before that it leaves top as it was, and base half
written below it. Top still shows the right content, base alone shows neither the old nor the
new. Data for which base had no clusters may not be seen in it: QEMU (7.2) keeps new tables in
memory as long as it can, and they die with it.

Nothing in the images names it. What shows it is that what top defines, zeros included, stands in
base already, from its beginning on, and not to its end: else the commit, or a merge, is finished.
A guest can have written the same again, so that alone is not enough: it must be a mebibyte of data
at least, and base must also have the marks of a writer that died (bitmaps in-use, leaked clusters,
the dirty bit), which it cannot have got by being read.
"""

from __future__ import annotations

import contextlib
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.bitmaps.rules import BitmapState
from chainmerge.bitmaps.stored import state_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.opening import OpenImage, open_chain
from chainmerge.chain.target import policy_of
from chainmerge.errors import ChainmergeError
from chainmerge.qcow2.check import check
from chainmerge.qcow2.mapping import Kind
from chainmerge.records.remains import is_left_over, read_remains

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.chain.view import GuestView
    from chainmerge.options import Access

# QEMU has at most 16 MiB of a commit under way at a time.
_LOOK_AT: Final = 64 << 20
_PIECE: Final = 1 << 20
# A guest that writes what is there already does not write so much of it, in so many places.
_CONVINCING: Final = 1 << 20
_CONVINCING_CLUSTERS: Final = 16


class HalfDoneCommit(Struct, frozen=True):
    """A commit of *top* into *base* by another program.

    Attributes:
        base: The image that it writes to.
        top: The image whose data it copies.
        copied: Bytes, not counting zeros, at the beginning of top's data that base has too.
        data: Guest bytes of which top has data.
        reached: Where on the guest's disk the first difference is, or how far was looked.
        marks: The marks that base has of a writer that died, in words.
    """

    base: Path
    top: Path
    copied: int
    data: int
    reached: int
    marks: tuple[str, ...]

    @property
    def is_certain(self) -> bool:
        """Whether a writer to base died, so that this is what it was at."""
        return bool(self.marks)


def half_done_commit(top: Path, access: Access) -> HalfDoneCommit | None:
    """Whether a commit of *top* into its backing file was interrupted.

    Says no where the chain cannot be read, or is that of an interrupted merge of ours.
    """
    with contextlib.suppress(ChainmergeError):
        chain = discover(top, policy_of(access))
        if len(chain.images) < 2:
            return None
        base, uppermost = chain.base, chain.top.real_path
        remains = read_remains(base.real_path, uppermost)
        if remains.journal or remains.journal_problem or remains.usable_saved:
            return None
        if is_left_over(remains.record, base.real_path, uppermost):
            # Ours, and it came to its end.
            return None
        with open_chain(chain) as opened:
            index = chain.base_index
            if not all(_can_be_compared(image) for image in opened.images[index:]):
                return None
            found = _compared(
                opened.view(index + 1), opened.view(index, index + 1), opened.view(0, index + 1)
            )
            if found is not None:
                marks = tuple(_marks(opened.images[index]))
                return HalfDoneCommit(
                    base.path, chain.top.path, found.copied, found.data, found.reached, marks
                )
    return None


def _can_be_compared(image: OpenImage) -> bool:
    """Whether what an image's tables lead to is its own."""
    return image.image is None or not check(image.image).corruptions


def _marks(base: OpenImage) -> Iterator[str]:
    """What shows that a writer to the image died."""
    image = base.image
    if image is None:
        return
    if image.header.dirty:
        yield "its dirty bit is set"
    in_use = [
        entry.name for entry in base.info.bitmaps if state_of(image, entry) is BitmapState.IN_USE
    ]
    if in_use:
        yield f"it has inconsistent (in-use) bitmaps: {', '.join(map(repr, in_use))}"
    leaks = check(image).leaks
    if leaks:
        yield f"it has {counted(leaks, 'leaked cluster')}"


class _Compared(Struct, frozen=True):
    copied: int
    data: int
    reached: int


def _compared(top: GuestView, base: GuestView, shown: GuestView) -> _Compared | None:
    """What base has of the beginning of what top defines; None if that proves nothing.

    Nor does it where base has the end of it as well: nothing is half done then.

    Args:
        top: The image that is committed, alone.
        base: The image below it, alone.
        shown: The same with what it stands on.
    """
    # What a guest does not write of a cluster is copied up from base, and is the same there.
    cluster = max(layer.cluster_size for layer in top.layers)
    convincing = max(_CONVINCING, _CONVINCING_CLUSTERS * cluster)
    copied = looked_at = reached = 0
    differs = False
    for one in _defined(top):
        reached = one.start
        if one.start >= base.virtual_size or not _is_there(one, top, base, shown):
            differs = True
            break
        reached = one.end
        looked_at += one.end - one.start
        if one.is_data:
            content = top.read(one.start, one.end - one.start)
            copied += len(content) - content.count(0)
        if looked_at >= max(_LOOK_AT, convincing):
            break
    if copied < convincing:
        return None
    data, end = _end_of(top)
    if not differs and all(_is_there(one, top, base, shown) for one in end):
        return None
    return _Compared(copied, data, reached)


class _Piece(Struct, frozen=True):
    """Guest bytes *start* to *end*, of which an image has data or zeros."""

    start: int
    end: int
    is_data: bool


def _is_there(one: _Piece, top: GuestView, base: GuestView, shown: GuestView) -> bool:
    """Whether base has what top has there. Zeros need not be stored to be there."""
    length = one.end - one.start
    if one.end > base.virtual_size:
        return False
    if one.is_data:
        return top.read(one.start, length) == base.read(one.start, length)
    return not any(shown.read(one.start, length))


def _defined(view: GuestView) -> Iterator[_Piece]:
    """The ranges of guest bytes that an image defines, in pieces."""
    for start, length, is_data in _runs(view):
        for at in range(start, start + length, _PIECE):
            yield _Piece(at, min(at + _PIECE, start + length), is_data)


def _end_of(view: GuestView) -> tuple[int, list[_Piece]]:
    """How many bytes of data an image has, and the last pieces of what it defines."""
    data = 0
    last: deque[tuple[int, int, bool]] = deque(maxlen=_LOOK_AT // _PIECE)
    for start, length, is_data in _runs(view):
        data += length if is_data else 0
        last.append((start, length, is_data))
    pieces: list[_Piece] = []
    for start, length, is_data in reversed(last):
        end = start + length
        while end > start and len(pieces) < _LOOK_AT // _PIECE:
            pieces.append(_Piece(max(start, end - _PIECE), end, is_data))
            end -= _PIECE
    return data, pieces


def _runs(view: GuestView) -> Iterator[tuple[int, int, bool]]:
    for runs in view.resolve():
        stored = (runs.kind == Kind.DATA) | (runs.kind == Kind.COMPRESSED)
        defined = runs.kind != Kind.UNALLOCATED
        starts, lengths = runs.guest[defined].tolist(), runs.length[defined].tolist()
        yield from zip(starts, lengths, stored[defined].tolist(), strict=True)
