# SPDX-License-Identifier: Apache-2.0
"""Bitmaps of images that nobody has open: list, add, remove, clear, merge, prune.

Every change is one atomic switch of the image's whole set of bitmaps
(:mod:`chainmerge.engines.metadata`), however many bitmaps it concerns.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.bitmaps.errors import (
    BitmapExists,
    BitmapMissing,
    BitmapsChanged,
    BitmapsImpossible,
    BitmapWorthless,
    BrokenBitmapsInTheWay,
    ClearingUnsafe,
    GranularityInvalid,
    RemovalUnsafe,
    SizesDiffer,
)
from chainmerge.bitmaps.rules import BitmapState, Fate, LayerBitmaps, Occurrence, chain_test
from chainmerge.bitmaps.stored import bitmap_results
from chainmerge.bitmaps.tombstones import tombstone
from chainmerge.chain import Chain, ImageInfo, Relatives, discover, open_for_writing
from chainmerge.chain.reading import identity_at
from chainmerge.chain.target import (
    OpenChain,
    OpenImage,
    Target,
    bitmaps_of,
    find_target,
    gather_bitmaps,
    metadata_policy_of,
    open_chain,
    relatives_of,
    storable_granularity,
)
from chainmerge.chain.unseen_users import unseen_users
from chainmerge.documents.merge import (
    REPORT_VERSION,
    BitmapChange,
    BitmapListing,
    BitmapRow,
    BitmapVerdict,
    PrunedBitmap,
    PruneReport,
)
from chainmerge.engines.metadata import AnyBitmap, KeptBitmap, StoredBitmap, replace_bitmaps
from chainmerge.errors import Refused
from chainmerge.options import Access
from chainmerge.qcow2.bitmaps import BitmapFlag
from chainmerge.qcow2.bits import BitSet, union_all
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.saved_bitmaps import load_saved_bitmaps
from chainmerge.storage.files import FileReadable, read_anew
from chainmerge.storage.limits import allow_open_files
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.storage.other_users import require_alone

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chainmerge.chain import ChainPolicy

_FIND_OUT: Final = "find out which other images use it"
_BEGIN_ABOVE: Final = "name as --base the lowest image that lies beside the active one"


def bitmaps_list(image: str | Path, access: Access | None = None) -> BitmapListing:
    """Every bitmap of a chain, and what each name is worth to a backup read from *image*.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    access = access or Access()
    policy = metadata_policy_of(access, image)
    chain = discover(Path(access.active or image), policy)
    with open_chain(chain) as opened:
        leaf_first = tuple(reversed(opened.images))
        rows = tuple(row for one in leaf_first for row in _rows(one))
        layers = tuple(bitmaps_of(one) for one in leaf_first)
    return BitmapListing(REPORT_VERSION, str(image), rows, tuple(_verdicts(layers)))


def _rows(opened: OpenImage) -> Iterator[BitmapRow]:
    if opened.image is None:
        return
    for found in bitmap_results(opened.image):
        yield BitmapRow(
            image=str(opened.info.path),
            name=found.name,
            state=found.state,
            granularity=found.granularity,
            dirty_bytes=found.dirty_bytes,
            tombstone=found.tombstone,
        )


def _verdicts(leaf_first: Sequence[LayerBitmaps]) -> Iterator[BitmapVerdict]:
    for name in sorted({name for layer in leaf_first for name in layer.occurrences}):
        verdict = chain_test([layer.state(name) for layer in leaf_first])
        yield BitmapVerdict(name, verdict.passes, verdict.reason)


def bitmaps_add(
    image: str | Path,
    name: str,
    granularity: int = 65536,
    *,
    enabled: bool = True,
    access: Access | None = None,
) -> BitmapChange:
    """Add an empty bitmap.

    Args:
        image: the image that gets it.
        name: 1 to 1023 bytes, not yet in the image.
        granularity: guest bytes a bit, a power of two from 512 to 2 GiB.
        enabled: whether guest writes are recorded in it.
        access: how images may be found and reached.

    Raises:
        Refused: nothing was changed.
    """
    with _editable(image, access or Access()) as edit:
        size = edit.info.virtual_size
        if edit.info.has_bitmap(name):
            raise BitmapExists(str(image), name)
        if granularity & (granularity - 1) or granularity != storable_granularity(
            size, granularity
        ):
            raise GranularityInvalid(str(image), granularity)
        flags = BitmapFlag.AUTO if enabled else BitmapFlag(0)
        added = StoredBitmap(name, BitSet.empty(size, granularity), flags)
        return edit.replace_by((*edit.stored(), added), "add", (name,))


def bitmaps_remove(
    image: str | Path,
    names: Sequence[str],
    access: Access | None = None,
    *,
    force: bool = False,
) -> BitmapChange:
    """Remove bitmaps by name.

    Args:
        image: the image that loses them.
        names: all must be there.
        access: how images may be found and reached.
        force: remove them even where an image above has the name and would pass for a whole
            checkpoint.

    Raises:
        Refused: nothing was changed.
    """
    with _editable(image, access or Access()) as edit:
        present = {entry.name for entry in edit.info.bitmaps}
        for name in names:
            if name not in present:
                raise BitmapMissing(str(image), name)
        if not force:
            edit.require_safe_removal(names)
        return edit.replace_by(edit.stored_but(names), "remove", tuple(names))


def bitmaps_remove_all(
    image: str | Path, access: Access | None = None, *, force: bool = False
) -> BitmapChange:
    """Remove all bitmaps, readable or not.

    Args:
        image: the image that loses them.
        access: how images may be found and reached.
        force: as in :func:`bitmaps_remove`.

    Raises:
        Refused: nothing was changed.
    """
    with _editable(image, access or Access()) as edit:
        names = tuple(entry.name for entry in edit.info.bitmaps)
        if not force:
            edit.require_safe_removal(names)
        return edit.replace_by((), "remove", names)


def bitmaps_clear(
    image: str | Path,
    names: Sequence[str],
    access: Access | None = None,
    *,
    force: bool = False,
) -> BitmapChange:
    """Forget what bitmaps have recorded; they stay, with their granularities and flags.

    As `qemu-img bitmap --clear` does: for a bitmap that is used over and over, once a backup was
    taken. The chain test passes as before, so this is refused where the bitmap is a part only of
    a checkpoint: the rest of it would be taken for the whole.

    Args:
        image: the image that holds them.
        names: all must be there, and none in-use.
        access: how images may be found and reached.
        force: clear them even where other images of the chain have the name, too.

    Raises:
        Refused: nothing was changed.
    """
    with _editable(image, access or Access()) as edit:
        held = edit.stored_by_name(names)
        if not force:
            edit.require_whole_checkpoints(names)
        size = edit.info.virtual_size
        for name in names:
            empty = BitSet.empty(size, held[name].granularity)
            held[name] = StoredBitmap(name, empty, held[name].flags)
        change = edit.replace_by(tuple(held.values()), "clear", tuple(names))
    warning = (
        f"a backup that builds on {', '.join(map(repr, names))} has only what is written from now "
        "on: if none was taken right before, the next one must be a full one"
    )
    return replace(change, warnings=(warning,))


def bitmaps_merge(
    image: str | Path,
    target: str,
    sources: Sequence[str],
    source_image: str | Path | None = None,
    access: Access | None = None,
) -> BitmapChange:
    """Add the bits of *sources* to the bitmap *target* of an image.

    Args:
        image: holds the target.
        target: an existing bitmap of it; keeps its granularity.
        sources: names of bitmaps in the source image.
        source_image: the image that holds them; *image* itself if None.
        access: how images may be found and reached.

    Raises:
        Refused: nothing was changed.
    """
    access = access or Access()
    with contextlib.ExitStack() as stack:
        edit = stack.enter_context(_editable(image, access))
        held = edit.stored_by_name([target])
        source = edit.opened
        # Who has the image to himself would wait for himself, by whatever name it is given again.
        if source_image is not None and identity_at(Path(source_image)) != edit.info.identity:
            source = stack.enter_context(_locked_reader(source_image, access))
        size = edit.info.virtual_size
        if source.info.virtual_size > size:
            raise SizesDiffer(str(image), str(source.info.path), size, source.info.virtual_size)
        old = held[target]
        bits = [edit.opened.bits(target), *(_usable_bits(source, name) for name in sources)]
        held[target] = StoredBitmap(target, union_all(bits, size, old.granularity), old.flags)
        return edit.replace_by(tuple(held.values()), "merge", (target,))


def prune(
    top: str | Path, base: str | Path | None = None, access: Access | None = None
) -> PruneReport:
    """Remove bitmaps that no chain can use.

    Of *base* those that are stale: not valid in *top*, so nothing that reads top can use
    them, and not a part of what another branch has. With ``access.active`` also the
    names that are broken anywhere in the chain of the active image: they are removed from
    every image of it, the active one first, so that no part of them passes for a whole
    checkpoint in between.

    Raises:
        Refused: nothing was changed.
    """
    access = access or Access()
    if access.active is not None:
        policy = metadata_policy_of(access, top, base)
        return _prune_chain(Path(access.active), Path(base) if base else None, access, policy)
    return _prune_base(Path(top), Path(base) if base else None, access)


def _prune_base(top: Path, base: Path | None, access: Access) -> PruneReport:
    target = find_target(top, base, access)
    _require_support(target.base)
    with lock_image(target.base.path, LockMode.WRITER, access.lock_wait):
        require_alone([target.base.path])
        read_anew(target.base.path)
        target = find_target(top, base, access)
        with open_chain(target.chain) as opened:
            decisions = gather_bitmaps(
                target, opened, load_saved_bitmaps(target.base.real_path), top_stays=True
            ).decisions
            edit = _Edit(opened.images[target.base_index], target.relatives)
            before = bitmaps_of(edit.opened).occurrences
            stale = {
                d.name: d
                for d in decisions
                if d.fate is Fate.PRUNE and not _is_part_of_another(d.name, before, target)
            }
            # Unlike in a merge, the images between stay, and a guest may go on from one of them.
            between = target.chain.middle(target.base_index)
            tombstones = {
                name
                for name, decision in stale.items()
                if decision.tombstone or any(image.has_bitmap(name) for image in between)
            }
            removed = tuple(
                PrunedBitmap(
                    str(target.base.path),
                    name,
                    before[name].state,
                    tombstone=name in tombstones,
                    reason=decision.reason,
                )
                for name, decision in stale.items()
                if not (before[name].is_tombstone and name in tombstones)
            )
            if removed:
                _require_users_known(target)
                edit.replace_by(
                    (*edit.stored_but(list(stale)), *edit.tombstones(sorted(tombstones))),
                    "prune",
                    tuple(stale),
                )
    return PruneReport(
        version=REPORT_VERSION,
        base=str(target.base.path),
        top=str(target.chain.top.path),
        removed=removed,
        kept=tuple(sorted(before.keys() - stale.keys())),
        tombstones=tuple(sorted(tombstones)),
    )


def _require_users_known(target: Target) -> None:
    """Raise what :func:`unseen_users` gives where base is going to be changed."""
    top = target.chain.top
    for refusal in unseen_users((target.base,), top, target.relatives, _FIND_OUT):
        raise refusal


def _is_part_of_another(name: str, in_base: Mapping[str, Occurrence], target: Target) -> bool:
    """Whether an image that is not in the chain may have the name from base on."""
    is_valid = in_base[name].state is BitmapState.VALID
    return is_valid and bool(target.relatives.branches_with(name))


def _prune_chain(
    active: Path, base: Path | None, access: Access, policy: ChainPolicy
) -> PruneReport:
    chain = discover(active, policy)
    lowest = 0 if base is None else chain.index_of(base)
    relatives = relatives_of(chain, 0, access, policy)
    first = max(lowest, _above_branches(chain, relatives))
    removed: list[PrunedBitmap] = []
    with contextlib.ExitStack() as stack:
        allow_open_files(len(chain.images))
        locks = [
            stack.enter_context(lock_image(image.path, LockMode.WRITER, access.lock_wait))
            for image in chain.images[first:]
        ]
        require_alone(image.path for image in chain.images[first:])
        # What an earlier run removed and could not flush would come back below what this one
        # removes, and pass for whole.
        for image in chain.images[first:]:
            read_anew(image.path)
        opened = stack.enter_context(open_chain(discover(active, policy), locks))
        layers = [bitmaps_of(one) for one in opened.images]
        broken = _broken_names(layers)
        concerned = [
            image
            for image, layer in zip(chain.images[first:-1], layers[first:-1], strict=True)
            if broken.keys() & layer.occurrences.keys()
        ]
        for refusal in unseen_users(concerned, chain.top, relatives, _BEGIN_ABOVE):
            raise refusal
        for index in range(len(opened.images) - 1, first - 1, -1):
            here = [name for name in broken if name in layers[index].occurrences]
            if not here:
                continue
            edit = _Edit(opened.images[index], relatives)
            edit.replace_by(edit.stored_but(here), "prune", tuple(here))
            # From here on no other image can be refused as if nothing had been changed.
            stack.enter_context(_refusals_after_a_change_of(edit.info))
            removed += [
                PrunedBitmap(
                    str(edit.info.path),
                    name,
                    layers[index].state(name),
                    tombstone=False,
                    reason=broken[name],
                )
                for name in here
            ]
    names = {name for layer in layers for name in layer.occurrences}
    return PruneReport(
        version=REPORT_VERSION,
        base=str(chain.images[first].path),
        top=str(active),
        removed=tuple(removed),
        kept=tuple(sorted(names - broken.keys())),
        tombstones=(),
    )


def _broken_names(layers: Sequence[LayerBitmaps]) -> dict[str, str]:
    """Names that fail the chain test from the uppermost layer, and why."""
    names = sorted({name for layer in layers for name in layer.occurrences})
    verdicts = {
        name: chain_test([layer.state(name) for layer in reversed(layers)]) for name in names
    }
    return {name: verdict.reason for name, verdict in verdicts.items() if not verdict.passes}


def _above_branches(chain: Chain, relatives: Relatives) -> int:
    """The first image of the chain that no image outside of it reads.

    A name that is broken for this chain may be whole for another one that shares the images
    below.
    """
    identities = {image.identity: index for index, image in enumerate(chain.images)}
    outsiders = (*relatives.siblings, *relatives.middle_children, *relatives.children)
    shared = (identity_at(one.backing) for one in outsiders if one.backing is not None)
    return max((identities[one] + 1 for one in shared if one in identities), default=0)


@contextlib.contextmanager
def _refusals_after_a_change_of(image: ImageInfo) -> Iterator[None]:
    """To be refused means that nothing was changed."""
    try:
        yield
    except Refused as error:
        raise BitmapsChanged(str(image.path), error.sentence) from error


@dataclass(frozen=True, slots=True)
class _Edit:
    """An image that is locked and open, whose bitmaps can be replaced."""

    opened: OpenImage
    relatives: Relatives
    below: tuple[ImageInfo, ...] = ()

    @property
    def info(self) -> ImageInfo:
        return self.opened.info

    def stored_by_name(self, wanted: Sequence[str]) -> dict[str, AnyBitmap]:
        """The set as it is, in which the *wanted* ones are, and are usable.

        Raises BitmapMissing, BitmapWorthless, BrokenBitmapsInTheWay.
        """
        layer = bitmaps_of(self.opened)
        for name in wanted:
            _require_usable(self.info, layer, name)
        return {bitmap.name: bitmap for bitmap in self.stored()}

    def stored(self) -> tuple[AnyBitmap, ...]:
        """The set as it is."""
        return self.stored_but(())

    def stored_but(self, without: Sequence[str]) -> tuple[AnyBitmap, ...]:
        """The set without some names, each bitmap in the clusters that it has.

        Raises BrokenBitmapsInTheWay if one that has to stay is broken.
        """
        layer = bitmaps_of(self.opened)
        staying = [entry for entry in self.info.bitmaps if entry.name not in without]
        broken = [e.name for e in staying if layer.state(e.name) is BitmapState.IN_USE]
        if broken:
            raise BrokenBitmapsInTheWay(str(self.info.path), ", ".join(map(repr, broken)))
        return tuple(KeptBitmap(entry) for entry in staying)

    def tombstones(self, names: Sequence[str]) -> tuple[StoredBitmap, ...]:
        """Tombstones for some of the bitmaps that the image has."""
        return tuple(
            tombstone(entry.name, self.info.virtual_size, entry.granularity)
            for entry in self.info.bitmaps
            if entry.name in names
        )

    def require_safe_removal(self, names: Sequence[str]) -> None:
        """Refuse to take evidence from under an image that would then pass the chain test."""
        for above in self.relatives.above:
            shared = sorted(set(names) & {entry.name for entry in above.image.bitmaps})
            if shared:
                raise RemovalUnsafe(
                    str(self.info.path), ", ".join(map(repr, shared)), str(above.image.path)
                )

    def require_whole_checkpoints(self, names: Sequence[str]) -> None:
        """Refuse to empty a part of a checkpoint: what other images have of it looks whole."""
        others = (*self.below, *(above.image for above in self.relatives.above))
        for name in names:
            holders = [str(image.path) for image in others if image.has_bitmap(name)]
            if holders:
                raise ClearingUnsafe(str(self.info.path), name, ", ".join(holders))

    def replace_by(
        self, bitmaps: Sequence[AnyBitmap], action: str, names: tuple[str, ...]
    ) -> BitmapChange:
        """Store a set, and read it back."""
        with open_for_writing(self.info) as port:
            replace_bitmaps(port, bitmaps)
        with (
            _refusals_after_a_change_of(self.info),
            FileReadable(self.info.real_path) as readable,
        ):
            results = bitmap_results(Qcow2Image(readable))
        return BitmapChange(REPORT_VERSION, str(self.info.path), action, names, results)


@contextlib.contextmanager
def _editable(image: str | Path, access: Access) -> Iterator[_Edit]:
    policy = metadata_policy_of(access, image)
    with lock_image(image, LockMode.WRITER, access.lock_wait):
        require_alone([Path(image)])
        read_anew(image)
        chain = discover(Path(image), policy)
        _require_support(chain.top)
        relatives = relatives_of(chain, len(chain.images) - 1, access, policy)
        with _open_top(chain) as opened:
            yield _Edit(opened, relatives, chain.images[:-1])


@contextlib.contextmanager
def _locked_reader(image: str | Path, access: Access) -> Iterator[OpenImage]:
    with (
        lock_image(image, LockMode.READER, access.lock_wait),
        _open_top(discover(Path(image), metadata_policy_of(access))) as opened,
    ):
        yield opened


@contextlib.contextmanager
def _open_top(chain: Chain) -> Iterator[OpenImage]:
    with open_chain(Chain(chain.images[-1:])) as opened:
        yield _only(opened)


def _only(opened: OpenChain) -> OpenImage:
    (image,) = opened.images
    return image


def _usable_bits(source: OpenImage, name: str) -> BitSet:
    _require_usable(source.info, bitmaps_of(source), name)
    return source.bits(name)


def _require_usable(image: ImageInfo, layer: LayerBitmaps, name: str) -> None:
    state = layer.state(name)
    if state is BitmapState.ABSENT:
        raise BitmapMissing(str(image.path), name)
    if state is BitmapState.IN_USE:
        raise BitmapWorthless(str(image.path), name)


def _require_support(image: ImageInfo) -> None:
    if not image.supports_bitmaps:
        kind = "a version 2 image" if image.header is not None else image.format
        raise BitmapsImpossible(str(image.path), kind)
