# SPDX-License-Identifier: Apache-2.0
"""What pictures of chains show. No image is locked, and none is written to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

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
from chainmerge.documents.disk_map import MOST_COLUMNS
from chainmerge.documents.plan import MergePlan
from chainmerge.documents.progress import OnProgress, unheard
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.errors import ChainmergeError
from chainmerge.inventory.gain import first_own_index
from chainmerge.inventory.layer_space import layer_space
from chainmerge.inventory.leaves import images_in
from chainmerge.inventory.scan import scan
from chainmerge.inventory.scan_history import trend_of
from chainmerge.options import Access, MergeOptions, ScanOptions
from chainmerge.planning.dry_run import plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chainmerge.chain.model import Chain
    from chainmerge.chain.opening import OpenChain
    from chainmerge.documents.bitmaps import BitmapListing, BitmapRow, BitmapVerdict
    from chainmerge.documents.chains import ChainSummary

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
    places: Sequence[str | Path] = (),
    access: Access | None = None,
    most: int = DEFAULT_CHAINS,
    on_progress: OnProgress = unheard,
    options: ScanOptions | None = None,
) -> ChainsPictures:
    """Scan some places, and find out what the pictures of their chains show.

    Each chain is drawn with a merge of all images that only its leaf uses. One that cannot be read
    is a line, and a problem.

    Args:
        places: as of :func:`chainmerge.scan`.
        access: how images may be reached.
        most: so many chains are pictured, of which a merge would free most; all are listed.
        on_progress: told how far the scan has come.
        options: as of :func:`chainmerge.scan`; without its history there are no trends.

    Raises:
        PlaceUnreadable, PlaceTooLarge
    """
    access, options = access or Access(), options or ScanOptions()
    found = scan(places, access, options, on_progress=on_progress)
    named = {os.path.abspath(place) for place in places}  # noqa: PTH100 (links stay links)
    # As in the scan: an image of one place may stand on one of another.
    roots = (place for place in found.places if os.path.isdir(place))  # noqa: PTH112 (odd names)
    reach = replace(access, allow_backing=(*access.allow_backing, *roots))
    tried = [_tried(one, reach, is_named=one.leaf in named) for one in found.chains[:most]]
    return ChainsPictures(
        version=REPORT_VERSION,
        places=found.places,
        made_at=found.scanned_at,
        chains=found.chains,
        findings=found.findings,
        pictures=tuple(one for one in tried if isinstance(one, ChainPictures)),
        problems=(*(one for one in tried if isinstance(one, str)), *found.left_out),
        trends=trend_of(found.scope) if options.history else (),
        forecasts=found.forecasts,
    )


class _Outlook(Struct, frozen=True):
    """What a merge of a chain would do, or why nobody can say."""

    plan: MergePlan | None = None
    problem: str | None = None


def _tried(summary: ChainSummary, access: Access, *, is_named: bool) -> ChainPictures | str:
    """The pictures of a chain, or why there are none."""
    leaf = Path(summary.leaf)
    base = None if summary.base is None else Path(summary.base)
    try:
        # Around an image that was named nobody has looked for others that use the same ones.
        return _with_plan(leaf, _base_below(leaf, access) if is_named else base, access)
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
    first = first_own_index([image.identity for image in chain.images], users)
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
