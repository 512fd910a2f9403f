# SPDX-License-Identifier: Apache-2.0
"""Whether base or the overlays are up to date: what the files themselves show. Reads only.

An overlay can have been left behind: somebody committed it, or a VM switched to base, and the guest
continued there. Merged again, the overlay overwrites newer data. Nothing in the images says so; two
signs together show it: base already has most of what the overlays define, and it was written later
than all of them. Block devices have no times, and equal content alone can have other reasons.

Content is compared by whole clusters at places that are spread over all that the overlays
define: data and zeros. The parts of a cluster that a guest does not write are copied up from below,
so less than a cluster proves nothing; nor does a cluster of zeros where base has nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from chainmerge.chain.comparing import base_shows_all
from chainmerge.errors import ChainmergeError, Interrupted
from chainmerge.planning.encryption import has_encrypted
from chainmerge.planning.facts import Evidence, ImageTimes
from chainmerge.qcow2.mapping import Kind
from chainmerge.records.identity import birth_time, identify, same_image
from chainmerge.records.merged_record import data_written_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chainmerge.chain.model import ImageInfo
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.chain.view import GuestView
    from chainmerge.records.remains import Remains

GLANCE: Final = 16
"""Clusters that are sampled in every merge."""
PLACES: Final = 128
"""The most clusters that are sampled, if base has some of the first ones."""
SAMPLE_BYTES: Final = 16 << 20
"""The most bytes of an image that are read to sample them, except for eight of the largest
clusters."""
COMPARED_BY_A_PLAN: Final = 1 << 30
"""Guest bytes up to which a plan compares everything if all that it sampled is equal."""

_FEWEST: Final = 8
_FEW_LAYERS: Final = 16


def explained_by(remains: Remains, target: Target) -> bool:
    """Whether an earlier run of ours on these images left a record: it may have written to base."""
    now, top = identify(target.base.real_path), identify(target.chain.top.real_path)
    journal, saved, live = remains.journal, remains.saved, remains.live
    if journal is not None and same_image(journal.base, now):
        return same_image(journal.top, top)
    if saved is not None and same_image(saved.base, now):
        return same_image(saved.overlay, identify(target.overlay.real_path))
    return live is not None and same_image(live.top, top)


def weigh(
    target: Target,
    opened: OpenChain,
    defined: int,
    should_stop: Callable[[], bool],
    most_to_compare: int | None,
) -> Evidence:
    """What times and content show.

    Args:
        target: the merge, which no record of ours describes.
        opened: its images.
        defined: guest bytes that the overlays define.
        should_stop: asked while content is compared.
        most_to_compare: guest bytes up to which everything is compared, where all that was
            looked at is equal; None for no limit.

    Raises:
        Interrupted: *should_stop* said so.
    """
    times = tuple(map(times_of, target.chain.images[target.base_index :]))
    found = Evidence(times)
    if not defined or has_encrypted(target.chain):
        return found
    try:
        held, differing = _looked_at(target, opened, defined, GLANCE)
        if held > differing // 3:
            held, differing = _looked_at(target, opened, defined, PLACES)
        if held <= differing:
            return Evidence(times, held, differing)
        equal: bool | None = False
        if not differing:
            equal = None
            if most_to_compare is None or defined <= most_to_compare:
                equal = base_shows_all(opened, target.base_index, should_stop)
    except Interrupted:
        raise
    except ChainmergeError:
        # What cannot be read is said where it has to be read.
        return found
    return Evidence(times, held, differing, equal)


def times_of(image: ImageInfo) -> ImageTimes:
    """When an image was written last, and created, as far as its file system tells.

    Merges of ours that ended under its name do not count: images above it had no part in them, and
    what somebody wrote before them is as old as it was.
    """
    if image.is_block_device:
        return ImageTimes(str(image.path), None, None, image.virtual_size)
    born = birth_time(image.real_path)
    seconds, _, nanoseconds = born.partition(".")
    created = int(seconds) * 10**9 + int(nanoseconds) if born else None
    written = data_written_ns(image.real_path)
    return ImageTimes(str(image.path), written, created, image.virtual_size)


def _looked_at(target: Target, opened: OpenChain, defined: int, most: int) -> tuple[int, int]:
    """How many of the sampled clusters base holds, and how many differ."""
    index = target.base_index
    below, whole = opened.view(0, index + 1), opened.view()
    base = opened.view(index, index + 1)
    raw = target.base.header is None
    cluster = max(image.layer.cluster_size for image in opened.images[index:])
    places = min(most, max(SAMPLE_BYTES // cluster, _FEWEST))
    spread = list(_spread(target, opened, defined, places))
    at = {offset // cluster * cluster: offset for offset in reversed(spread)}
    pieces = [(start, min(cluster, whole.virtual_size - start)) for start in sorted(at)]
    held = differing = 0
    if target.chain.root.foreign and index:
        # QEMU is not started for a sample. What base does not hold was not merged into it.
        left = [piece for piece in pieces if _leaves_to_root(below, *piece)]
        pieces, differing = [piece for piece in pieces if piece not in left], len(left)
    for (start, _), theirs, ours in zip(
        pieces, _read(below, pieces), _read(whole, pieces), strict=True
    ):
        if ours != theirs:
            differing += 1
        elif _defines(base, at[start]) and (any(ours) or not raw):
            held += 1
    return held, differing


def _read(view: GuestView, pieces: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The content of ascending pieces of a view, given by guest offset and length.

    To find one place in a chain, every image of it is asked. A long one is walked through once.
    """
    if len(view.layers) <= _FEW_LAYERS:
        yield from (view.read(start, length) for start, length in pieces)
        return
    walk = view.resolve()
    runs = next(walk)
    for start, length in pieces:
        while runs.end <= start:
            runs = next(walk)
        end = start + length
        if end <= runs.end:
            yield view.read_runs(runs.clipped(start, end))
        else:
            yield view.read(start, length)


def _defines(base: GuestView, at: int) -> bool:
    """Whether an image says anything itself of the guest byte *at*."""
    if at >= base.virtual_size:
        return False
    return all(bool((runs.kind != Kind.UNALLOCATED).all()) for runs in base.resolve(at, at + 1))


def _leaves_to_root(view: GuestView, start: int, length: int) -> bool:
    """Whether the root decides any of a piece."""
    return any(bool((runs.layer == 0).any()) for runs in view.resolve(start, start + length))


def _spread(target: Target, opened: OpenChain, defined: int, places: int) -> Iterator[int]:
    """Guest offsets of *places* bytes, evenly spread over what the overlays define."""
    overlays = opened.view(target.base_index + 1)
    wanted = np.array([(2 * n + 1) * defined // (2 * places) for n in range(places)], np.uint64)
    before = 0
    for runs in overlays.resolve(0, overlays.virtual_size):
        defines = runs.kind != Kind.UNALLOCATED
        guest, length = runs.guest[defines], runs.length[defines]
        ends = np.cumsum(length, dtype=np.uint64) + np.uint64(before)
        if not len(ends):
            continue
        here = wanted[(wanted >= before) & (wanted < ends[-1])]
        index = np.searchsorted(ends, here, "right")
        yield from (guest[index] + length[index] - (ends[index] - here)).tolist()
        before = int(ends[-1])
