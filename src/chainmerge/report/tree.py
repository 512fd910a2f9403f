# SPDX-License-Identifier: Apache-2.0
"""Images on top of each other, drawn as a tree.

A chain can be hundreds of images long, so only a fork indents: the last image that
stands on another goes on in its column, and others branch off to the right::

    ◉ base
    ├─● clone
    ● snapshot
    ● active
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Sequence


class TreeLine(Struct, frozen=True):
    """An image in the drawing.

    Attributes:
        prefix: What stands to the left of the image's name.
        below: What stands to the left of anything that is said of it under its name.
        index: The image's place in what was drawn.
    """

    prefix: str
    below: str
    index: int


def draw_tree(nodes: Sequence[tuple[str, str | None]]) -> tuple[TreeLine, ...]:
    """Draw images given as (name, name of the parent) in the order of their parents first.

    Every image is drawn exactly once; one whose parent is not among the images is a root.
    """
    index_of = {name: index for index, (name, _) in enumerate(nodes)}
    children: dict[int | None, list[int]] = {}
    for index, (_, parent) in enumerate(nodes):
        above = index_of.get(parent) if parent is not None else None
        # Only an earlier image can be a parent, so nothing here goes in circles.
        owner = above if above is not None and above < index else None
        children.setdefault(owner, []).append(index)

    lines: list[TreeLine] = []
    # Drawn last in, first out: pairs of the image and what is drawn left of it.
    roots = children.get(None, [])
    waiting = [(index, "", "") for index in reversed(roots)]
    while waiting:
        index, indent, branch = waiting.pop()
        mark = "◉" if index in roots else "●"
        # What stands on a branch continues below the branch's own mark.
        column = f"{indent}│ " if branch else indent
        lines.append(TreeLine(f"{indent}{branch}{mark} ", f"{column}  ", index))
        *forks, straight = children.get(index, [-1])
        if straight >= 0:
            waiting.append((straight, column, ""))
        waiting.extend((fork, column, "├─") for fork in reversed(forks))
    return tuple(lines)
