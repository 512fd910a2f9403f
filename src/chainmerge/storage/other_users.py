# SPDX-License-Identifier: Apache-2.0
"""Makes sure that nobody uses the images of a merge without QEMU's locks.

One look serves all images of all disks. A user that would do or take harm makes the merge be
refused; one that only reads is named in a warning.
"""

from __future__ import annotations

import contextlib
import stat
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct

from chainmerge.storage.bystanders import Wanted, bystanders_of
from chainmerge.storage.errors import ImageInUse
from chainmerge.storage.locks import LockMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from chainmerge.storage.bystanders import Bystander

_LOOKS: Final = 3
_BETWEEN_LOOKS: Final = 0.05

Images: TypeAlias = "Sequence[Wanted]"
"""What one merge wants of which images."""


class OtherUsers(Struct, frozen=True):
    """Who else uses the images of one merge.

    Attributes:
        refusals: Why it must not be done now, one for each image.
        warnings: Who reads what is going to be another.
    """

    refusals: tuple[ImageInUse, ...]
    warnings: tuple[str, ...]


def look_for_others(
    merges: Sequence[Images], known: frozenset[int] = frozenset()
) -> tuple[OtherUsers, ...]:
    """Who else uses the images of each of some merges, found in one look.

    Args:
        merges: the images of each.
        known: the ids of processes that may use them.
    """
    wanted = {(one.path, one.mode, one.dies): one for images in merges for one in images}
    found: dict[str, list[Bystander]] = defaultdict(list)
    for bystander in _who_stay(tuple(wanted.values()), known):
        found[bystander.image].append(bystander)
    return tuple(_judged(images, found) for images in merges)


def _who_stay(wanted: Images, known: frozenset[int]) -> tuple[Bystander, ...]:
    """Who uses the images, except those who are gone again at once.

    To find out whether an image can be written to is to open it: a plan, a tool that scans.
    """
    for _ in range(_LOOKS - 1):
        found = bystanders_of(wanted, known)
        if not any(one.excludes for one in found):
            return found
        time.sleep(_BETWEEN_LOOKS)
    return bystanders_of(wanted, known)


def require_alone(images: Iterable[Path], known: frozenset[int] = frozenset()) -> None:
    """Make sure that nobody uses *images*, which are going to be written to.

    Raises:
        ImageInUse: somebody does.
    """
    wanted = tuple(Wanted(image, LockMode.WRITER) for image in images)
    for found in look_for_others([wanted], known):
        for refusal in found.refusals:
            raise refusal


def last_changes(images: Images) -> Mapping[str, str]:
    """What is another text for each file once somebody has written to it; nothing of devices."""
    found = {}
    for one in images:
        with contextlib.suppress(OSError, ValueError):
            status = one.path.stat()
            if stat.S_ISREG(status.st_mode):
                change = f"{status.st_size} {status.st_mtime_ns}"
                found[str(one.path)] = change
    return found


def require_unchanged(images: Images, seen: Mapping[str, str]) -> None:
    """Make sure that nobody has written to *images* since :func:`last_changes` gave *seen*.

    Who has come and gone in the meantime is not to be seen any more, but what was decided rests
    on what was there before.

    Raises:
        ImageInUse: somebody has.
    """
    now = last_changes([one for one in images if str(one.path) in seen])
    for path, change in seen.items():
        if now.get(path) != change:
            raise ImageInUse(path, "somebody who wrote to it while it was being examined")


def _judged(images: Images, found: dict[str, list[Bystander]]) -> OtherUsers:
    refusals, warnings = [], []
    for image in dict.fromkeys(str(one.path) for one in images):
        excluding = [one.name for one in found[image] if one.excludes]
        reading = [one.name for one in found[image] if not one.excludes]
        if excluding:
            refusals.append(ImageInUse(image, _listed(excluding)))
        elif reading:
            warnings.append(
                f"{image} is being read by {_listed(reading)}, without a lock: what it reads "
                "during the merge may be neither the old content nor the new one"
            )
    return OtherUsers(tuple(refusals), tuple(warnings))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))
