# SPDX-License-Identifier: Apache-2.0
"""Looks at the disk and gathers the facts that a plan rests on. Reads only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chainmerge.bitmaps.rules import (
    NOWHERE,
    BitmapState,
    Decision,
    Fate,
    LayerBitmaps,
    Occurrence,
    decide,
)
from chainmerge.bitmaps.stored import state_of
from chainmerge.chain import (
    Chain,
    ChainPolicy,
    Identity,
    ImageInfo,
    Relatives,
    discover,
    identity_of,
    open_image,
)
from chainmerge.chain.activation import inactive_neighbours
from chainmerge.chain.readability import require_data_in_files
from chainmerge.chain.reading import identity_at
from chainmerge.chain.relatives import find_relatives
from chainmerge.chain.view import NO_LAYER, GuestView, Layer, in_step, layer_of_qcow2, layer_of_raw
from chainmerge.options import Direction
from chainmerge.planning.errors import BaseNotBelowTop
from chainmerge.planning.plan import Movement
from chainmerge.qcow2.bitmaps import (
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
    BitmapEntry,
    read_bits,
    read_table,
)
from chainmerge.qcow2.bits import BitSet, is_storable, union_all
from chainmerge.qcow2.extents import distinct
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import Kind
from chainmerge.qcow2.readable import Readable
from chainmerge.qcow2.remembered import MappingMemory
from chainmerge.records.errors import LeftoverUnclear
from chainmerge.records.identity import Sameness, compare, identify
from chainmerge.records.saved_bitmaps import SavedBitmap, SavedBitmaps, saved_bitmaps_file
from chainmerge.storage.files import FileReadable
from chainmerge.storage.limits import allow_open_files

if TYPE_CHECKING:
    from chainmerge.options import Access
    from chainmerge.storage.locks import ImageLock

MIN_GRANULARITY = 1 << MIN_GRANULARITY_BITS
MAX_GRANULARITY = 1 << MAX_GRANULARITY_BITS


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An image of the chain, open for reading."""

    info: ImageInfo
    readable: Readable
    image: Qcow2Image | None
    layer: Layer
    entries: Mapping[str, BitmapEntry]
    """The image's bitmaps by name: there can be 65,535 of them."""

    def entry(self, name: str) -> BitmapEntry | None:
        """The image's bitmap of that name."""
        return self.entries.get(name)

    def bits(self, name: str) -> BitSet:
        """The content of a bitmap that is known to be there and readable."""
        entry = self.entry(name)
        assert self.image is not None
        assert entry is not None
        return read_bits(self.image, entry)


@dataclass(frozen=True, slots=True)
class OpenChain:
    """All images of a chain, root first, open for reading."""

    images: tuple[OpenImage, ...]

    def view(self, first: int = 0, stop: int | None = None) -> GuestView:
        """What a guest sees of the images from *first* to before *stop*."""
        return GuestView(tuple(image.layer for image in self.images[first:stop]))


@dataclass(frozen=True, slots=True)
class Target:
    """A merge that was asked for: top's chain, base's place in it, and who else is around."""

    chain: Chain
    base_index: int
    relatives: Relatives

    @property
    def base(self) -> ImageInfo:
        """The image merged into."""
        return self.chain.images[self.base_index]

    def result_index(self, direction: Direction) -> int:
        """Which image of the chain is written."""
        return len(self.chain.images) - 1 if direction is Direction.PULL else self.base_index

    @property
    def overlay(self) -> ImageInfo:
        """The image directly above base."""
        return self.chain.images[self.base_index + 1]


@dataclass(frozen=True, slots=True)
class BitmapFacts:
    """The bitmaps of a chain, and what becomes of them.

    ``layers`` goes from root to top and has base's checkpoints as they were before an
    interrupted merge; ``recovered`` names those. ``final_bits`` has the union for each
    name that is kept, of the disk's final size; ``base_bits`` what base itself has of it.
    """

    layers: tuple[LayerBitmaps, ...]
    decisions: tuple[Decision, ...]
    final_bits: Mapping[str, BitSet]
    base_bits: Mapping[str, BitSet]
    recovered: frozenset[str]
    warnings: tuple[str, ...]


def policy_of(access: Access, *named: str | Path | None) -> ChainPolicy:
    """The rules for following backing names that the caller's options ask for.

    Args:
        access: the options.
        named: images that the caller has named besides; None for one that he has not.
    """
    return ChainPolicy(
        named=tuple(Path(path) for path in (*named, access.active) if path is not None),
        allow_backing=tuple(Path(path) for path in access.allow_backing),
        allow_data_files=tuple(Path(path) for path in access.allow_data_file),
        formats={Path(path): name for path, name in access.formats.items()},
    )


def metadata_policy_of(access: Access, *named: str | Path | None) -> ChainPolicy:
    """As :func:`policy_of`, where no guest data is going to be read."""
    return replace(policy_of(access, *named), metadata_only=True)


def relatives_of(
    chain: Chain, base_index: int, access: Access, policy: ChainPolicy | None = None
) -> Relatives:
    """Who else uses the images of a chain from base up, as far as that can be found out.

    Args:
        chain: the chain of top.
        base_index: where base is in it.
        access: where to look.
        policy: by which the chain was found; by default that of *access*.

    Raises what :func:`chainmerge.chain.find_relatives` raises.
    """
    found = find_relatives(
        chain,
        base_index,
        search=tuple(Path(path) for path in access.search),
        active=Path(access.active) if access.active else None,
        policy=policy or policy_of(access),
    )
    return replace(
        found,
        searched=replace(found.searched, sole_user=access.sole_user),
        inactive=inactive_neighbours(chain),
    )


def find_target(top: Path, base: Path | None, access: Access) -> Target:
    """Find the chain of *top*, base in it (top's backing file by default), and its relatives.

    Where ``access.active`` names base, the guest writes to base, as after a live merge. Nothing
    that stands on top is found from there, so it is not looked at here.

    Raises:
        BaseNotBelowTop, NoBackingFile, and what discovery raises.
    """
    policy = policy_of(access, top, base)
    chain = discover(top, policy)
    base_index = chain.base_index if base is None else chain.index_of(base)
    if base_index == len(chain.images) - 1:
        raise BaseNotBelowTop(str(base), str(top))
    if access.active is not None:
        active = identity_at(Path(access.active))
        if active == chain.images[base_index].identity:
            access = replace(access, active=None)
    return Target(chain, base_index, relatives_of(chain, base_index, access, policy))


@contextlib.contextmanager
def open_chain(chain: Chain, locks: Sequence[ImageLock] = ()) -> Iterator[OpenChain]:
    """Open every image of a chain for reading, each being still the one that was found.

    Images that are locked are read through their locks, so that a chain takes one descriptor
    for each image, whether it is locked or not. They are never opened a second time.

    Args:
        chain: the chain.
        locks: locks on some of its images, or on others; all held for longer than the context.

    Raises:
        ImageReplaced: an image is another one now.
        OpenFilesLimited: so many files cannot be open at a time.
        Refused: one cannot be opened.
    """
    locked = {identity_of(os.fstat(lock.fileno())): lock for lock in locks}
    to_open = [image for image in chain.images if image.identity not in locked]
    allow_open_files(len(to_open) + sum(image.data_file is not None for image in chain.images))
    with contextlib.ExitStack() as stack:
        memory = MappingMemory()
        yield OpenChain(tuple(_open(stack, info, locked, memory) for info in chain.images))


def _open(
    stack: contextlib.ExitStack,
    info: ImageInfo,
    locked: Mapping[Identity, ImageLock],
    memory: MappingMemory,
) -> OpenImage:
    lock = locked.get(info.identity)
    readable = stack.enter_context(open_image(info)) if lock is None else lock.reader()
    if info.header is None:
        return OpenImage(info, readable, None, layer_of_raw(readable), {})
    image = Qcow2Image(readable)
    data: Readable = readable
    if info.data_file is not None:
        data = stack.enter_context(FileReadable(info.data_file))
    entries = {entry.name: entry for entry in info.bitmaps}
    return OpenImage(info, readable, image, layer_of_qcow2(image, data, memory.walk), entries)


def bitmaps_of(opened: OpenImage) -> LayerBitmaps:
    """The bitmaps of one image as the rules see them."""
    image = opened.image
    occurrences = {
        entry.name: Occurrence(
            state := state_of(image, entry),
            entry.granularity,
            _is_empty(opened, entry) if state is BitmapState.DISABLED else None,
        )
        for entry in opened.info.bitmaps
        if image is not None
    }
    return LayerBitmaps(str(opened.info.path), occurrences, opened.info.supports_bitmaps)


def _is_empty(opened: OpenImage, entry: BitmapEntry) -> bool:
    assert opened.image is not None
    return not np.any(read_table(opened.image, entry))


def gather_bitmaps_to_pull(target: Target, opened: OpenChain) -> BitmapFacts:
    """As :func:`gather_bitmaps` where top is the result: what base holds, top will."""
    on_disk = [bitmaps_of(image) for image in opened.images]
    index = target.base_index
    on_disk[index] = replace(on_disk[index], supports_bitmaps=on_disk[-1].supports_bitmaps)
    above = frozenset(entry.name for one in target.relatives.above for entry in one.image.bitmaps)
    decisions = decide(on_disk, index, above, top_stays=False)
    kept = [decision for decision in decisions if decision.fate is Fate.KEEP]
    base_bits = {
        decision.name: opened.images[index].bits(decision.name)
        for decision in kept
        if on_disk[index].state(decision.name) is BitmapState.VALID
    }
    size = target.chain.top.virtual_size
    final = {decision.name: _unite(decision, opened, index, base_bits, size) for decision in kept}
    return BitmapFacts(tuple(on_disk), decisions, final, base_bits, frozenset(), ())


def gather_bitmaps(
    target: Target, opened: OpenChain, saved: SavedBitmaps | None, *, top_stays: bool
) -> BitmapFacts:
    """Decide on every bitmap, and unite the bits of those that are kept.

    Raises LeftoverUnclear.
    """
    on_disk = tuple(bitmaps_of(image) for image in opened.images)
    base_index = target.base_index
    saved_bits, warnings = _usable_saved(target, opened, on_disk, saved)
    layers = (
        *on_disk[:base_index],
        _with_saved(on_disk[base_index], saved_bits),
        *on_disk[base_index + 1 :],
    )
    decisions = decide(layers, base_index, names_above(target), top_stays=top_stays)
    kept = [decision for decision in decisions if decision.fate is Fate.KEEP]
    on_base = opened.images[base_index]
    base_bits = {
        name: bits if (bits := saved_bits.get(name)) is not None else on_base.bits(name)
        for name in (decision.name for decision in kept)
        if layers[base_index].state(name) is BitmapState.VALID
    }
    size = max(target.base.virtual_size, target.chain.top.virtual_size)
    final = {
        decision.name: _unite(decision, opened, base_index, base_bits, size) for decision in kept
    }
    return BitmapFacts(layers, decisions, final, base_bits, frozenset(saved_bits), warnings)


def names_above(target: Target) -> frozenset[str]:
    """Names of bitmaps in images that read base without being part of the merge.

    Siblings count, with what stands on them: where they are allowed at all, they are children
    of top that an interrupted run has re-pointed already. Before that it has left in base what
    keeps their broken checkpoints from looking whole, so what base does not name needs nothing.
    """
    above = {entry.name for one in target.relatives.above for entry in one.image.bitmaps}
    beside = {entry.name for image in target.relatives.beside for entry in image.bitmaps}
    return frozenset(above | beside & {entry.name for entry in target.base.bitmaps})


def _usable_saved(
    target: Target,
    opened: OpenChain,
    on_disk: Sequence[LayerBitmaps],
    saved: SavedBitmaps | None,
) -> tuple[dict[str, BitSet | None], tuple[str, ...]]:
    """What an interrupted merge saved of base's bitmaps, as far as it belongs to this chain.

    None stands for a name that base did not have: where base has it now, in whatever state, the
    interrupted merge has put it there.

    Raises LeftoverUnclear.
    """
    if saved is None:
        return {}, ()
    base, overlay = on_disk[target.base_index], on_disk[target.base_index + 1]
    answers = (
        compare(saved.base, identify(target.base.real_path)),
        compare(saved.overlay, identify(target.overlay.real_path)),
    )
    same = all(answer is Sameness.SAME for answer in answers)
    unclear = not same and Sameness.OTHER not in answers
    usable: dict[str, BitSet | None] = {}
    lost: list[str] = []
    for bitmap in saved.bitmaps:
        state = base.state(bitmap.name)
        needed = state in (BitmapState.DISABLED, BitmapState.IN_USE)
        if bitmap.in_base is None:
            if state is not BitmapState.ABSENT and unclear:
                raise _unclear(target, answers)
            if same and state is not BitmapState.ABSENT:
                usable[bitmap.name] = None
        elif needed and same and _still_covers(opened, target, overlay, bitmap):
            usable[bitmap.name] = bitmap.in_base
        elif needed and unclear:
            raise _unclear(target, answers)
        elif needed:
            lost.append(bitmap.name)
    if not lost:
        return usable, ()
    warning = (
        f"an interrupted merge saved the bitmaps {', '.join(map(repr, lost))} of "
        f"{target.base.path}, but what stands on it now is not what stood on it then: they are "
        "lost, and the next backup that builds on them must be a full one"
    )
    return usable, (warning,)


def _unclear(target: Target, answers: tuple[Sameness, Sameness]) -> LeftoverUnclear:
    """That nothing tells whether what is saved belongs to this chain."""
    image = target.base if answers[0] is Sameness.UNKNOWN else target.overlay
    file = saved_bitmaps_file(target.base.real_path)
    consequence = "the next backup that builds on the bitmaps that it holds must be a full one"
    return LeftoverUnclear(str(file), str(image.path), consequence)


def _still_covers(
    opened: OpenChain, target: Target, overlay: LayerBitmaps, saved: SavedBitmap
) -> bool:
    """Whether the overlay's bits are those that it had, or more."""
    then = saved.in_overlay
    if then is None or overlay.state(saved.name) is not BitmapState.VALID:
        return False
    now = opened.images[target.base_index + 1].bits(saved.name)
    return now.with_geometry(then.disk_size, then.granularity).covers(then)


def _with_saved(base: LayerBitmaps, saved: Mapping[str, BitSet | None]) -> LayerBitmaps:
    revived = {
        name: NOWHERE if bits is None else Occurrence(BitmapState.VALID, bits.granularity, None)
        for name, bits in saved.items()
    }
    return replace(base, occurrences={**base.occurrences, **revived})


def _unite(
    decision: Decision,
    opened: OpenChain,
    base_index: int,
    base_bits: Mapping[str, BitSet],
    size: int,
) -> BitSet:
    assert decision.granularity is not None
    sources = (
        base_bits[decision.name]
        if index == base_index
        else opened.images[index].bits(decision.name)
        for index in decision.sources
    )
    return union_all(sources, size, storable_granularity(size, decision.granularity))


def storable_granularity(disk_size: int, wanted: int) -> int:
    """*wanted*, or the next coarser granularity (bytes) at which QEMU stores such a bitmap.

    A larger disk can make a bitmap too large to be stored as finely as before. A coarser
    one covers the same writes.
    """
    granularity = min(max(wanted, MIN_GRANULARITY), MAX_GRANULARITY)
    while granularity < MAX_GRANULARITY and not is_storable(disk_size, granularity):
        granularity *= 2
    return granularity


@dataclass(frozen=True, slots=True)
class Volumes:
    """Guest bytes that the merged range and base define.

    ``undefined`` are those that base does not define yet, ``undefined_zeros`` those of them that
    read as zeros in base all the same.
    """

    data: int
    zero: int
    compressed: int
    pull: int
    undefined: int
    undefined_zeros: int


def measure_guest_bytes(target: Target, opened: OpenChain) -> Volumes:
    """Count what moves, what would move the other way, and what base does not define yet.

    All in guest bytes. Reads the tables of all images of the range and of base, once.
    """
    size = target.chain.top.virtual_size
    base_size = target.base.virtual_size
    below_base = target.chain.images[: target.base_index]
    backing_end = below_base[-1].virtual_size if below_base else 0
    merged = opened.view(target.base_index + 1)
    base = opened.view(target.base_index, target.base_index + 1)
    top_layer = len(merged.layers) - 1
    data = zero = compressed = pull = undefined = undefined_zeros = 0
    for upper, lower in in_step(merged.resolve(0, size), base.resolve(0, size)):
        require_data_in_files(merged, upper)
        by_kind = np.bincount(upper.kind, weights=upper.length, minlength=len(Kind))
        data += int(by_kind[Kind.DATA])
        zero += int(by_kind[Kind.ZERO] + by_kind[Kind.ZERO_ALLOCATED])
        compressed += int(by_kind[Kind.COMPRESSED])
        # Data has a layer, other than zeros: that between base and top goes up as well.
        comes_up = (upper.layer != NO_LAYER) & (upper.layer != top_layer)
        pull += int(upper.length[comes_up].sum())
        bounds = distinct(np.concatenate([upper.guest, lower.guest]))
        above, below = upper.cut_at(bounds), lower.cut_at(bounds)
        free = above.kind == Kind.UNALLOCATED
        stored = (below.kind == Kind.DATA) | (below.kind == Kind.COMPRESSED)
        pull += int(below.length[free & stored].sum())
        nothing = (below.kind == Kind.UNALLOCATED) | (bounds >= base_size)
        # Where nothing is below base, what it leaves open reads as zeros.
        as_zeros = (above.kind == Kind.ZERO) | (above.kind == Kind.ZERO_ALLOCATED)
        nothing &= ~as_zeros | (bounds < backing_end)
        undefined += int(below.length[~free & nothing].sum())
        nothing &= (bounds >= backing_end) & (bounds < base_size)
        undefined_zeros += int(below.length[~free & nothing].sum())
    return Volumes(data, zero, compressed, pull, undefined, undefined_zeros)


def movement_of(volumes: Volumes) -> Movement:
    """The figures of a plan, as far as they do not depend on the engine."""
    return Movement(volumes.data, volumes.zero, volumes.compressed)
