# SPDX-License-Identifier: Apache-2.0
"""Where the images of a live merge stand in the VM now. Images are known by what they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.live.inspection import path_of
from chainmerge.live.port import BlockNode
from chainmerge.records.identity import identify

if TYPE_CHECKING:
    from chainmerge.live.port import BlockGraph
    from chainmerge.records.live_journal import LiveJournal


@dataclass(frozen=True, slots=True)
class Place:
    """The nodes of a live merge.

    Attributes:
        active: What the guest writes to.
        base: Base's node.
        merged_nodes: The merged images that are in the chain still, lowest first.
        left_over: The merged images that are open and not in the chain any more, upper first.
        above: The node directly on the uppermost of base and the merged ones; None where that
            is the active one.
    """

    active: BlockNode
    base: BlockNode
    merged_nodes: tuple[BlockNode, ...]
    left_over: tuple[BlockNode, ...]
    above: BlockNode | None

    @property
    def merged(self) -> bool:
        """Whether the chain lacks the merged images."""
        return not self.merged_nodes


def place_of(graph: BlockGraph, journal: LiveJournal) -> Place | None:
    """Find the images of a journal in the VM; None where base is not in the disk's chain."""
    chain = graph.chain()
    keys = [_key_of(node, graph) for node in chain]
    if journal.base.key not in keys:
        return None
    at = keys.index(journal.base.key)
    wanted = [one.key for one in journal.overlays]
    in_chain = dict(zip(keys[:at], chain[:at], strict=True))
    merged = tuple(in_chain[key] for key in wanted if key in in_chain)
    chained = {node.name for node in chain}
    others = {
        _key_of(node, graph): node
        for node in graph.nodes.values()
        if node.file is not None and node.name not in chained
    }
    over = [node for key, node in zip(keys[:at], chain[:at], strict=True) if key not in wanted]
    return Place(
        active=chain[0],
        base=chain[at],
        merged_nodes=merged,
        left_over=tuple(others[key] for key in reversed(wanted) if key in others),
        above=over[-1] if over else None,
    )


def _key_of(node: BlockNode, graph: BlockGraph) -> tuple[str, int, str] | None:
    path = path_of(node, graph)
    if path is None:
        return None
    try:
        return identify(Path(path)).key
    except OSError:
        return None
