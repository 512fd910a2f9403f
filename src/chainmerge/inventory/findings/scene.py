# SPDX-License-Identifier: Apache-2.0
"""All that findings are made from, and the commands that they name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.documents.scan import DefinedDisk
from chainmerge.documents.status import UnfinishedMerge
from chainmerge.records.request import shell_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chainmerge.chain.model import Identity
    from chainmerge.inventory.found import FoundImage
    from chainmerge.inventory.graph import ImageGraph
    from chainmerge.inventory.summary import ChainFacts
    from chainmerge.options import ScanOptions

NANOSECONDS_OF_A_DAY: Final = 86_400 * 10**9
_NAMED: Final = 3


class FileSystemRoom(Struct, frozen=True):
    """A file system: its size, and what is free for images; in bytes."""

    size: int
    free: int


class Usage(Struct, frozen=True):
    """Who uses images now.

    Attributes:
        in_use: Images that a process has open.
        all_seen: Whether every process could be looked at.
        domains: The disks of all domains; None if nobody asked for them.
        of_domains: The images that these are.
        merges: Merges that were not finished.
    """

    in_use: frozenset[tuple[int, int]]
    all_seen: bool
    domains: tuple[DefinedDisk, ...] | None
    of_domains: frozenset[tuple[int, int]]
    merges: tuple[UnfinishedMerge, ...]


class Scene:
    """What was found, for all that judge it."""

    def __init__(
        self,
        graph: ImageGraph,
        chains: Mapping[Identity, ChainFacts],
        usage: Usage,
        rooms: Mapping[int, FileSystemRoom],
        options: ScanOptions,
        now_ns: int,
    ) -> None:
        """Take it together.

        Args:
            graph: the images.
            chains: what is in a chain, by the identity of its leaf.
            usage: who uses images.
            rooms: the file systems on which the images lie, by their device numbers.
            options: from when on something is said.
            now_ns: the time, in nanoseconds since 1970.
        """
        self.graph = graph
        self.chains = chains
        self.usage = usage
        self.rooms = rooms
        self.options = options
        self.now_ns = now_ns

    def is_idle(self, image: FoundImage) -> bool:
        """Whether no process is seen to have an image open."""
        return image.identity not in self.usage.in_use

    def plan_command(self, leaf: FoundImage) -> str:
        """What shows how to merge a chain into one image."""
        facts = self.chains.get(leaf.identity)
        if facts is None or facts.base is None:
            return self.command_for(leaf, "info")
        keep_name = () if leaf.stamp.is_device else ("--keep-name",)
        return self.command_for(leaf, "plan", "--delete", *keep_name, "--base", facts.base)

    def command_for(self, image: FoundImage, *words: str) -> str:
        """A command for an image, which may follow its chain to other directories."""
        return shell_line(["chainmerge", *words, *self._ways_out(image), image.path])

    def _ways_out(self, image: FoundImage) -> Sequence[str]:
        home = os.path.dirname(image.path)  # noqa: PTH120
        places = {os.path.dirname(one.path) for one in self.graph.down_from(image)}  # noqa: PTH120
        return [word for place in sorted(places - {home}) for word in ("--allow-backing", place)]


def first_names(names: Sequence[str]) -> str:
    """Names in a row; of many only the first few."""
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    more = len(names) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown
