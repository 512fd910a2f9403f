# SPDX-License-Identifier: Apache-2.0
"""Where the images of a live merge stand in the VM now. Images are known by what they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.live.nodes import BlockNode
from chainmerge.records.identity import identify, may_be_same, same_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.live.nodes import BlockGraph
    from chainmerge.records.identity import ImageIdentity
    from chainmerge.records.live_journal import LiveJournal


class MergeNodes(Struct, frozen=True):
    """The nodes of a live merge.

    Attributes:
        active: What the guest writes to.
        root: The name of the uppermost node over that: a filter, or the active image itself.
        result: The node that is written: base's, or top's in a pull.
        merged: The merged images that are in the chain still, lowest first.
        still_open: The merged images that are open and not in the chain any more, upper first.
        above: The node directly on the uppermost of the result and the merged ones; None where
            that is the active one.
        below: The node directly below the lowest of them; None where that is the root.
    """

    active: BlockNode
    root: str
    result: BlockNode
    merged: tuple[BlockNode, ...]
    still_open: tuple[BlockNode, ...]
    above: BlockNode | None
    below: BlockNode | None

    @property
    def is_merged(self) -> bool:
        """Whether the chain lacks the merged images."""
        return not self.merged


def find_merge_nodes(graph: BlockGraph, journal: LiveJournal) -> MergeNodes | None:
    """Find the images of a journal in the VM; None where the result is not in the disk's chain."""
    chain = graph.chain()
    images = list(zip((_identity_of(node, graph) for node in chain), chain, strict=True))
    at = next((index for index, (one, _) in enumerate(images) if _is_of(one, journal.result)), None)
    if at is None:
        return None
    over, under = images[:at], images[at + 1 :]
    merged = [_node_of(one, under if journal.pulls else over) for one in journal.merged]
    above = [node for image, node in over if not _is_of_any(image, journal.merged)]
    below = [node for image, node in under if not _is_of_any(image, journal.merged)]
    chained = {node.name for node in chain}
    others = [
        (_identity_of(node, graph), node)
        for node in graph.nodes.values()
        if node.file is not None and not node.is_filter and node.name not in chained
    ]
    still_open = [_node_of(one, others) for one in reversed(journal.merged)]
    return MergeNodes(
        active=chain[0],
        root=graph.uppermost_over(chain[0]).name,
        result=chain[at],
        merged=tuple(node for node in merged if node is not None),
        still_open=tuple(node for node in still_open if node is not None),
        above=above[-1] if above else None,
        below=below[0] if below else None,
    )


def is_node_of(node: BlockNode, graph: BlockGraph, image: ImageIdentity) -> bool:
    """Whether a node of *graph* is that of an image."""
    return _is_of(_identity_of(node, graph), image)


def _identity_of(node: BlockNode, graph: BlockGraph) -> ImageIdentity | None:
    path = graph.path_of(node)
    if path is None:
        return None
    try:
        return identify(Path(path))
    except OSError:
        return None


def _is_of(image: ImageIdentity | None, wanted: ImageIdentity) -> bool:
    if image is None or not may_be_same(image, wanted):
        return False
    # The VM has it open: where nothing tells more, the number of the file has to do.
    return image.kind == "file" or same_image(image, wanted) or image.path == wanted.path


def _is_of_any(image: ImageIdentity | None, wanted: Sequence[ImageIdentity]) -> bool:
    return any(_is_of(image, one) for one in wanted)


def _node_of(
    wanted: ImageIdentity, nodes: Sequence[tuple[ImageIdentity | None, BlockNode]]
) -> BlockNode | None:
    return next((node for image, node in reversed(nodes) if _is_of(image, wanted)), None)
