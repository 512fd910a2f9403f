# SPDX-License-Identifier: Apache-2.0
"""Users of images where nobody has looked, or can look: whether that forbids a change. Pure.

Images do not know who uses them. As a rule all that use a file lie in its own directory or one of
its neighbours, which are searched; a base in another directory than top is one that many share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from chainmerge.chain.surroundings import folded
from chainmerge.errors import ChainmergeError, NeededByOthers, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.model import ImageInfo
    from chainmerge.chain.relatives import Relatives


@dataclass(eq=False)
class UsersUnknown(NeededByOthers, Refused):
    """What changes lies in another directory than top, and can be in use from anywhere."""

    code: ClassVar[str] = "users-unknown"
    template: ClassVar[str] = (
        "{images}, in another directory than {top}, can be in use from anywhere; other users were "
        "looked for in these places only: {searched}"
    )
    hint: ClassVar[str] = (
        "{first}; if you know the directory below which all images lie that can use {images}, "
        "name it (--search DIR, with everything below); if you know that there are no others, say "
        "so (--sole-user); other guests' disks are destroyed where that is wrong"
    )
    explanation: ClassVar[str] = (
        "Images do not know who uses them. Linked clones often have a directory for each machine "
        "and share a base in another one, so that the directories of one machine's chain say "
        "nothing of the others. A merge into such a base would destroy the disks of all other "
        "machines that stand on it. chainmerge also looks beside and below the directories of the "
        "chain, and where libvirt, Proxmox VE and running QEMUs keep images, but no search of its "
        "own is complete: other hosts can use the same storage. So it goes on only when told "
        "where such images can be, or that there are none. Nothing was changed."
    )
    images: str
    top: str
    searched: str
    first: str


@dataclass(eq=False)
class VolumesInactive(NeededByOthers, Refused):
    """Logical volumes that could hold users of what changes cannot be looked at."""

    code: ClassVar[str] = "volumes-inactive"
    template: ClassVar[str] = (
        "{volumes} could stand on {images} and cannot be looked at: not active"
    )
    hint: ClassVar[str] = (
        "have them looked at (--activate brings them up while this command runs); or name the "
        "image that the virtual machine writes to (--active LEAF), if all that stands on "
        "{images} is in the chain of that one"
    )
    explanation: ClassVar[str] = (
        "Images do not know who uses them, so the headers of all images beside those of the chain "
        "are read. A logical volume that is not active has no device to be read. If one holds an "
        "overlay of an image that is merged or written to, its guest's disk would be destroyed. "
        "Nothing was changed."
    )
    volumes: str
    images: str


def unseen_users(
    changed: Sequence[ImageInfo], top: ImageInfo, relatives: Relatives, first: str
) -> Iterator[ChainmergeError]:
    """Why images must not be changed although nobody was found who would mind.

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
    """The volumes that are not active, for a sentence."""
    count = len(relatives.inactive)
    what = "1 logical volume" if count == 1 else f"{count} logical volumes"
    return f"{what} ({folded([str(path) for path in relatives.inactive])})"
