# SPDX-License-Identifier: Apache-2.0
"""The chains of a directory, a summary each. No image is locked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from chainmerge.chain.discovery import discover
from chainmerge.chain.information import on_disk, users_of
from chainmerge.chain.opening import open_chain
from chainmerge.chain.reading import named_data_file
from chainmerge.chain.target import metadata_policy_of
from chainmerge.documents.chains import ChainsReport, ChainSummary
from chainmerge.documents.versions import REPORT_VERSION
from chainmerge.errors import ChainmergeError
from chainmerge.inventory.gain import first_own_index, gain_of
from chainmerge.inventory.leaves import images_in
from chainmerge.options import Access
from chainmerge.records.unfinished import status
from chainmerge.storage.bystanders import openers_of

if TYPE_CHECKING:
    from chainmerge.chain.model import Chain, Identity
    from chainmerge.inventory.leaves import DirectoryImages
    from chainmerge.storage.bystanders import Openers


def list_chains(directory: str | Path = ".", access: Access | None = None) -> ChainsReport:
    """Summarise the chains whose leaves lie in a directory; what is below it is left out.

    A chain that cannot be read is a summary as well, which says why. Users of the images in
    other directories are not looked for: the plan of a merge does that.

    Args:
        directory: where the leaves lie. Images below them may lie elsewhere, if *access* allows.
        access: how images may be reached.

    Raises:
        DirectoryUnreadable, DirectoryTooLarge
    """
    access = access or Access()
    home = Path(os.path.realpath(directory))
    found = images_in(home)
    openers = openers_of(found.images)
    unfinished = _images_of_unfinished_merges(home)
    occupied: dict[Identity, int] = {}
    summaries = [
        _summary(leaf, access, found, openers, unfinished, occupied) for leaf in found.leaves
    ]
    return ChainsReport(
        version=REPORT_VERSION,
        directory=str(home),
        chains=tuple(sorted(summaries, key=_rank)),
        occupied_bytes=sum(occupied.values()),
        freed_bytes=sum(summary.freed_bytes or 0 for summary in summaries),
    )


def _rank(summary: ChainSummary) -> tuple[bool, int, str]:
    return summary.freed_bytes is None, -(summary.freed_bytes or 0), summary.leaf


def _images_of_unfinished_merges(directory: Path) -> frozenset[str]:
    merges = status([directory]).merges
    return frozenset(path for merge in merges for path in (merge.base, merge.top) if path)


def _summary(
    leaf: Path,
    access: Access,
    found: DirectoryImages,
    openers: Openers,
    unfinished: frozenset[str],
    occupied: dict[Identity, int],
) -> ChainSummary:
    """A leaf and its chain; what the files take is noted in *occupied* as well."""
    nothing_known = ChainSummary(
        leaf=str(leaf),
        images=None,
        virtual_size=None,
        occupied_bytes=None,
        base=None,
        freed_bytes=None,
        bytes_to_copy=None,
        unfinished=str(leaf) in unfinished,
        users=users_of(leaf, openers),
        problem=None,
    )
    try:
        chain = discover(leaf, metadata_policy_of(access, leaf))
    except ChainmergeError as error:
        return replace(nothing_known, problem=error.sentence)
    taken = {image.identity: on_disk(image)[0] or 0 for image in chain.images}
    occupied |= taken
    known = replace(
        nothing_known,
        images=len(chain.images),
        virtual_size=chain.top.guest_size,
        occupied_bytes=sum(taken.values()),
        unfinished=any(
            str(path) in unfinished
            for image in chain.images
            for path in (image.path, image.real_path)
        ),
        problem=_mark_of_corruption(chain),
        data_files=tuple(str(file) for file in map(named_data_file, chain.images) if file),
    )
    first = first_own_index(chain, found.users)
    try:
        with open_chain(chain) as opened:
            gain = gain_of(opened, first)
    except ChainmergeError as error:
        return replace(known, problem=error.sentence)
    return replace(
        known,
        base=str(chain.images[first].path) if first < len(chain.images) - 1 else None,
        freed_bytes=gain.hidden,
        bytes_to_copy=gain.to_copy,
    )


def _mark_of_corruption(chain: Chain) -> str | None:
    marked = [image for image in chain.images if image.header and image.header.corrupt]
    return f"QEMU has marked {marked[0].path} corrupt" if marked else None
