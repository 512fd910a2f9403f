# SPDX-License-Identifier: Apache-2.0
"""What reports call images and their users; by name alone if one directory holds all images."""

from __future__ import annotations

import os.path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.documents.images import LEVELS
from chainmerge.report import layout
from chainmerge.report.layout import Words, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chainmerge.documents.disks import DiskLeftOut
    from chainmerge.documents.images import Searched
    from chainmerge.documents.plan import MergePlan

_LISTED: Final = 3
_PLACES_SHOWN: Final = 3


class ImageNames(Struct, frozen=True):
    """ImageNames of images.

    Attributes:
        directory: What is left out of them, with a slash at its end; empty for nothing.
    """

    directory: str

    def of(self, path: str) -> str:
        """What to call one."""
        return path.removeprefix(self.directory) or path

    def of_all(self, paths: Sequence[str]) -> str:
        """What to call several; of many only the first few."""
        return listed([self.of(path) for path in paths])

    def left_out_of(self, sentence: str) -> str:
        """The same sentence, in which images are called so."""
        return sentence.replace(self.directory, "") if self.directory else sentence

    @property
    def place(self) -> str:
        """Where they are, to follow what is said of them; empty if the names say so."""
        return f", in {self.directory.rstrip('/')}" if self.directory else ""


def names_in(paths: Iterable[str]) -> ImageNames:
    """Return the names of images, without the directory that holds all of them."""
    # They need not be paths, and those that are relative tell nothing.
    directories = {os.path.dirname(path) for path in paths} - {""}  # noqa: PTH120
    if len(directories) == 1:
        (directory,) = directories
        if directory.strip("/") and directory.startswith("/"):
            return ImageNames(f"{directory}/")
    return ImageNames("")


def names_of_plan(plan: MergePlan) -> ImageNames:
    """What to call the images of a plan."""
    return names_in([*(image.path for image in plan.images), plan.base, plan.top])


def listed(names: Sequence[str]) -> str:
    """Return names in a row; of many only the first few."""
    if len(names) > _LISTED + 1:
        return f"{', '.join(names[:_LISTED])} and {len(names) - _LISTED} more"
    return ", ".join(names)


def spanned(names: Sequence[str]) -> str:
    """Return names of images that follow each other; of many only both ends."""
    if len(names) > _LISTED:
        return f"{names[0]} to {names[-1]}"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def users_line(plan: MergePlan, names: ImageNames) -> Words:
    """Who else uses the images, and where such users were looked for."""
    return words(
        f"Other users: {users_found(plan, names)}; {places_searched(plan.searched, names)}"
    )


def users_found(plan: MergePlan, names: ImageNames) -> str:
    """The images outside the chain that stand on one of it."""
    chain = {image.path for image in plan.images}
    return names.of_all([one for one in plan.other_users if one not in chain]) or "none found"


def places_searched(searched: Searched, names: ImageNames) -> str:
    """How far a search for users of images went."""
    if searched.sole_user:
        return "no others, as --sole-user says"
    places = tuple(_places(searched, names.directory.rstrip("/")))
    text = f"searched {', '.join(places[:_PLACES_SHOWN])}"
    if len(places) > _PLACES_SHOWN:
        text += f" and {counted(len(places) - _PLACES_SHOWN, 'more place')}"
    if searched.left_out:
        text += f", but not {counted(len(searched.left_out), 'place')}: see -v"
    return text


def _places(searched: Searched, home: str) -> Iterator[str]:
    """Where other users were looked for; *home* is the directory of the images."""

    def called(place: str) -> str:
        return "their directory" if place == home else place

    # What is looked through with what is below it is not said twice.
    deeper = {*searched.named, *searched.around}
    yield from (f"all below {called(place)}" for place in searched.named)
    yield from (called(place) for place in searched.directories if place not in deeper)
    yield from (f"{LEVELS} levels below {called(place)}" for place in searched.around)


def disks_left_out(left_out: Sequence[DiskLeftOut]) -> Iterator[Words]:
    """The disks of a VM that have nothing to merge, with the reasons."""
    for disk in left_out:
        yield words(f"Left out: {disk.disk}: {disk.reason}", layout.QUIET)
