# SPDX-License-Identifier: Apache-2.0
"""Removal of bitmaps that no backup can use any more."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.bitmaps.gathering import gather_bitmaps
from chainmerge.bitmaps.opening import (
    BitmapEdit,
    locked_to_drop_bitmaps,
    refusals_after_a_change_of,
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
from chainmerge.documents.bitmaps import PrunedBitmap, PruneReport
from chainmerge.documents.versions import REPORT_VERSION
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
    require_support(target.base)
    with (
        held_by_this_host([target.base.path], access),
        lock_image(target.base.path, LockMode.WRITER, access.lock_wait),
    ):
        require_alone([target.base.path])
        drop_cached(target.base.path)
        target = find_target(top, base, access)
        with open_chain(target.chain) as opened:
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
                require_users_known(target)
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
    outsiders = (*relatives.siblings, *relatives.middle_children, *relatives.children)
    first = max(lowest, first_above_branches(chain, outsiders))
    removed: list[PrunedBitmap] = []
    with contextlib.ExitStack() as stack:
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
        for index in range(len(opened.images) - 1, first - 1, -1):
            here = [name for name in broken if name in layers[index].occurrences]
            if not here:
                continue
            edit = BitmapEdit(opened.images[index], relatives)
            edit.replace_by(edit.stored_but(here), "prune", tuple(here))
            # From here on no other image can be refused as if nothing had been changed.
            stack.enter_context(refusals_after_a_change_of(edit.info))
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


def first_above_branches(chain: Chain, outsiders: Iterable[ImageInfo]) -> int:
    """The index of the lowest image of the chain above all that *outsiders* read.

    A name that is broken for this chain may be whole for another one that shares the images
    below.
    """
    identities = {image.identity: index for index, image in enumerate(chain.images)}
    shared = (identity_at(one.backing) for one in outsiders if one.backing is not None)
    return max((identities[one] + 1 for one in shared if one in identities), default=0)
