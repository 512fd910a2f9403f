# SPDX-License-Identifier: Apache-2.0
"""Drops bitmaps that are in the way of backups from every image of a chain.

The active image loses them first. An interruption leaves fewer of them, and never a part that
passes for a whole checkpoint; the same call goes on.
"""

from __future__ import annotations

import contextlib
import shlex
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.bitmaps.errors import BitmapMissing, MergeToFinishFirst
from chainmerge.bitmaps.opening import (
    BitmapEdit,
    locked_to_drop_bitmaps,
    refusals_after_a_change_of,
)
from chainmerge.bitmaps.pruning import first_above_branches
from chainmerge.bitmaps.rules import BitmapState, LayerBitmaps, chain_test, needs_repair
from chainmerge.bitmaps.stored import bitmaps_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.opening import OpenImage, open_chain
from chainmerge.chain.relatives import Relatives
from chainmerge.chain.surroundings import folded
from chainmerge.chain.target import metadata_policy_of, relatives_of
from chainmerge.chain.unseen_users import unseen_users
from chainmerge.documents.bitmaps import BitmapsRepairReport, PrunedBitmap, UnusableBitmap
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.options import Access
from chainmerge.repairing.foreign_commit import half_done_commit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.model import Chain, ImageInfo
    from chainmerge.engines.metadata.bitmap_set import AnyBitmap

_FIND_OUT: Final = "find out which other images use them"


def plan_bitmaps_repair(
    leaf: str | Path, names: Sequence[str] = (), access: Access | None = None
) -> BitmapsRepairReport:
    """Say what :func:`bitmaps_repair` would do, and change nothing.

    Raises:
        Refused: it would be refused.
    """
    with _prepared(Path(leaf), names, access or Access()) as repair:
        return _report(leaf, repair, dry_run=True)


def bitmaps_repair(
    leaf: str | Path, names: Sequence[str] = (), access: Access | None = None
) -> BitmapsRepairReport:
    """Drop the bitmaps that are in the way of backups from every image of a chain.

    Those are the names for which :func:`chainmerge.bitmaps.rules.needs_repair` holds. In an image
    that other chains read too, only what is in-use goes, and leaves a tombstone if an image above
    keeps the name.

    Args:
        leaf: the image that the guest writes to.
        names: consider only these; each must be in some image of the chain.
        access: how images may be found and reached.

    Raises:
        Refused: nothing was changed; images are open, or a merge has to be finished first.
        Failed: some images are done; the same call goes on.
    """
    with (
        _prepared(Path(leaf), names, access or Access()) as repair,
        contextlib.ExitStack() as changed,
    ):
        # All of them are known to be possible before the first is done.
        edits = [(step, *_replacement(step, repair.relatives)) for step in repair.steps]
        for step, edit, bitmaps in edits:
            edit.replace_by(bitmaps, "repair", step.names)
            # From here on no other image can be refused as if nothing had been changed.
            changed.enter_context(refusals_after_a_change_of(edit.info))
        return _report(leaf, repair, dry_run=False)


class _Step(Struct, frozen=True):
    """What one image loses, and which of the names leave a tombstone there."""

    opened: OpenImage
    names: tuple[str, ...]
    tombstones: tuple[str, ...]


class _Repair(Struct, frozen=True):
    """The bitmaps of a chain that cannot be used, and how they go, the active image first."""

    unusable: tuple[UnusableBitmap, ...]
    steps: tuple[_Step, ...]
    layers: tuple[LayerBitmaps, ...]
    relatives: Relatives


def _replacement(step: _Step, relatives: Relatives) -> tuple[BitmapEdit, tuple[AnyBitmap, ...]]:
    """Raises BrokenBitmapsInTheWay."""
    edit = BitmapEdit(step.opened, relatives)
    return edit, (*edit.stored_but(step.names), *edit.tombstones(step.tombstones))


@contextlib.contextmanager
def _prepared(leaf: Path, names: Sequence[str], access: Access) -> Iterator[_Repair]:
    """Lock and open the images, and say how each changes."""
    policy = metadata_policy_of(access, leaf)
    chain = discover(leaf, policy)
    relatives = relatives_of(chain, 0, access, policy)
    own = first_above_branches(chain, (*relatives.siblings, *relatives.middle_children))
    with contextlib.ExitStack() as stack:
        to_lock = [*_shared_with_broken(chain, own), *chain.images[own:]]
        locks = stack.enter_context(locked_to_drop_bitmaps(chain, to_lock, access))
        _require_no_half_done_commit(chain, access)
        opened = stack.enter_context(open_chain(discover(leaf, policy), locks))
        layers = tuple(bitmaps_of(one) for one in opened.images)
        unusable = tuple(_unusable(layers, names))
        locked = {image.identity for image in to_lock}
        steps = tuple(
            step
            for index, image in reversed(tuple(enumerate(opened.images)))
            if image.info.identity in locked
            and (step := _step(index, own, opened.images, layers, unusable, relatives)).names
        )
        repair = _Repair(unusable, steps, layers, relatives)
        _require_safe(repair, chain)
        yield repair


def _require_no_half_done_commit(chain: Chain, access: Access) -> None:
    """Bitmaps that are in-use are evidence of how far another program's commit came."""
    for below, above in pairwise(chain.images):
        if not _has_broken(below):
            continue
        commit = half_done_commit(above.path, access)
        if commit is not None and commit.is_certain:
            base = str(commit.base)
            command = f"`chainmerge repair {shlex.quote(base)}` shows how to finish it"
            raise MergeToFinishFirst(str(chain.top.path), base, command)


def _has_broken(image: ImageInfo) -> bool:
    trusted = image.header is not None and image.header.bitmaps_trusted
    return any(entry.in_use or not trusted or not entry.readable for entry in image.bitmaps)


def _shared_with_broken(chain: Chain, own: int) -> Iterator[ImageInfo]:
    return (image for image in chain.images[:own] if _has_broken(image))


def _unusable(layers: Sequence[LayerBitmaps], names: Sequence[str]) -> Iterator[UnusableBitmap]:
    """Raises BitmapMissing."""
    leaf_first = layers[::-1]
    there = {name for layer in layers for name in layer.occurrences}
    for name in names:
        if name not in there:
            raise BitmapMissing(leaf_first[0].image, name)
    for name in sorted(there.intersection(names) if names else there):
        states = [layer.state(name) for layer in leaf_first]
        if needs_repair(states):
            images = tuple(layer.image for layer in leaf_first if name in layer.occurrences)
            yield UnusableBitmap(name, images, _why(leaf_first, name))


def _why(leaf_first: Sequence[LayerBitmaps], name: str) -> str:
    states = [layer.state(name) for layer in leaf_first]
    broken = [
        layer.image
        for layer, state in zip(leaf_first, states, strict=True)
        if state is BitmapState.IN_USE
    ]
    return f"inconsistent (in-use) in {folded(broken)}" if broken else chain_test(states).reason


def _step(
    index: int,
    own: int,
    images: Sequence[OpenImage],
    layers: Sequence[LayerBitmaps],
    unusable: Sequence[UnusableBitmap],
    relatives: Relatives,
) -> _Step:
    here = [one.name for one in unusable if one.name in layers[index].occurrences]
    if index >= own:
        return _Step(images[index], tuple(here), ())
    here = [name for name in here if layers[index].state(name) is BitmapState.IN_USE]
    # What other chains read too keeps all that may be whole there.
    staying = {
        name
        for layer in layers[index + 1 : own]
        for name, occurrence in layer.occurrences.items()
        if occurrence.state is not BitmapState.IN_USE
    }
    staying |= {entry.name for image in relatives.beside for entry in image.bitmaps}
    return _Step(images[index], tuple(here), tuple(name for name in here if name in staying))


def _require_safe(repair: _Repair, chain: Chain) -> None:
    """Raises RemovalUnsafe, UsersUnknown, VolumesInactive."""
    for step in repair.steps:
        BitmapEdit(step.opened, repair.relatives).require_safe_removal(step.names)
    concerned = [one.opened.info for one in repair.steps if one.opened.info != chain.top]
    for refusal in unseen_users(concerned, chain.top, repair.relatives, _FIND_OUT):
        raise refusal


def _report(leaf: str | Path, repair: _Repair, *, dry_run: bool) -> BitmapsRepairReport:
    reasons = {one.name: one.reason for one in repair.unusable}
    removed = tuple(
        PrunedBitmap(
            str(step.opened.info.path),
            name,
            bitmaps_of(step.opened).state(name),
            tombstone=name in step.tombstones,
            reason=reasons[name],
        )
        for step in repair.steps
        for name in step.names
    )
    there = {name for layer in repair.layers for name in layer.occurrences}
    return BitmapsRepairReport(
        version=REPORT_VERSION,
        image=str(leaf),
        dry_run=dry_run,
        unusable=repair.unusable,
        removed=removed,
        kept=tuple(sorted(there - reasons.keys())),
    )
