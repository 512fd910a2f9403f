# SPDX-License-Identifier: Apache-2.0
"""The files that are looked at for users of a chain's images, and how far that goes.

An image can be used from anywhere, so no search is complete. The promise is to say which places
were searched. *Near* are the directories of the chain and the places that the user names: they are
searched completely, or an error says why not. *Around* are the directories beside and below those,
and the places where images are kept on this host: they are searched as far as that costs next to
nothing.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from functools import cached_property
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.allowed_places import Directories
from chainmerge.chain.errors import SearchPathUnusable, TooManyFiles
from chainmerge.chain.managers import managed_places
from chainmerge.chain.model import Identity, identity_of
from chainmerge.documents.images import LEVELS, Searched
from chainmerge.qcow2.known_headers import KnownHeaders
from chainmerge.storage.mounts import mounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chainmerge.chain.managers import ManagedPlace

MAX_FILES: Final = 100_000
"""Directory entries that are looked at near the chain."""

MAX_AROUND: Final = 4096
"""Directory entries that are looked at around it, and as many where this host keeps images."""

_DEVICES: Final = "/dev"

# Volume groups have a directory each, which holds no others.
_DEVICE_LEVELS: Final = 1
_NAMED: Final = 3


def surroundings_of(images: Iterable[Path], search: Sequence[Path] = ()) -> Surroundings:
    """What there is to look at around *images*, and in the places that the user names."""
    return Surroundings(images, search, MAX_FILES, MAX_AROUND, Look())


class Look:
    """What one look around has seen, for all chains that it is about.

    The disks of a VM mostly lie together: each directory is listed once, and each file read once.
    What is seen in a look gets old with it, so a later one begins with nothing.
    """

    def __init__(self, headers: KnownHeaders | None = None) -> None:
        """Nothing is seen yet, except for *headers* that may still be what they were."""
        self.headers = headers or KnownHeaders()
        """Of images, compared with what is there whenever they are used."""
        self.backing_names: dict[Identity, str | None] = {}
        """By the identity of the overlay."""
        self._listings: dict[Identity, _Listing] = {}

    @cached_property
    def managed_places(self) -> tuple[ManagedPlace, ...]:
        """As :func:`chainmerge.chain.managers.managed_places`."""
        return managed_places()

    def listing(self, directory: str, identity: Identity, limit: int) -> _Listing:
        """The entries of a directory; where they are more than *limit*, perhaps not all.

        Raises OSError.
        """
        if identity not in self._listings:
            found = _listed(directory, limit)
            if len(found) > limit:
                return found
            self._listings[identity] = found
        return self._listings[identity]


class Surroundings:
    """What there is to look at for the users of some images."""

    def __init__(
        self,
        images: Iterable[Path],
        search: Sequence[Path],
        max_files: int,
        max_around: int,
        look: Look,
    ) -> None:
        """Begin at the directories of *images*, and at the places in *search*."""
        self._look = look
        self._search = search
        self._max_files = max_files
        self._max_around = max_around
        directories = Directories()
        self._homes = sorted(
            {
                str(place.parent)
                for path in images
                for place in (directories.reached(path), directories.resolved(path))
            }
        )
        self._mounts = mounts()
        self._file_systems = {self._mounts.file_system_of(home) for home in self._homes}
        self._count = 0
        self._listed: dict[Identity, _Listing] = {}
        self._managed: list[str] = []
        self._stopped: list[str] = []
        self._elsewhere: list[str] = []
        self._links: list[str] = []
        self._unreadable: list[str] = []

    def near(self) -> Iterator[Path]:
        """The files in the directories of the images, and in and below those that are named.

        Raises:
            SearchPathUnusable: a directory cannot be read.
            TooManyFiles
        """
        for home in self._homes:
            yield from self._all_in(home, home).files
        for place in self._search:
            yield from self._named(place)

    def around(self) -> Iterator[Path]:
        """Files that may be users of the images too; none twice. What cannot be read is noted."""
        pending = deque((home, LEVELS) for home in self._homes if not _is_below_dev(home))
        pending += [(parent, LEVELS) for parent in self._beside()]
        if any(map(_is_below_dev, self._homes)):
            pending.append((_DEVICES, _DEVICE_LEVELS))
        yield from self._walk(pending)
        yield from self._walk(deque(self._places_of_managers(self._look.managed_places)))

    def note_unreadable(self, path: Path) -> None:
        """Say that a file that :meth:`around` gave could not be read."""
        self._unreadable.append(str(path))

    def searched(self) -> Searched:
        """What was searched, once both iterators are exhausted."""
        beside = self._beside()
        alone = [
            home for home in self._homes if not _is_below_dev(home) and _parent(home) not in beside
        ]
        left_out = [
            *self._stopped,
            *_phrase(self._elsewhere, "on another file system"),
            *_phrase(self._links, "behind a symbolic link"),
            *_phrase(self._unreadable, "not readable"),
        ]
        return Searched(
            directories=(*self._homes, *self._managed),
            named=tuple(str(place.absolute()) for place in self._search),
            around=(*beside, *alone),
            left_out=tuple(left_out),
        )

    def _beside(self) -> list[str]:
        """The directories in which those of the images are."""
        found = []
        for home in self._homes:
            parent = _parent(home)
            # What is beside a directory of the root directory is a system, not a place for images.
            if parent == "/" or _is_below_dev(home) or parent in found:
                continue
            if self._mounts.file_system_of(parent) in self._file_systems:
                found.append(parent)
        return found

    def _places_of_managers(self, places: Iterable[ManagedPlace]) -> Iterator[tuple[str, int]]:
        for place in places:
            if _is_below_dev(place.directory):
                continue
            # By its name first: to look at one that is dead takes forever.
            named = os.path.normpath(place.directory)
            if self._is_elsewhere(named):
                self._elsewhere.append(named)
                continue
            directory = os.path.realpath(named)
            if self._is_elsewhere(directory):
                self._elsewhere.append(directory)
                continue
            if _identity(directory) in self._listed:
                continue
            if Path(directory).is_dir():
                self._managed.append(directory)
                yield directory, place.levels

    # Near

    def _named(self, place: Path) -> Iterator[Path]:
        try:
            is_directory = stat.S_ISDIR(place.stat().st_mode)
        except (OSError, ValueError) as error:
            raise _unusable(str(place), error) from error
        if not is_directory:
            self._take(1, str(place))
            yield place.absolute()
            return
        root = os.path.realpath(place)
        allowed = {*self._file_systems, self._mounts.file_system_of(root)}
        listing = self._all_in(root, str(place))
        # A directory can be mounted in itself.
        entered = {_identity(root)}
        pending = deque(listing.directories)
        self._links += listing.links
        yield from listing.files
        while pending:
            directory = pending.popleft()
            if self._is_mounted_from(directory, allowed):
                self._elsewhere.append(directory)
                continue
            identity = _identity(directory)
            # Others may remove what they like meanwhile.
            if identity in entered or (identity is None and not os.path.lexists(directory)):
                continue
            entered.add(identity)
            listing = self._all_in(directory, directory)
            pending += listing.directories
            self._links += listing.links
            yield from listing.files

    def _all_in(self, directory: str, called: str) -> _Listing:
        """What is in a directory; without files if they have been given before."""
        try:
            identity = identity_of(os.stat(directory))  # noqa: PTH116
            if identity in self._listed:
                return replace(self._listed[identity], files=())
            listing = self._look.listing(directory, identity, self._max_files - self._count)
        except (OSError, ValueError) as error:
            raise _unusable(called, error) from error
        self._take(len(listing), called)
        self._listed[identity] = listing
        return listing

    def _take(self, entries: int, called: str) -> None:
        self._count += entries
        if self._count > self._max_files:
            raise TooManyFiles(called, self._max_files)

    # Around

    def _walk(self, pending: deque[tuple[str, int]]) -> Iterator[Path]:
        """The files in some directories and so many levels below, the nearest ones first."""
        entered: set[Identity] = set()
        count = 0
        while pending:
            directory, levels = pending.popleft()
            try:
                identity = identity_of(os.stat(directory))  # noqa: PTH116
                if identity in entered:
                    continue
                entered.add(identity)
                known = self._listed.get(identity)
                listing = known
                if listing is None:
                    listing = self._look.listing(directory, identity, self._max_around - count)
            except FileNotFoundError:
                continue
            except OSError:
                self._unreadable.append(directory)
                continue
            if known is None:
                count += len(listing)
                if count > self._max_around:
                    self._stopped.append(
                        f"{directory} and others (search stopped after {self._max_around} files)"
                    )
                    return
                self._listed[identity] = listing
                yield from listing.files
            if levels:
                pending += self._to_enter(listing.directories, levels - 1)

    def _to_enter(self, directories: Sequence[str], levels: int) -> Iterator[tuple[str, int]]:
        for directory in directories:
            if self._is_mounted_from(directory, self._file_systems):
                self._elsewhere.append(directory)
            else:
                yield directory, levels

    def _is_elsewhere(self, directory: str) -> bool:
        return self._mounts.file_system_of(directory) not in self._file_systems

    def _is_mounted_from(self, directory: str, allowed: set[str]) -> bool:
        """Whether it is where something else is mounted than the *allowed* file systems."""
        mounted = self._mounts.file_systems.get(directory)
        return mounted is not None and mounted not in allowed


class _Listing(Struct, frozen=True):
    """What is in a directory, in order."""

    files: tuple[Path, ...]
    directories: tuple[str, ...]
    links: tuple[str, ...]
    """Symbolic links that lead to directories."""

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.files) + len(self.directories) + len(self.links)


def _listed(directory: str, limit: int) -> _Listing:
    """No more than *limit* + 1 entries of a directory.

    Raises OSError.
    """
    files, directories, links = [], [], []
    with os.scandir(directory) as entries:
        for entry in sorted(islice(entries, max(limit, 0) + 1), key=attrgetter("name")):
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.path)
            elif entry.is_symlink() and _leads_to_directory(entry):
                links.append(entry.path)
            else:
                files.append(Path(entry.path))
    return _Listing(tuple(files), tuple(directories), tuple(links))


def _leads_to_directory(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:
        return False


def _identity(directory: str) -> Identity | None:
    try:
        return identity_of(os.stat(directory))  # noqa: PTH116
    except (OSError, ValueError):
        return None


def _unusable(place: str, error: OSError | ValueError) -> SearchPathUnusable:
    return SearchPathUnusable(place, getattr(error, "strerror", None) or str(error))


def _parent(directory: str) -> str:
    return os.path.dirname(directory)  # noqa: PTH120


def _is_below_dev(directory: str) -> bool:
    return directory == _DEVICES or directory.startswith(f"{_DEVICES}/")


def folded(paths: Sequence[str]) -> str:
    """Paths for a sentence: by name while a reader can take them in."""
    named = ", ".join(paths[:_NAMED])
    more = len(paths) - _NAMED
    return f"{named} and {more} more" if more > 0 else named


def _phrase(paths: Sequence[str], why: str) -> Iterator[str]:
    if paths:
        yield f"{folded(paths)} ({why})"
