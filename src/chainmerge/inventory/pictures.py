# SPDX-License-Identifier: Apache-2.0
"""What pictures of chains show. No image is locked, and none is written to."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.bitmaps.listing import listing_of, next_backup_bytes
from chainmerge.chain.disk_map import count_deciders, draw_map, readable_chain
from chainmerge.chain.opening import open_chain
from chainmerge.documents.chain_pictures import (
    MOST_CHECKPOINTS,
    ChainPictures,
    ChainsPictures,
    CheckpointCell,
    PicturedCheckpoint,
)
from chainmerge.documents.chains import ChainSummary
from chainmerge.documents.disk_map import MOST_COLUMNS
from chainmerge.documents.plan import MergePlan, Progress
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.errors import ChainmergeError
from chainmerge.inventory.gain import first_own_index
from chainmerge.inventory.layer_space import layer_space
from chainmerge.inventory.leaves import images_in
from chainmerge.inventory.overview import list_chains
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.dry_run import plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chainmerge.chain.model import Chain
    from chainmerge.chain.opening import OpenChain
    from chainmerge.documents.bitmaps import BitmapListing, BitmapRow, BitmapVerdict

DEFAULT_CHAINS: Final = 20
"""Chains that are pictured, if nobody says how many."""
_AS_LIST_ADVISES: Final = MergeOptions(delete=True)


def picture_chain(
    image: str | Path, access: Access | None = None, decided: MergePlan | None = None
) -> ChainPictures:
    """Find out what the pictures of a chain show.

    Args:
        image: the chain's upper end.
        access: how images may be reached.
        decided: the plan that is to be drawn in.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    return _pictured(readable_chain(image, access or Access()), _Outlook(decided))


def picture_chains(
    places: Sequence[str | Path], access: Access | None = None, most: int = DEFAULT_CHAINS
) -> ChainsPictures:
    """Find out what the pictures of all chains of some places show.

    Each is drawn with a merge of all images that only its leaf uses. A chain that cannot be read
    is a line, and a problem.

    Args:
        places: directories, whose chains are meant, and upper ends of chains.
        access: how images may be reached.
        most: so many chains are pictured, of which a merge would free most; all are listed.

    Raises:
        DirectoryUnreadable, DirectoryTooLarge
        ChainmergeError: a chain whose upper end was named cannot be found or read.
    """
    access = access or Access()
    directories = [place for place in places if os.path.isdir(place)]  # noqa: PTH112 (odd names)
    named = [
        _with_plan(Path(place), _base_below(Path(place), access), access)
        for place in places
        if place not in directories
    ]
    found = _each_once(directories, access, frozenset(one.image for one in named))
    tried = [_tried(one, access) for one in found[: max(0, most - len(named))]]
    return ChainsPictures(
        version=REPORT_VERSION,
        places=tuple(os.path.abspath(place) for place in places),  # noqa: PTH100 (links stay)
        made_at=int(time.time()),
        chains=tuple(sorted((*map(_summary_of, named), *found), key=_rank)),
        pictures=(*named, *(one for one in tried if isinstance(one, ChainPictures))),
        problems=tuple(one for one in tried if isinstance(one, str)),
    )


class _Outlook(Struct, frozen=True):
    """What a merge of a chain would do, or why nobody can say."""

    plan: MergePlan | None = None
    problem: str | None = None


def _each_once(
    directories: Sequence[str | Path], access: Access, without: frozenset[str]
) -> list[ChainSummary]:
    """The chains of directories, in the order in which they are listed."""
    summaries: dict[str, ChainSummary] = {}
    for directory in directories:
        summaries |= {one.leaf: one for one in list_chains(directory, access).chains}
    return sorted((one for leaf, one in summaries.items() if leaf not in without), key=_rank)


def _rank(summary: ChainSummary) -> tuple[bool, int, str]:
    return summary.freed_bytes is None, -(summary.freed_bytes or 0), summary.leaf


def _tried(summary: ChainSummary, access: Access) -> ChainPictures | str:
    """The pictures of a chain, or why there are none."""
    base = None if summary.base is None else Path(summary.base)
    try:
        return _with_plan(Path(summary.leaf), base, access)
    except ChainmergeError as error:
        return error.sentence


def _base_below(leaf: Path, access: Access) -> Path | None:
    """The lowest image of a chain that only *leaf* uses, as far as its directory tells."""
    chain = readable_chain(leaf, access)
    try:
        users: Mapping[tuple[int, int], int] = images_in(chain.top.real_path.parent).users
    except ChainmergeError:
        # A plan looks for them as well, and refuses what others need.
        users = {}
    first = first_own_index(chain, users)
    return chain.images[first].path if first < len(chain.images) - 1 else None


def _with_plan(leaf: Path, base: Path | None, access: Access) -> ChainPictures:
    return _pictured(readable_chain(leaf, access), _outlook(leaf, base, access))


def _outlook(leaf: Path, base: Path | None, access: Access) -> _Outlook:
    if base is None:
        return _Outlook()
    try:
        return _Outlook(plan(leaf, base, access, _AS_LIST_ADVISES))
    except ChainmergeError as error:
        return _Outlook(problem=error.sentence)


def _pictured(chain: Chain, outlook: _Outlook) -> ChainPictures:
    paths = [str(one.path) for one in chain.images]
    with open_chain(chain) as opened:
        view = opened.view()
        deciders = count_deciders(view, MOST_COLUMNS)
        visible = deciders.data.sum(axis=1).tolist()
        layers = tuple(map(layer_space, opened.images, paths, visible))
        listing = listing_of(opened, paths[-1])
        shown = listing.verdicts[:MOST_CHECKPOINTS]
        checkpoints = tuple(_checkpoints(opened, listing, shown))
        drawn = draw_map(view, deciders)
    return ChainPictures(
        version=REPORT_VERSION,
        image=paths[-1],
        layers=layers,
        map=drawn,
        checkpoints=checkpoints,
        checkpoints_left_out=len(listing.verdicts) - len(shown),
        plan=outlook.plan,
        problem=outlook.problem,
    )


def _checkpoints(
    opened: OpenChain, listing: BitmapListing, shown: Sequence[BitmapVerdict]
) -> Iterator[PicturedCheckpoint]:
    rows: dict[str, list[BitmapRow]] = {verdict.name: [] for verdict in shown}
    for row in listing.rows:
        if row.name in rows:
            rows[row.name].append(row)
    place = {str(one.info.path): index for index, one in enumerate(opened.images)}
    for verdict in shown:
        yield PicturedCheckpoint(
            name=verdict.name,
            usable=verdict.passes,
            reason=verdict.reason,
            next_backup_bytes=next_backup_bytes(opened, verdict.name) if verdict.passes else None,
            cells=tuple(
                CheckpointCell(place[row.image], row.state, row.tombstone, row.dirty_bytes)
                for row in reversed(rows[verdict.name])
            ),
        )


def _summary_of(pictures: ChainPictures) -> ChainSummary:
    """The line of a chain whose upper end was named."""
    decided = pictures.plan
    bases = [layer.path for layer in pictures.layers]
    first = bases.index(decided.base) if decided and decided.base in bases else len(bases)
    cost = decided.directions if decided else None
    return ChainSummary(
        leaf=pictures.image,
        images=len(pictures.layers),
        virtual_size=pictures.map.virtual_size,
        occupied_bytes=sum(layer.occupied_bytes or 0 for layer in pictures.layers),
        base=decided.base if decided else None,
        freed_bytes=sum(layer.hidden_bytes for layer in pictures.layers[first:]),
        bytes_to_copy=min(cost.commit.bytes_to_copy, cost.pull.bytes_to_copy) if cost else 0,
        unfinished=decided is not None and decided.progress is Progress.INTERRUPTED,
        users=None,
        problem=pictures.problem,
    )
