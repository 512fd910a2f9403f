# SPDX-License-Identifier: Apache-2.0
"""Removal of bitmaps that no backup can use any more."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.bitmaps.errors import DisksShareBitmaps
from chainmerge.bitmaps.gathering import gather_bitmaps
from chainmerge.bitmaps.listing import bitmaps_list_disks
from chainmerge.bitmaps.opening import (
    BitmapEdit,
    locked_to_drop_bitmaps,
    refusals_after_a_change_of,
    require_no_unfinished_merge,
    require_support,
    require_users_known,
)
from chainmerge.bitmaps.rules import BitmapState, Fate, LayerBitmaps, Occurrence, chain_test
from chainmerge.bitmaps.stored import bitmaps_of
from chainmerge.chain.discovery import discover
from chainmerge.chain.opening import open_chain
from chainmerge.chain.reading import identity_at
from chainmerge.chain.target import Target, find_target, metadata_policy_of, relatives_of
from chainmerge.chain.unseen_users import unseen_users
from chainmerge.documents.bitmaps import PrunedBitmap, PruneOfDisks, PruneReport
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.engines.metadata.bitmap_set import AnyBitmap
from chainmerge.options import Access
from chainmerge.records.saved_bitmaps import load_saved_bitmaps
from chainmerge.storage.files import drop_cached
from chainmerge.storage.locks import LockMode, lock_image
from chainmerge.storage.other_hosts import held_by_this_host
from chainmerge.storage.other_users import require_alone

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chainmerge.chain.model import Chain, ChainPolicy, ImageInfo

_BEGIN_ABOVE: Final = "give as --base the lowest image in the directory of the active one"


class _Change(Struct, frozen=True):
    """The bitmaps that an image gets, and what of it that removes."""

    edit: BitmapEdit
    bitmaps: tuple[AnyBitmap, ...]
    names: tuple[str, ...]
    removed: tuple[PrunedBitmap, ...]


class _Planned(Struct, frozen=True):
    """A pruning of images that are locked, in the order of its changes."""

    base: Path
    top: Path
    locked: frozenset[Path]
    changes: tuple[_Change, ...]
    kept: tuple[str, ...]
    tombstones: tuple[str, ...]

    @property
    def report(self) -> PruneReport:
        """What will have been done."""
        return PruneReport(
            version=REPORT_VERSION,
            base=str(self.base),
            top=str(self.top),
            removed=tuple(one for change in self.changes for one in change.removed),
            kept=self.kept,
            tombstones=self.tombstones,
        )


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
    lowest = Path(base) if base is not None else None
    with contextlib.ExitStack() as stack:
        if access.active is not None:
            policy = metadata_policy_of(access, top, base)
            planned = _plan_for_chain(stack, Path(access.active), lowest, access, policy)
        else:
            planned = _plan_for_base(stack, Path(top), lowest, access)
        _carry_out([planned])
    return planned.report


def prune_disks(tops: Sequence[str | Path], access: Access | None = None) -> PruneOfDisks:
    """As :func:`prune` of each, for the disks of a VM: all are planned before one is changed.

    Args:
        tops: the top end of each disk's chain; what is stale goes from its backing file.
        access: how images may be found and reached.

    Raises:
        Refused: nothing was changed, on any disk.
        BitmapsChanged: disks were changed before one that cannot be.
    """
    access = access or Access()
    with contextlib.ExitStack() as stack:
        planned: list[_Planned] = []
        for top in map(Path, tops):
            planned.append(_plan_for_base(stack, top, None, access, planned))
        _carry_out(planned)
    return _of_disks(planned, access)


def prune_whole_disks(leaves: Sequence[str | Path], access: Access | None = None) -> PruneOfDisks:
    """As :func:`prune_disks`, where what is broken goes from all images of each disk.

    Args:
        leaves: the active image of each disk.
        access: how images may be found and reached.

    Raises what :func:`prune_disks` raises.
    """
    access = access or Access()
    with contextlib.ExitStack() as stack:
        planned: list[_Planned] = []
        for leaf in map(Path, leaves):
            active = replace(access, active=str(leaf))
            policy = metadata_policy_of(active, leaf)
            planned.append(_plan_for_chain(stack, leaf, None, active, policy, planned))
        _carry_out(planned)
    return _of_disks(planned, access)


def _of_disks(planned: Sequence[_Planned], access: Access) -> PruneOfDisks:
    left = bitmaps_list_disks([one.top for one in planned], access)
    disks = tuple(one.report for one in planned)
    return PruneOfDisks(REPORT_VERSION, disks, left.checkpoints)


def _carry_out(planned: Sequence[_Planned]) -> None:
    """Change what is planned, once nothing is known that any image would refuse.

    Raises BitmapsChanged where one refuses after another one was changed.
    """
    changes = [change for one in planned for change in one.changes]
    for change in changes[1:]:
        change.edit.require_replaceable_by(change.bitmaps)
    with contextlib.ExitStack() as stack:
        for change in changes:
            change.edit.replace_by(change.bitmaps, "prune", change.names)
            # From here on no other image can be refused as if nothing had been changed.
            stack.enter_context(refusals_after_a_change_of(change.edit.info))


def _locked_for_one(
    images: Sequence[ImageInfo], top: Path, beside: Sequence[_Planned]
) -> frozenset[Path]:
    """The files of images that are going to be locked for one disk.

    Raises DisksShareBitmaps where they are locked for another one of *beside* already.
    """
    files = frozenset(image.real_path for image in images)
    for other in beside:
        for shared in files & other.locked:
            raise DisksShareBitmaps(str(shared), str(other.top), str(top))
    return files


def _plan_for_base(
    stack: contextlib.ExitStack,
    top: Path,
    base: Path | None,
    access: Access,
    beside: Sequence[_Planned] = (),
) -> _Planned:
    """What is stale in base, which is locked until *stack* is left."""
    target = find_target(top, base, access)
    locked = _locked_for_one([target.base], top, beside)
    require_support(target.base)
    stack.enter_context(held_by_this_host([target.base.path], access))
    stack.enter_context(lock_image(target.base.path, LockMode.WRITER, access.lock_wait))
    require_alone([target.base.path])
    drop_cached(target.base.path)
    target = find_target(top, base, access)
    opened = stack.enter_context(open_chain(target.chain))
    decisions = gather_bitmaps(
        target, opened, load_saved_bitmaps(target.base.real_path), top_stays=True
    ).decisions
    edit = BitmapEdit(opened.images[target.base_index], target.relatives)
    before = bitmaps_of(edit.opened).occurrences
    stale = {
        d.name: d
        for d in decisions
        if d.fate is Fate.PRUNE and not _is_part_of_another(d.name, before, target)
    }
    # Unlike in a merge, the images between stay, and a guest may go on from one of them.
    between = target.chain.middle(target.base_index)
    tombstones = sorted(
        name
        for name, decision in stale.items()
        if decision.tombstone or any(image.has_bitmap(name) for image in between)
    )
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
    changes: tuple[_Change, ...] = ()
    if removed:
        _require_stale_for_sure(target)
        bitmaps = (*edit.stored_but(list(stale)), *edit.tombstones(tombstones))
        changes = (_Change(edit, bitmaps, tuple(stale), removed),)
    return _Planned(
        target.base.path,
        target.chain.top.path,
        locked,
        changes,
        tuple(sorted(before.keys() - stale.keys())),
        tuple(tombstones),
    )


def _require_stale_for_sure(target: Target) -> None:
    """Raise what says that bitmaps of base may be of use that look stale.

    What a merge has saved of base itself is known. What images above lack for now is not.
    """
    require_users_known(target)
    require_no_unfinished_merge(target.chain, target.base_index + 1)


def _is_part_of_another(name: str, in_base: Mapping[str, Occurrence], target: Target) -> bool:
    """Whether an image that is not in the chain may have the name from base on."""
    is_valid = in_base[name].state is BitmapState.VALID
    return is_valid and bool(target.relatives.branches_with(name))


def _plan_for_chain(
    stack: contextlib.ExitStack,
    active: Path,
    base: Path | None,
    access: Access,
    policy: ChainPolicy,
    beside: Sequence[_Planned] = (),
) -> _Planned:
    """What is broken in a chain, whose images are locked until *stack* is left."""
    chain = discover(active, policy)
    lowest = 0 if base is None else chain.index_of(base)
    relatives = relatives_of(chain, 0, access, policy)
    outsiders = (*relatives.siblings, *relatives.middle_children, *relatives.children)
    first = max(lowest, first_above_branches(chain, outsiders))
    locked = _locked_for_one(chain.images[first:], active, beside)
    locks = stack.enter_context(locked_to_drop_bitmaps(chain, chain.images[first:], access))
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
    edits = [BitmapEdit(one, relatives) for one in opened.images[first:]]
    changes = (
        _without(edit, layer, broken)
        for edit, layer in reversed(list(zip(edits, layers[first:], strict=True)))
    )
    names = {name for layer in layers for name in layer.occurrences}
    return _Planned(
        chain.images[first].path,
        active,
        locked,
        tuple(change for change in changes if change.names),
        tuple(sorted(names - broken.keys())),
        (),
    )


def _without(edit: BitmapEdit, layer: LayerBitmaps, broken: Mapping[str, str]) -> _Change:
    """An image without the names that are broken in its chain, for the reasons given."""
    path, here = str(edit.info.path), [name for name in broken if name in layer.occurrences]
    removed = (
        PrunedBitmap(path, name, layer.state(name), tombstone=False, reason=broken[name])
        for name in here
    )
    return _Change(edit, edit.stored_but(here) if here else (), tuple(here), tuple(removed))


def _broken_names(layers: Sequence[LayerBitmaps]) -> dict[str, str]:
    """Names that fail the chain test from the uppermost layer, and why."""
    names = sorted({name for layer in layers for name in layer.occurrences})
    verdicts = {
        name: chain_test([layer.state(name) for layer in reversed(layers)]) for name in names
    }
    return {name: verdict.reason for name, verdict in verdicts.items() if not verdict.passes}


def first_above_branches(chain: Chain, outsiders: Iterable[ImageInfo]) -> int:
    """The index of the lowest image of the chain above all that *outsiders* read.

    A name that is broken for this chain may be whole for another one that shares the images
    below.
    """
    identities = {image.identity: index for index, image in enumerate(chain.images)}
    shared = (identity_at(one.backing) for one in outsiders if one.backing is not None)
    return max((identities[one] + 1 for one in shared if one in identities), default=0)
