# SPDX-License-Identifier: Apache-2.0
"""Where the images of a chain may lie."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chainmerge.chain.model import ChainPolicy

_DEVICES = Path("/dev")

# The kernel follows at most 40 links (path_resolution(7)).
_MAX_LINKS = 40


class Directories:
    """Where directories lie, each looked at once: most images of a chain are in the same one.

    What is found here can have changed since. Who relies on it asks again, with a new one.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._known: dict[str, Path] = {}

    def reached(self, path: Path) -> Path:
        """As the function of this name."""
        directory = str(path.parent)
        if directory not in self._known:
            self._known[directory] = Path(os.path.realpath(directory))
        return self._known[directory] / path.name

    def resolved(self, path: Path) -> Path:
        """As the function of this name."""
        current = self.reached(path)
        for _ in range(_MAX_LINKS):
            try:
                target = os.readlink(current)  # noqa: PTH115
            except OSError:
                return current
            following = self.reached(current.parent / target)
            if current.is_relative_to(_DEVICES) and _is_device_node(following):
                return current
            current = following
        return current


def reached(path: Path) -> Path:
    """The file that *path* names, with the links of its directories resolved, but not its own."""
    return Directories().reached(path)


def resolved(path: Path) -> Path:
    """The file that *path* leads to, all symbolic links resolved.

    Where this is a device node behind a link under /dev, that link. All logical volumes
    of a machine are nodes in /dev itself; only the links in /dev/VG and /dev/mapper,
    which udev makes, tell them apart.
    """
    return Directories().resolved(path)


def _is_device_node(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.lstat().st_mode)
    except OSError:
        return False


class AllowedPlaces(Struct, frozen=True):
    """The places where backing files are accepted.

    ``directories`` count alone, ``trees`` with everything below (or are single files).
    ``named`` are images that the user has named. All absolute and without symbolic links.
    """

    directories: frozenset[Path]
    trees: frozenset[Path]
    named: frozenset[Path]

    def holds(self, place: Path) -> bool:
        """Whether the file at *place* (from :func:`reached` or :func:`settled`) is inside."""
        return place.parent in self.directories or any(
            place.is_relative_to(tree) for tree in self.trees
        )

    def names(self, path: Path) -> bool:
        """Whether *path*, whatever it is called, leads to an image that the user has named."""
        return bool(self.named) and Path(os.path.realpath(path)) in self.named


def allowed_places_of(images: Iterable[Path], policy: ChainPolicy) -> AllowedPlaces:
    """The directories of *images*, by name and by where they lead, and what *policy* allows."""
    homes = {place.parent for image in images for place in (reached(image), resolved(image))}
    trees = {
        place
        for path in policy.allow_backing
        for place in (reached(path), resolved(path), Path(os.path.realpath(path)))
    }
    named = frozenset(Path(os.path.realpath(path)) for path in policy.named)
    return AllowedPlaces(frozenset(homes), frozenset(trees), named)
