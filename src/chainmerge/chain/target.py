# SPDX-License-Identifier: Apache-2.0
"""The images that a merge is about: the chain of top, base in it, and who else uses them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.activation import inactive_neighbours
from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import BaseNotBelowTop
from chainmerge.chain.model import Chain, ChainPolicy, ImageInfo
from chainmerge.chain.reading import identity_at
from chainmerge.chain.relatives import Relatives, find_relatives
from chainmerge.options import Direction

if TYPE_CHECKING:
    from chainmerge.chain.surroundings import Look
    from chainmerge.options import Access


class Target(Struct, frozen=True):
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
    chain: Chain,
    base_index: int,
    access: Access,
    policy: ChainPolicy | None = None,
    look: Look | None = None,
) -> Relatives:
    """Who else uses the images of a chain from base up, as far as that can be found out.

    Args:
        chain: the chain of top.
        base_index: where base is in it.
        access: where to look.
        policy: by which the chain was found; by default that of *access*.
        look: as in :func:`chainmerge.chain.relatives.find_relatives`.

    Raises what :func:`chainmerge.chain.relatives.find_relatives` raises.
    """
    found = find_relatives(
        chain,
        base_index,
        search=tuple(Path(path) for path in access.search),
        active=Path(access.active) if access.active else None,
        policy=policy or policy_of(access),
        look=look,
    )
    return replace(
        found,
        searched=replace(found.searched, sole_user=access.sole_user),
        inactive=inactive_neighbours(chain),
    )


def find_target(top: Path, base: Path | None, access: Access, look: Look | None = None) -> Target:
    """Find the chain of *top*, base in it (top's backing file by default), and its relatives.

    Where ``access.active`` names base, the guest writes to base, as after a live merge. Nothing
    that stands on top is found from there, so it is not looked at here. *look* is as in
    :func:`chainmerge.chain.relatives.find_relatives`.

    Raises:
        BaseNotBelowTop, NoBackingFile, and what discovery raises.
    """
    policy = policy_of(access, top, base)
    chain = discover(top, policy, None if look is None else look.headers)
    base_index = chain.base_index if base is None else chain.index_of(base)
    if base_index == len(chain.images) - 1:
        raise BaseNotBelowTop(str(base), str(top))
    if access.active is not None:
        active = identity_at(Path(access.active))
        if active == chain.images[base_index].identity:
            access = replace(access, active=None)
    return Target(chain, base_index, relatives_of(chain, base_index, access, policy, look))
