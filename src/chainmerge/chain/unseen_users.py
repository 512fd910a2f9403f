# SPDX-License-Identifier: Apache-2.0
"""Users of images where nobody has looked, or can look: whether that forbids a change. Pure.

Images do not know who uses them. Usually all that use a file lie in its own directory or one of
its neighbours, which are searched; a base in another directory than top is one that many share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from chainmerge.arithmetic.counting import counted
from chainmerge.chain.surroundings import folded
from chainmerge.errors import ChainmergeError, NeededByOthers, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.model import ImageInfo
    from chainmerge.chain.relatives import Relatives


class UsersUnknown(NeededByOthers, Refused):
    """What changes lies in another directory than top, and can be in use from anywhere."""

    code: ClassVar[str] = "users-unknown"
    template: ClassVar[str] = (
        "{images}, in another directory than {top}, may have users anywhere; chainmerge looked for "
        "them only in these places: {searched}"
    )
    hint: ClassVar[str] = (
        "{first}; if you know a directory that holds, at any depth, all images that can use "
        "{images}, give it (--search DIR); if you know that there are no other users, say so "
        "(--sole-user); if that is wrong, other guests' disks are destroyed"
    )
    explanation: ClassVar[str] = (
        "Images do not know who uses them. Linked clones often have a directory for each machine "
        "and share a base in another one, so the directories of one machine's chain say nothing "
        "about the others. A merge into such a base would destroy the disks of all other machines "
        "that use it. chainmerge also looks beside and below the directories of the chain, and "
        "where libvirt, Proxmox VE and running QEMUs keep images, but no search can be complete: "
        "other hosts can use the same storage. So it goes on only if you say where such images can "
        "be, or that there are none. Nothing was changed."
    )
    images: str
    top: str
    searched: str
    first: str


class VolumesInactive(NeededByOthers, Refused):
    """Logical volumes that could hold users of what changes cannot be looked at."""

    code: ClassVar[str] = "volumes-inactive"
    template: ClassVar[str] = "{volumes} could use {images} and cannot be examined: not active"
    hint: ClassVar[str] = (
        "let chainmerge examine them (--activate activates them while this command runs); or, if "
        "all users of {images} are in one chain, name the image of it that the virtual machine "
        "writes to (--active LEAF)"
    )
    explanation: ClassVar[str] = (
        "Images do not know who uses them, so the headers of all images beside those of the chain "
        "are read. A logical volume that is not active has no device to read from. If one holds an "
        "overlay of an image that is merged or written to, its guest's disk would be destroyed. "
        "Nothing was changed."
    )
    volumes: str
    images: str


def unseen_users(
    changed: Sequence[ImageInfo], top: ImageInfo, relatives: Relatives, first: str
) -> Iterator[ChainmergeError]:
    """Why images must not be changed although no other user was found.

    Args:
        changed: what will show other content, or be deleted, besides *top*.
        top: the image that the user has named, which is his.
        relatives: what was found, and where.
        first: what to try first, as the beginning of a hint.
    """
    yield from inactive_users(changed, top, relatives)
    if relatives.searched.is_vouched_for:
        return
    away = [
        str(image.path)
        for image in changed
        if not image.is_block_device and image.real_path.parent != top.real_path.parent
    ]
    if away:
        yield UsersUnknown(folded(away), str(top.path), relatives.searched.places, first)


def inactive_users(
    changed: Sequence[ImageInfo], top: ImageInfo, relatives: Relatives
) -> Iterator[ChainmergeError]:
    """The same, where volumes that are not active are concerned."""
    searched = relatives.searched
    if not changed or searched.active is not None or searched.sole_user:
        return
    if relatives.inactive:
        images = [str(image.path) for image in (*changed, top)]
        yield VolumesInactive(volumes(relatives), folded(images))


def volumes(relatives: Relatives) -> str:
    """The volumes that are not active, as a phrase."""
    what = counted(len(relatives.inactive), "logical volume")
    return f"{what} ({folded([str(path) for path in relatives.inactive])})"
