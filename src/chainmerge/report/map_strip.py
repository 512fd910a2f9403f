# SPDX-License-Identifier: Apache-2.0
"""The guest's disk as a strip of characters: who is uppermost where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chainmerge.documents.plan import Role
from chainmerge.report import layout
from chainmerge.report.layout import Words, joined, words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chainmerge.documents.disk_map import DiskMap
    from chainmerge.documents.plan import MergePlan

STRIP_COLUMNS: Final = 48
"""Characters of a strip, which leave room for a label on a line of 60."""
_NOTHING: Final = "·"
_OF_ROLES: Final[Mapping[Role, tuple[str, str]]] = {
    Role.ABOVE: ("▓", "above"),
    Role.TOP: ("█", "merged"),
    Role.MIDDLE: ("█", "merged"),
    Role.BASE: ("▒", "base"),
    Role.BELOW: ("░", "below"),
}
_LEAF: Final = ("█", "this image")
_BETWEEN: Final = ("▒", "between")
_ROOT: Final = ("░", "root")


def strip_of_plan(drawn: DiskMap, plan: MergePlan) -> Iterator[tuple[Words, Words]]:
    """Rows for a table of labels: the disk before a merge, and what the characters mean."""
    roles = {image.path: image.role for image in plan.images}
    marks = [_OF_ROLES[roles.get(path, Role.BELOW)] for path in drawn.images]
    return _rows(drawn, marks)


def strip_of_chain(drawn: DiskMap) -> Iterator[tuple[Words, Words]]:
    """Rows for a table of labels: the disk, and what the characters mean."""
    between = [_BETWEEN] * (len(drawn.images) - 2)
    marks = [_LEAF] if len(drawn.images) == 1 else [_ROOT, *between, _LEAF]
    return _rows(drawn, marks)


def _rows(drawn: DiskMap, marks: Sequence[tuple[str, str]]) -> Iterator[tuple[Words, Words]]:
    """Rows for a strip in which each layer has a character, which has a meaning."""
    if not drawn.columns:
        return
    strip = "".join(
        _NOTHING if column.layer is None else marks[column.layer][0] for column in drawn.columns
    )
    # From the leaf down, each meaning once.
    said = [f"{mark} {meaning}" for mark, meaning in dict.fromkeys(reversed(marks))]
    if _NOTHING in strip:
        said.append(f"{_NOTHING} zeros")
    yield words("Map"), words(strip)
    yield words(""), joined(words("  ".join(said), layout.QUIET))
