# SPDX-License-Identifier: Apache-2.0
"""What is removed when an image is deleted or renamed: examined before anything is written.

With the file or the logical volume of an image, two kinds of things lose their meaning: the
symbolic links by which it was reached, which would lead nowhere, and its external data file, which
nothing else opens. The names below ``/dev`` are the system's, which takes them away itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.chain.data_files import find_data_file_users
from chainmerge.chain.model import Identity
from chainmerge.chain.reading import identity_at
from chainmerge.errors import ChainmergeError
from chainmerge.storage.lvm_volumes import KnownVolume, find_volume, uuids_at
from chainmerge.storage.removal import creation_obstacle, mount_of, removal_obstacle
from chainmerge.storage.volume_names import is_device_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.model import Chain, ImageInfo
    from chainmerge.options import Access, MergeOptions

# As many as the kernel follows.
_MOST_LINKS: Final = 40
NO_VOLUMES: Final[Mapping[Identity, KnownVolume]] = MappingProxyType({})


class Belongings(Struct, frozen=True):
    """What is useless without an image.

    Attributes:
        links: symbolic links by which the image was reached, the first one first.
        data_file: its external data file, all links resolved; None without one that can go.
        kept_data_file: one that stays, and why, in words.
    """

    links: tuple[Path, ...] = ()
    data_file: Path | None = None
    kept_data_file: str | None = None


class Removals(Struct, frozen=True):
    """What is known of the names that a merge may take away.

    Attributes:
        belongings: by the images that they belong to.
        obstacles: why a path cannot be removed or replaced, in words.
        closed: why no file can be made in a directory, in words.
        mounts: the mount that an image's directory is on.
        volumes: the logical volumes that images are on, by the image.
    """

    belongings: Mapping[Identity, Belongings]
    obstacles: Mapping[Path, str]
    closed: Mapping[Path, str]
    mounts: Mapping[Path, int | None]
    volumes: Mapping[Identity, KnownVolume] = NO_VOLUMES


NOTHING_GOES: Final = Removals({}, {}, {}, {})


class Going(Struct, frozen=True):
    """The names that go with images: data files, and links that would lead nowhere."""

    data_files: tuple[Path, ...] = ()
    links: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them, in the order in which they go."""
        return self.data_files + self.links


def look_at_removals(
    chain: Chain, base_index: int, access: Access, options: MergeOptions
) -> Removals:
    """Look at everything that a merge may delete or rename, and at where it keeps its records.

    Raises LvmMissing, LvmFailed where an image lies on a logical volume.
    """
    images = chain.images[base_index:]
    places = {image.real_path.parent for image in (images[0], images[-1])}
    closed = {place: reason for place in places if (reason := creation_obstacle(place)) is not None}
    if not (options.delete or options.keep_name):
        return Removals({}, {}, closed, {})
    belongings = {image.identity: belongings_of(image, chain, access) for image in images}
    paths = {image.real_path for image in images if not image.is_block_device}
    for one in belongings.values():
        paths.update(one.links)
        if one.data_file is not None:
            paths.add(one.data_file)
    obstacles = {path: reason for path in paths if (reason := removal_obstacle(path)) is not None}
    # They would be left behind, with nothing that says what they are.
    obstacles |= {
        image.real_path: "it keeps its data in other files, and is one image only with them"
        for image in images
        if image.extents
    }
    mounts = {place: mount_of(place) for place in places}
    return Removals(belongings, obstacles, closed, mounts, volumes_of(images))


def volumes_of(images: Sequence[ImageInfo]) -> Mapping[Identity, KnownVolume]:
    """The logical volumes that images are on, by the image.

    Raises LvmMissing, LvmFailed.
    """
    volumes = {}
    for image in images:
        uuids = uuids_at(image.real_path) if image.is_block_device else None
        volume = None if uuids is None else find_volume(str(image.path), uuids)
        if volume is not None:
            volumes[image.identity] = volume
    return volumes


def belongings_of(image: ImageInfo, chain: Chain, access: Access) -> Belongings:
    """Find what is of no use without *image*, one of those of *chain*."""
    links = tuple(islice(_links(image.path), _MOST_LINKS))
    if image.is_block_device:
        links = tuple(takewhile(lambda link: not is_device_name(link), links))
    if image.data_file is None:
        return Belongings(links)
    data_file = Path(os.path.realpath(image.data_file))
    reason = _needed_by(data_file, image, chain, access)
    if reason is None:
        return Belongings(links, data_file)
    return Belongings(links, None, f"{data_file}, the data file of {image.path}, is kept: {reason}")


def _links(path: Path) -> Iterator[Path]:
    """The links that a path goes through in its last component, itself included."""
    while path.is_symlink():
        yield path
        path = path.parent / path.readlink()


def _needed_by(data_file: Path, image: ImageInfo, chain: Chain, access: Access) -> str | None:
    """Why a data file cannot go with its image, in words."""
    if not data_file.is_file():
        return "it is not a regular file"
    identity = identity_at(data_file)
    if any(one.identity == identity for one in chain.images):
        return "it is an image of the chain itself"
    others = [
        one
        for one in chain.images
        if one.data_file is not None
        and one.identity != image.identity
        and identity_at(one.data_file) == identity
    ]
    if others:
        return f"{others[0].path} has its data there too"
    try:
        search = [Path(place) for place in access.search]
        users = find_data_file_users(data_file, [image.real_path.parent, *search])
    except ChainmergeError as error:
        return f"chainmerge cannot look for its other users: {error.sentence}"
    strangers = [user for user in users if identity_at(user) != image.identity]
    return f"{strangers[0]} uses it, or may use it" if strangers else None


def going_with(
    unread: Sequence[ImageInfo],
    unnamed: Sequence[ImageInfo],
    belongings: Mapping[Identity, Belongings],
) -> Going:
    """What goes with images.

    Args:
        unread: those whose content nobody will have any more.
        unnamed: those whose names will lead nowhere.
        belongings: see :class:`Removals`.
    """
    unused = [belongings.get(image.identity, Belongings()).data_file for image in unread]
    links = [belongings.get(image.identity, Belongings()).links for image in unnamed]
    return Going(
        tuple(file for file in unused if file is not None),
        tuple(link for several in links for link in several),
    )
