# SPDX-License-Identifier: Apache-2.0
"""What a chain comes to: how long it is, what it takes, what merging it frees. Nothing is locked.

``list`` and ``scan`` have their chains from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.discovery import discover
from chainmerge.chain.information import on_disk, users_of
from chainmerge.chain.model import Identity
from chainmerge.chain.opening import open_chain
from chainmerge.chain.reading import named_data_file
from chainmerge.chain.target import metadata_policy_of
from chainmerge.documents.chains import ChainSummary
from chainmerge.errors import ChainmergeError
from chainmerge.inventory.gain import first_own_index, gain_of
from chainmerge.options import MergeOptions
from chainmerge.planning.dry_run import bytes_given_back
from chainmerge.planning.freeing import footprints_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from chainmerge.chain.model import Chain
    from chainmerge.documents.status import UnfinishedMerge
    from chainmerge.options import Access
    from chainmerge.storage.bystanders import Openers


class ChainMember(Struct, frozen=True):
    """An image of a chain: its names, what it is, and the bytes that it takes."""

    path: str
    real_path: str
    identity: Identity
    occupied: int


class ChainFacts(Struct, frozen=True):
    """What is in a chain; who uses it at the moment is another matter.

    Fields are those of :class:`chainmerge.documents.chains.ChainSummary`, and

    Attributes:
        members: Its images, root first; none if it cannot be followed.
        virtual_size: See there, and so on.
        trouble: The code of the error that ``problem`` is; None for a mark of QEMU's.
        gives_volumes_back: Whether ``freed_bytes`` is what volume groups get back.
    """

    members: tuple[ChainMember, ...]
    virtual_size: int | None
    base: str | None
    freed_bytes: int | None
    bytes_to_copy: int | None
    problem: str | None
    trouble: str | None = None
    data_files: tuple[str, ...] = ()
    gives_volumes_back: bool = False

    @property
    def occupied(self) -> Mapping[Identity, int]:
        """By image, what it takes."""
        return {member.identity: member.occupied for member in self.members}


def chain_facts(leaf: Path, access: Access, users: Mapping[Identity, int]) -> ChainFacts:
    """Follow a chain down from its leaf, and read the tables of its images.

    Args:
        leaf: the uppermost image.
        access: how images may be reached.
        users: how many images have each one as their backing file.
    """
    try:
        chain = discover(leaf, metadata_policy_of(access, leaf))
    except ChainmergeError as error:
        return ChainFacts((), None, None, None, None, error.sentence, error.code)
    members = tuple(
        ChainMember(str(image.path), str(image.real_path), image.identity, on_disk(image)[0] or 0)
        for image in chain.images
    )
    known = ChainFacts(
        members,
        chain.top.guest_size,
        None,
        None,
        None,
        _mark_of_corruption(chain),
        data_files=tuple(str(file) for file in map(named_data_file, chain.images) if file),
    )
    foreign = {image.identity for image in chain.images if image.foreign}
    first = first_own_index([image.identity for image in chain.images], users, foreign)
    try:
        with open_chain(chain) as opened:
            gain = gain_of(opened, first)
    except ChainmergeError as error:
        return replace(known, problem=error.sentence, trouble=error.code)
    base = chain.images[first].path if first < len(chain.images) - 1 else None
    of_volumes = None if base is None else _given_back_by_volumes(chain, first, access)
    return replace(
        known,
        base=None if base is None else str(base),
        freed_bytes=gain.hidden if of_volumes is None else of_volumes,
        bytes_to_copy=gain.to_copy,
        gives_volumes_back=of_volumes is not None,
    )


def _given_back_by_volumes(chain: Chain, first: int, access: Access) -> int | None:
    """What volume groups get back by a merge that removes volumes, exactly.

    None where there are none whose size says so: files, thin volumes, which give back the blocks
    that are in use, and what cannot be planned.
    """
    images = chain.images[first:]
    footprints = footprints_of(images)
    if not footprints or any(one.is_in_a_pool for one in footprints.values()):
        return None
    try:
        return bytes_given_back(chain.top.path, images[0].path, access, MergeOptions(delete=True))
    except ChainmergeError:
        return None


def summary_of(
    leaf: Path, facts: ChainFacts, openers: Openers, unfinished: frozenset[str]
) -> ChainSummary:
    """A chain as reports have it.

    Args:
        leaf: its uppermost image.
        facts: what is in it.
        openers: who has images open.
        unfinished: images that a merge which was not finished is about.
    """
    names = {str(leaf)} | {
        name for member in facts.members for name in (member.path, member.real_path)
    }
    return ChainSummary(
        leaf=str(leaf),
        images=len(facts.members) or None,
        virtual_size=facts.virtual_size,
        occupied_bytes=sum(facts.occupied.values()) if facts.members else None,
        base=facts.base,
        freed_bytes=facts.freed_bytes,
        bytes_to_copy=facts.bytes_to_copy,
        unfinished=not names.isdisjoint(unfinished),
        users=users_of(leaf, openers),
        problem=facts.problem,
        data_files=facts.data_files,
    )


def most_freed_first(summary: ChainSummary) -> tuple[bool, int, str]:
    """A key to sort chains by: those that cannot be read come last."""
    return summary.freed_bytes is None, -(summary.freed_bytes or 0), summary.leaf


def images_of_merges(merges: Iterable[UnfinishedMerge]) -> frozenset[str]:
    """The ends of all that merges are about."""
    return frozenset(path for merge in merges for path in (merge.base, merge.top) if path)


def _mark_of_corruption(chain: Chain) -> str | None:
    marked = [image for image in chain.images if image.header and image.header.corrupt]
    return f"QEMU has marked {marked[0].path} corrupt" if marked else None
