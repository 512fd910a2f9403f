# SPDX-License-Identifier: Apache-2.0
"""One row a situation: facts, what was asked for, and all that speaks against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from msgspec import Struct, field
from msgspec.structs import replace

from chainmerge.options import MergeOptions
from chainmerge.planning.facts import MergeFacts
from tests.support.merge_facts import (
    VM,
    decided,
    merge_of,
    pull_of,
    qcow2,
    snapshots_in,
    with_base,
    with_relatives,
)

PLAIN: Final = MergeOptions()
DELETE: Final = MergeOptions(delete=True)
KEEP_NAME: Final = MergeOptions(keep_name=True)
DELETE_AND_KEEP_NAME: Final = MergeOptions(delete=True, keep_name=True)

ELSEWHERE: Final = Path("/templates")
MERGE: Final = merge_of()
RANGE: Final = merge_of(overlays=3)
PULL: Final = pull_of()


class Row(Struct, frozen=True):
    """A situation and the codes of all that speaks against it, in order.

    ``spares`` names the code of the rows above it that this one has only just not.
    """

    situation: str
    facts: MergeFacts
    codes: tuple[str, ...] = ()
    options: MergeOptions = field(default=PLAIN)
    spares: str = ""


def sibling(**differences: Any) -> MergeFacts:
    image = qcow2(VM / "sibling.qcow2", MERGE.base.path, **differences)
    return with_relatives(MERGE, siblings=(image,))


SIBLING: Final = qcow2(VM / "sibling.qcow2", MERGE.base.path)
CHILD: Final = qcow2(VM / "child.qcow2", MERGE.top.path)
UNREADABLE: Final = VM / "unreadable.qcow2"

CHILD_OF_MIDDLE: Final = with_relatives(
    RANGE, middle_children=(qcow2(VM / "branch.qcow2", RANGE.chain.images[1].path),)
)
TAKEN_OVER: Final = decided("absent", "valid")


def with_snapshots(
    facts: MergeFacts, changed: frozenset[int] = frozenset(), index: int = -1, **more: Any
) -> MergeFacts:
    """Two snapshots in one of the images, top if nothing else is said."""
    views = snapshots_in(facts.chain.images[index], "one", "two", changed=changed, **more)
    return replace(facts, snapshots=(views,))


FIRST: Final = frozenset({0})

AWAY: Final = {"path": ELSEWHERE / "base.qcow2", "real_path": ELSEWHERE / "base.qcow2"}
IMMUTABLE: Final = "the file is immutable"
NO_WRITES: Final = "Read-only file system"

SHARED: Final = with_base(MERGE, **AWAY)
