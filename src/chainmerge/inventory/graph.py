# SPDX-License-Identifier: Apache-2.0
"""How the images that were found stand on each other: chains, branches, lost ends and loops. Pure.

An image is known by its identity, whatever its names are.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from chainmerge.chain.model import Identity
    from chainmerge.inventory.found import FoundImage


class ImageGraph:
    """The images of a scan, and what each stands on.

    Attributes:
        images: By their identities, in the order in which they were found.
    """

    def __init__(self, images: Iterable[FoundImage]) -> None:
        """Of an image that was found twice, the first name counts."""
        self.images: dict[Identity, FoundImage] = {}
        for image in images:
            self.images.setdefault(image.identity, image)

    @cached_property
    def users(self) -> Mapping[Identity, int]:
        """By image: how many of the others have it as their backing file, or may have."""
        return {identity: len(users) for identity, users in self._users.items()}

    @cached_property
    def _users(self) -> Mapping[Identity, Sequence[FoundImage]]:
        users: dict[Identity, list[FoundImage]] = defaultdict(list)
        for image in self.images.values():
            for identity in dict.fromkeys(image.link.identities if image.link else ()):
                users[identity].append(image)
        return users

    def children_of(self, image: FoundImage) -> Sequence[FoundImage]:
        """The images that stand on one."""
        return self._users.get(image.identity, ())

    def base_of(self, image: FoundImage) -> FoundImage | None:
        """The image that one stands on; None for a root, and where the way down is not known."""
        return self._bases.get(image.identity)

    @cached_property
    def _bases(self) -> Mapping[Identity, FoundImage]:
        bases: dict[Identity, FoundImage] = {}
        for image in self.images.values():
            if image.link is None or image.link.problem is not None:
                continue
            known = (one for one in image.link.identities if one in self.images)
            for identity in islice(known, 1):
                bases[image.identity] = self.images[identity]
        return bases

    @cached_property
    def leaves(self) -> tuple[FoundImage, ...]:
        """The images that were looked for and have none above."""
        return tuple(
            image
            for image in self.images.values()
            if image.named and image.identity not in self._users
        )

    @cached_property
    def depths(self) -> Mapping[Identity, int | None]:
        """By image: how many images there are from its root up to itself; None without a root."""
        depths: dict[Identity, int | None] = {}
        for start in self.images.values():
            line: list[FoundImage] = []
            on_line: set[Identity] = set()
            at: FoundImage | None = start
            while at is not None and at.identity not in depths and at.identity not in on_line:
                line.append(at)
                on_line.add(at.identity)
                at = self.base_of(at)
            if at is None:
                below: int | None = 0 if not line or is_root(line[-1]) else None
            else:
                below = depths.get(at.identity)
            for image in reversed(line):
                below = None if below is None else below + 1
                depths[image.identity] = below
        return depths

    def down_from(self, image: FoundImage) -> Iterator[FoundImage]:
        """An image and those below it, as far as the way is known; each once, even in a loop."""
        seen: set[Identity] = set()
        at: FoundImage | None = image
        while at is not None and at.identity not in seen:
            seen.add(at.identity)
            yield at
            at = self.base_of(at)

    @cached_property
    def loops(self) -> tuple[tuple[FoundImage, ...], ...]:
        """Images each of which stands on the next, and the last one on the first."""
        done: set[Identity] = set()
        loops = []
        for start in self.images.values():
            line: dict[Identity, FoundImage] = {}
            at: FoundImage | None = start
            while at is not None and at.identity not in done and at.identity not in line:
                line[at.identity] = at
                at = self.base_of(at)
            if at is not None and at.identity in line:
                members = list(line.values())
                loops.append(tuple(members[list(line).index(at.identity) :]))
            done.update(line)
        return tuple(loops)


def is_root(image: FoundImage) -> bool:
    """Whether an image can be read, and needs nothing below it."""
    return image.content.problem is None and not image.is_overlay
