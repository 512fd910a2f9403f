# SPDX-License-Identifier: Apache-2.0
"""What the places mean in which somebody wants to have a look: files that may be images.

A directory stands for everything below it, a volume group for its volumes. Links to directories
are not followed, so there are no loops; pseudo file systems are left out.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.inventory.errors import PlaceTooLarge, PlaceUnreadable
from chainmerge.records.remains import kind_of
from chainmerge.storage import lvm
from chainmerge.storage.errors import reason_of
from chainmerge.storage.volume_errors import LvmFailed, LvmMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MAX_FILES_OF_A_SCAN: Final = 1_000_000
"""Files that are looked at."""
MAX_DIRECTORIES_OF_A_SCAN: Final = 200_000
"""Directories that are."""
_MOST_SENTENCES: Final = 20
_OF_THE_KERNEL: Final = frozenset({"/proc", "/sys", "/dev", "/run/udev"})


class Places(Struct, frozen=True):
    """Where to look.

    Attributes:
        named: What was asked for: absolute paths, and names of volume groups.
        roots: The directories of these, which count with everything below.
        files: What may be an image, each name once; links after what is none.
        loose: Those of the files that are links, or were named themselves: what they stand on
            need not lie below a root.
        records: Directories that have files of unfinished merges.
        left_out: What is not looked at, and why; a sentence each.
    """

    named: tuple[str, ...]
    roots: tuple[Path, ...]
    files: tuple[str, ...]
    loose: tuple[str, ...]
    records: tuple[Path, ...]
    left_out: tuple[str, ...]


def places_of(
    paths: Sequence[str | Path],
    *,
    one_file_system: bool,
    told: Callable[[int], None],
) -> Places:
    """What *paths* mean: directories, images, and volume groups.

    Args:
        paths: as they were named.
        one_file_system: whether what is mounted below a directory is left out.
        told: called now and then with the number of files that were found.

    Raises:
        PlaceUnreadable: there is no such place, or it cannot be listed.
        PlaceTooLarge
    """
    walk = _Walk(one_file_system, told)
    for path in paths:
        walk.enter(path)
    return walk.places()


class _Walk:
    """Collects what there is; what was seen by another way before is not looked at again."""

    def __init__(self, one_file_system: bool, told: Callable[[int], None]) -> None:  # noqa: FBT001
        self._one_file_system = one_file_system
        self._told = told
        self._named: dict[str, None] = {}
        self._roots: dict[Path, None] = {}
        self._files: dict[str, None] = {}
        self._loose: dict[str, None] = {}
        self._records: dict[Path, None] = {}
        self._left_out: list[str] = []
        self._seen: set[str] = set()

    def places(self) -> Places:
        more = len(self._left_out) - _MOST_SENTENCES
        if more > 0:
            self._left_out[_MOST_SENTENCES:] = [f"{counted(more, 'more place')} not looked at"]
        return Places(
            tuple(self._named),
            tuple(self._roots),
            tuple(self._files | self._loose),
            tuple(self._loose),
            tuple(self._records),
            tuple(self._left_out),
        )

    def enter(self, named: str | Path) -> None:
        try:
            status = os.stat(named)  # noqa: PTH116
        except (OSError, ValueError) as error:
            if self._enter_group(str(named)):
                return
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            raise PlaceUnreadable(str(named), reason) from error
        if stat.S_ISDIR(status.st_mode):
            root = Path(os.path.realpath(named))
            self._named[str(root)] = None
            self._roots[root] = None
            self._walk_down(str(root), status.st_dev)
            self._enter_group_of(root)
            return
        path = os.path.abspath(named)  # noqa: PTH100
        self._named[path] = None
        self._loose[path] = None
        if _has_records(os.path.dirname(path)):  # noqa: PTH120
            self._records[Path(path).parent] = None

    def _walk_down(self, root: str, device: int) -> None:
        pending = [root]
        while pending:
            directory = pending.pop()
            if directory in self._seen:
                continue
            if len(self._seen) >= MAX_DIRECTORIES_OF_A_SCAN:
                raise PlaceTooLarge(root, "directories", MAX_DIRECTORIES_OF_A_SCAN)
            self._seen.add(directory)
            try:
                below = sorted(self._listed(root, directory))
            except OSError as error:
                if directory == root:
                    raise PlaceUnreadable(root, reason_of(error)) from error
                self._left_out.append(f"{directory} cannot be listed: {reason_of(error)}")
                continue
            pending += (path for path in reversed(below) if self._may_enter(path, device))

    def _listed(self, root: str, directory: str) -> Iterator[str]:
        """Note the files of a directory; yield the directories in it."""
        found = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield entry.path
                    continue
                found.append((entry.path, entry.is_symlink()))
                if kind_of(entry.name) is not None:
                    self._records[Path(directory)] = None
                if len(found) + len(self._files) + len(self._loose) > MAX_FILES_OF_A_SCAN:
                    raise PlaceTooLarge(root, "files", MAX_FILES_OF_A_SCAN)
        for path, is_link in sorted(found):
            (self._loose if is_link else self._files)[path] = None
        self._told(len(self._files) + len(self._loose))

    def _may_enter(self, directory: str, device: int) -> bool:
        if directory in _OF_THE_KERNEL:
            return False
        if not self._one_file_system:
            return True
        try:
            same = os.lstat(directory).st_dev == device
        except OSError:
            return False
        if not same:
            self._left_out.append(
                f"{directory} is on another file system (--all-file-systems includes it)"
            )
        return same

    def _enter_group_of(self, root: Path) -> None:
        """The directory of a volume group has only volumes that are active."""
        if root.parent == Path("/dev"):
            self._enter_group(root.name)

    def _enter_group(self, name: str) -> bool:
        """Whether *name* is that of a volume group, whose volumes are noted then."""
        if not lvm.is_group_name(name):
            return False
        try:
            volumes = lvm.volumes_in(name)
        except (LvmMissing, LvmFailed):
            return False
        if not volumes:
            return False
        self._named.setdefault(name, None)
        for volume in volumes:
            if volume.active:
                self._loose[volume.path] = None
            else:
                self._left_out.append(f"{volume.path} is not active")
        return True


def _has_records(directory: str) -> bool:
    try:
        with os.scandir(directory) as entries:
            return any(kind_of(entry.name) is not None for entry in entries)
    except OSError:
        return False
