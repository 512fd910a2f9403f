# SPDX-License-Identifier: Apache-2.0
"""Who else uses the images of a chain: siblings, children, and the images above those.

An image does not know its users, so the headers of all qcow2 files around it are read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict, deque
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.allowed_places import allowed_places_of
from chainmerge.chain.discovery import walk_down
from chainmerge.chain.errors import ActiveElsewhere
from chainmerge.chain.model import Chain, ChainPolicy, Identity, ImageFormat, ImageInfo, identity_of
from chainmerge.chain.names import possible_backing_paths
from chainmerge.chain.reading import (
    DeclaredFormat,
    describe,
    identity_at,
)
from chainmerge.chain.surroundings import MAX_AROUND, MAX_FILES, Look, Surroundings
from chainmerge.documents.images import Searched
from chainmerge.errors import ChainmergeError
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.header import MAGIC, glance_at_backing_name, parse_header
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

REMOVABLE_MAJORS = {2, 11}
"""Floppy and CD-ROM drives: nothing of a chain is there, and they are slow to say so."""
_LOOP = 7
_NOTHING_THERE = {errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENOMEDIUM, errno.ENODEV}


class Descent(Struct, frozen=True, eq=False):
    """The first step of the way from an image down to top, and the rest of it.

    The ways share their ends: as tuples, those of n images on a line would take n*n/2 paths.
    """

    path: Path
    rest: Descent | None

    def __repr__(self) -> str:
        # The rest may be longer than Python nests calls.
        return f"Descent({self.path!r}, ...)"


class ImageAbove(Struct, frozen=True):
    """An image above another one: above top, unless something else is said."""

    image: ImageInfo
    way: Descent | None
    """None for a child of that one."""

    @property
    def between(self) -> tuple[Path, ...]:
        """The images between it and top, upper first; empty for a child of top."""
        paths = []
        step = self.way
        while step is not None:
            paths.append(step.path)
            step = step.rest
        return tuple(paths)


class Relatives(Struct, frozen=True):
    """The images outside the chain that use images of the chain, in order of their paths."""

    siblings: tuple[ImageInfo, ...]
    """Their backing file is base."""
    middle_children: tuple[ImageInfo, ...]
    """Their backing file is an image between base and top."""
    children: tuple[ImageInfo, ...]
    """Their backing file is top."""
    beside: tuple[ImageInfo, ...]
    """Everything that stands on base, or on an image between base and top, past top and without
    being part of the chain: the siblings and the middle children, and what stands on those."""
    above: tuple[ImageAbove, ...]
    """Everything that stands on top, over any number of steps: the children, then what
    stands on those, and so on."""
    unreadable: tuple[tuple[Path, str], ...]
    """Files that may be qcow2 images but cannot be read, and why: they could be relatives."""
    unknown: frozenset[Path]
    """Those files of them that could not be looked at. Others are damaged: QEMU does not open them
    either. Or they are devices, of which there are many under /dev that nobody can read."""
    searched: Searched
    """Where they were looked for."""
    inactive: tuple[Path, ...] = ()
    """Logical volumes beside those of the chain that are not active: nobody can look at them."""

    def branches_with(self, name: str) -> tuple[ImageInfo, ...]:
        """The siblings, and the others on images between base and top, with a bitmap *name*.

        Base's may be a part of their checkpoint.
        """
        return tuple(
            image for image in (*self.siblings, *self.middle_children) if image.has_bitmap(name)
        )


def find_relatives(
    chain: Chain,
    base_index: int,
    search: Sequence[Path] = (),
    active: Path | None = None,
    *,
    policy: ChainPolicy | None = None,
    look: Look | None = None,
    max_files: int = MAX_FILES,
    max_around: int = MAX_AROUND,
) -> Relatives:
    """Find the users of the images from base to top that are not in the chain themselves.

    The headers of all qcow2 images in the directories of the chain's images are read, and
    in *search* with all directories below; then those around
    (:class:`chainmerge.chain.surroundings.Surroundings`). Images are compared by device
    and inode. A file that can be reached by several names counts once, by the first name
    (in order) by which it is a relative.

    Args:
        chain: the chain of top.
        base_index: where base is in it.
        search: further directories, or single files and block devices.
        active: the upper end of the chain that the guest writes to. Its backing files
            are found wherever they lie.
        policy: what is allowed and declared for the chain of *active*.
        look: what has been seen on behalf of other chains, in the same look around.
        max_files: how many directory entries may be looked at near the chain.
        max_around: how many are looked at around it.

    Raises:
        ActiveElsewhere: top is not below *active*.
        SearchPathUnusable, TooManyFiles
        Refused: what :func:`chainmerge.chain.discovery.discover` raises, for *active*.
    """
    look = look or Look()
    survey = _Survey(frozenset(image.identity for image in chain.images), look)
    if active is not None:
        survey.add_line(_line_to_top(chain, active, policy or ChainPolicy()))
    images = [image.path for image in chain.images]
    searched = survey.look_around(Surroundings(images, search, max_files, max_around, look))
    found = _judge(chain, base_index, survey, searched)
    return (
        found if active is None else replace(found, searched=replace(searched, active=str(active)))
    )


def find_users(
    images: Sequence[Path], search: Sequence[Path] = (), *, max_files: int = MAX_FILES
) -> tuple[Path, ...]:
    """Find the other images whose backing file is one of *images*, whatever their chains are.

    Args:
        images: images that exist.
        search: as in :func:`find_relatives`, and so is *max_files*.
        max_files: see there.

    Returns:
        Their paths, in order.

    Raises:
        SearchPathUnusable, TooManyFiles
    """
    identities = [identity for path in images if (identity := identity_at(path)) is not None]
    look = Look()
    survey = _Survey(frozenset(identities), look)
    survey.look_around(Surroundings(images, search, max_files, MAX_AROUND, look))
    users = {path for identity in identities for _, path in survey.users_of(identity)}
    return tuple(sorted(users))


def _line_to_top(chain: Chain, active: Path, policy: ChainPolicy) -> list[ImageInfo]:
    """The images from *active* down to top, both included."""
    path = active.absolute()
    places = [path, *(image.path for image in chain.images)]
    line = []
    for image in walk_down(path, policy, allowed_places_of(places, policy)):
        line.append(image)
        if image.identity == chain.top.identity:
            return line
    raise ActiveElsewhere(str(active), str(chain.top.path))


class _Survey:
    """What has been found out so far: who uses which image."""

    def __init__(self, chain: frozenset[Identity], look: Look) -> None:
        self._chain = chain | {_below(identity) for identity in chain}
        self._backing_names = look.backing_names
        self._identities: dict[Path, Identity | None] = {}
        self._users: dict[Identity, dict[Identity, Path]] = defaultdict(dict)
        self._known: dict[Identity, ImageInfo] = {}
        self._sound: dict[Identity, bool] = {}
        self.unreadable: dict[Path, str] = {}
        self.unknown: set[Path] = set()

    def add_line(self, images: Sequence[ImageInfo]) -> None:
        """Add images that are known already, each followed by its backing file."""
        for image, backing in pairwise(images):
            self._known[image.identity] = image
            self._users[backing.identity][image.identity] = image.path

    def look_around(self, surroundings: Surroundings) -> Searched:
        """Look at everything that there is to look at; says what that was.

        Raises what :meth:`Surroundings.near` raises.
        """
        for path in surroundings.near():
            self._look_at(path)
        for path in surroundings.around():
            if not self._glance_at(path):
                surroundings.note_unreadable(path)
        return surroundings.searched()

    def _look_at(self, path: Path) -> None:
        """Note what a file uses, or why that is not known."""
        try:
            self._note_use(path)
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                self.unreadable[path] = error.strerror or str(error)
                self._note_unknown(path)
        except ChainmergeError as error:
            if not _says_nothing_is_there(error):
                self._note(path, error)

    def _glance_at(self, path: Path) -> bool:
        """Note what a file uses; whether that could be found out, if it is a file."""
        try:
            self._note_use(path)
        except OSError as error:
            return error.errno in _NOTHING_THERE or _is_device(path)
        except FormatError:
            # QEMU does not open it either.
            return True
        except ChainmergeError as error:
            return _says_nothing_is_there(error) or _is_device(path)
        return True

    def _note_use(self, path: Path) -> None:
        """Read a file's header if it is a qcow2 image outside the chain, and note what it uses.

        Raises OSError, ChainmergeError.
        """
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            return
        identity = identity_of(status)
        if identity in self._chain or _below(identity) in self._chain:
            return
        if identity not in self._backing_names:
            self._backing_names[identity] = _backing_name(path, status)
        name = self._backing_names[identity]
        if not name:
            return
        for backing in possible_backing_paths(path, name):
            used = self._identity_at(backing)
            if used is not None:
                self._users[used].setdefault(identity, path)

    def _identity_at(self, path: Path) -> Identity | None:
        """As :func:`identity_at`, which many overlays of one image ask for the same path."""
        if path not in self._identities:
            self._identities[path] = identity_at(path)
        return self._identities[path]

    def _note(self, path: Path, error: ChainmergeError) -> None:
        self.unreadable[path] = error.sentence
        if not isinstance(error, FormatError):
            self._note_unknown(path)

    def _note_unknown(self, path: Path) -> None:
        if not _is_device(path):
            self.unknown.add(path)

    def users_of(self, identity: Identity) -> list[tuple[Identity, Path]]:
        """The images outside the chain whose backing file this is, in order of their paths."""
        users = sorted(self._users.get(identity, {}).items(), key=itemgetter(1))
        return [(user, path) for user, path in users if self._can_be_opened(user, path)]

    def _can_be_opened(self, identity: Identity, path: Path) -> bool:
        """Whether a user has a header that QEMU takes."""
        if identity not in self._sound:
            self._sound[identity] = identity in self._known or self._has_sound_header(path)
        return self._sound[identity]

    def _has_sound_header(self, path: Path) -> bool:
        try:
            with FileReadable(path) as readable:
                parse_header(readable)
        except ChainmergeError as error:
            self._note(path, error)
            return False
        return True

    def describe(self, identity: Identity, path: Path, backing: Identity) -> ImageInfo | None:
        """Read an image in full, as one that uses *backing*."""
        if identity in self._known:
            return self._known[identity]
        try:
            with FileReadable(path) as readable:
                image = describe(path, readable, DeclaredFormat(ImageFormat.QCOW2, None))
        except ChainmergeError as error:
            self._note(path, error)
            return None
        leads_to = (
            candidate
            for candidate in possible_backing_paths(path, image.backing_name or "")
            if identity_at(candidate) == backing
        )
        return replace(image, backing=next(leads_to, None))


def _backing_name(path: Path, status: os.stat_result) -> str | None:
    """The backing name in a file's header; None if there is none or this is not a qcow2 image.

    Raises:
        OSError: the device cannot be read now.
        ChainmergeError: the file cannot be read, or begins as qcow2 but is damaged.
    """
    if stat.S_ISBLK(status.st_mode):
        if os.major(status.st_rdev) in REMOVABLE_MAJORS:
            return None
        if is_suspended(status.st_rdev):
            raise OSError(errno.EBUSY, "the device is suspended")
    elif not _begins_as_image(path):
        return None
    with FileReadable(path) as readable:
        return glance_at_backing_name(readable)


def _begins_as_image(path: Path) -> bool:
    """Whether a regular file has the magic: of most files around there is nothing else to know.

    Raises OSError.
    """
    # The file may have become a pipe since it was looked at.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        return os.pread(fd, len(MAGIC), 0) == MAGIC
    finally:
        os.close(fd)


def _says_nothing_is_there(error: ChainmergeError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _NOTHING_THERE


def _is_device(path: Path) -> bool:
    try:
        return path.is_block_device()
    except OSError:
        return False


def _below(identity: Identity) -> Identity:
    """What a device lies on that has the same content; anything else is its own.

    That is the file below a loop device, and the one device of the same size below a device of
    the device-mapper, such as the hidden ``-real`` of a volume that has snapshots.
    """
    of, number = identity
    if of != 0 or not number:
        return identity
    node = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    try:
        if os.major(number) == _LOOP:
            link = node / "loop" / "backing_file"
            return identity_at(Path(link.read_text(encoding="utf-8").rstrip("\n"))) or identity
        (slave,) = (node / "slaves").iterdir()
        if (slave / "size").read_text() != (node / "size").read_text():
            return identity
        major, _, minor = (slave / "dev").read_text().partition(":")
        return _below((0, os.makedev(int(major), int(minor))))
    except (OSError, ValueError):
        return identity


def is_suspended(device: int) -> bool:
    """Whether a device-mapper device is suspended: reading it would block until it is resumed."""
    state = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/dm/suspended")
    try:
        return state.read_text(encoding="ascii").strip() == "1"
    except OSError:
        return False


def _judge(chain: Chain, base_index: int, survey: _Survey, searched: Searched) -> Relatives:
    on_base = _above(chain.images[base_index].identity, survey)
    on_middle = [
        found for image in chain.middle(base_index) for found in _above(image.identity, survey)
    ]
    above = _above(chain.top.identity, survey)
    return Relatives(
        siblings=_children(on_base),
        middle_children=_children(on_middle),
        children=_children(above),
        beside=tuple(found.image for found in (*on_base, *on_middle)),
        above=tuple(above),
        unreadable=tuple(sorted(survey.unreadable.items())),
        unknown=frozenset(survey.unknown),
        searched=searched,
    )


def _children(above: Iterable[ImageAbove]) -> tuple[ImageInfo, ...]:
    return tuple(found.image for found in above if found.way is None)


def _above(lowest: Identity, survey: _Survey) -> list[ImageAbove]:
    """Everything outside the chain that stands on one of its images, nearest first."""
    found: list[ImageAbove] = []
    seen = {lowest}
    pending: deque[tuple[Identity, Descent | None]] = deque([(lowest, None)])
    while pending:
        below, way = pending.popleft()
        for user, path in survey.users_of(below):
            if user in seen:
                continue
            seen.add(user)
            image = survey.describe(user, path, below)
            if image is not None:
                found.append(ImageAbove(image, way))
            pending.append((user, Descent(path, way)))
    return found
