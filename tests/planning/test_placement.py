# SPDX-License-Identifier: Apache-2.0
"""Where data goes in base, and how large base becomes. How much it needs is given here."""

from __future__ import annotations

from typing import Final

import pytest
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.documents.plan import Movement
from chainmerge.options import LEFT_TO_A_GUEST, Direction, MergeOptions, Placement
from chainmerge.planning.facts import MergeFacts
from chainmerge.planning.placement import (
    allocated_bytes,
    bytes_to_copy,
    choose_placement,
    left_free,
    planned_space,
    prunes_first,
    required_bytes,
)
from chainmerge.storage.volume_facts import VolumeFacts
from tests.support.merge_facts import (
    FILE,
    FILE_SIZE,
    FIXED_DEVICE,
    GIB,
    LVM,
    MIB,
    NEEDED,
    NEEDED_IN_PLACE,
    RAW,
    VM,
    merge_of,
    qcow2,
    space,
    with_base,
    with_decisions,
    with_relatives,
)

COW, IN_PLACE = Placement.COW, Placement.IN_PLACE
PLAIN: Final = MergeOptions()
AS_COW: Final = MergeOptions(data="cow")
AS_IN_PLACE: Final = MergeOptions(data="in-place")
MERGE: Final = merge_of()
GROWTH: Final = NEEDED - FILE_SIZE
PRUNED: Final = NEEDED - 8 * MIB
"""What new clusters need once stale bitmaps are out."""
ONE_WAY: Final = replace(MERGE, spaces={IN_PLACE: space(NEEDED_IN_PLACE)})
WITH_STALE: Final = replace(
    MERGE,
    spaces={
        COW: space(NEEDED, required_if_pruned=PRUNED, allocates_if_pruned=PRUNED - FILE_SIZE),
        IN_PLACE: space(NEEDED_IN_PLACE),
    },
)


def free(count: int) -> VolumeFacts:
    """A file on a file system that has so many bytes left."""
    return replace(FILE, free_bytes=count)


def sized(size: int) -> VolumeFacts:
    """A logical volume that has so many bytes, and could have more."""
    return replace(LVM, size=size)


class Row(Struct, frozen=True):
    """Where data goes, whether stale bitmaps have to go first, what is required then."""

    situation: str
    facts: MergeFacts
    options: MergeOptions
    placement: Placement
    required: int
    allocates: int | None
    prune_first: bool = False


PLACES: Final = [
    Row("a file with room", MERGE, PLAIN, COW, NEEDED, GROWTH),
    Row("just enough room", replace(MERGE, volume=free(GROWTH)), PLAIN, COW, NEEDED, GROWTH),
    Row(
        "a byte too little",
        replace(MERGE, volume=free(GROWTH - 1)),
        PLAIN,
        IN_PLACE,
        NEEDED_IN_PLACE,
        NEEDED_IN_PLACE - FILE_SIZE,
    ),
    Row(
        "a limit that is a byte too low",
        replace(MERGE, volume=replace(FILE, capacity_limit=NEEDED - 1)),
        PLAIN,
        IN_PLACE,
        NEEDED_IN_PLACE,
        NEEDED_IN_PLACE - FILE_SIZE,
    ),
    Row(
        "a volume that is large enough",
        replace(MERGE, volume=sized(NEEDED)),
        PLAIN,
        COW,
        NEEDED,
        GROWTH,
    ),
    Row(
        "a volume that would have to be extended for it is not",
        replace(MERGE, volume=sized(NEEDED - 1)),
        PLAIN,
        IN_PLACE,
        NEEDED_IN_PLACE,
        NEEDED_IN_PLACE - FILE_SIZE,
    ),
    Row(
        "unless new clusters are asked for",
        replace(MERGE, volume=sized(NEEDED - 1)),
        AS_COW,
        COW,
        NEEDED,
        GROWTH,
    ),
    Row(
        "in place, as asked for",
        MERGE,
        AS_IN_PLACE,
        IN_PLACE,
        NEEDED_IN_PLACE,
        NEEDED_IN_PLACE - FILE_SIZE,
    ),
    Row(
        "an engine that knows one way",
        ONE_WAY,
        PLAIN,
        IN_PLACE,
        NEEDED_IN_PLACE,
        NEEDED_IN_PLACE - FILE_SIZE,
    ),
    Row(
        "what it does not know cannot be asked for",
        ONE_WAY,
        AS_COW,
        IN_PLACE,
        NEEDED_IN_PLACE,
        NEEDED_IN_PLACE - FILE_SIZE,
    ),
    Row("stale bitmaps, and room for both", WITH_STALE, PLAIN, COW, NEEDED, GROWTH),
    Row(
        "stale bitmaps make the room",
        replace(WITH_STALE, volume=free(GROWTH - 1)),
        PLAIN,
        COW,
        PRUNED,
        PRUNED - FILE_SIZE,
        prune_first=True,
    ),
    Row(
        "they make just enough",
        replace(WITH_STALE, volume=free(PRUNED - FILE_SIZE)),
        PLAIN,
        COW,
        PRUNED,
        PRUNED - FILE_SIZE,
        prune_first=True,
    ),
    Row(
        "they make too little",
        replace(WITH_STALE, volume=free(PRUNED - FILE_SIZE - 1)),
        PLAIN,
        IN_PLACE,
        NEEDED_IN_PLACE,
        NEEDED_IN_PLACE - FILE_SIZE,
    ),
    Row(
        "they make the room on a volume",
        replace(WITH_STALE, volume=sized(PRUNED)),
        PLAIN,
        COW,
        PRUNED,
        PRUNED - FILE_SIZE,
        prune_first=True,
    ),
    Row(
        "taking them out first takes no less",
        replace(
            MERGE,
            volume=free(0),
            spaces={COW: space(NEEDED, required_if_pruned=NEEDED, allocates_if_pruned=0)},
        ),
        AS_COW,
        COW,
        NEEDED,
        GROWTH,
    ),
    Row("all is merged", replace(MERGE, merged=True), PLAIN, COW, required=FILE_SIZE, allocates=0),
    Row(
        "a file system that has to give what is behind the end",
        replace(MERGE, spaces={COW: space(NEEDED, allocates=None)}),
        PLAIN,
        COW,
        NEEDED,
        allocates=None,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.situation) for row in PLACES])
def test_where_data_goes(row: Row) -> None:
    assert row == replace(
        row,
        placement=choose_placement(row.facts, row.options),
        required=required_bytes(row.facts, row.options),
        allocates=allocated_bytes(row.facts, row.options),
        prune_first=prunes_first(row.facts, row.options),
    )
    plan = planned_space(row.facts, row.options)
    assert (plan.placement, plan.required, plan.prune_first) == (
        row.placement,
        row.required,
        row.prune_first,
    )


class Growth(Struct, frozen=True):
    """What the plan says of a volume; as for required bytes, see above."""

    situation: str
    volume: VolumeFacts
    required: int
    limit: int | None
    grow_to: int | None = None
    missing: int = 0
    kind: str = "file"


GROWTHS: Final = [
    Growth("a file", free(9 * MIB), FILE_SIZE + MIB, FILE_SIZE + 9 * MIB, FILE_SIZE + MIB),
    Growth("of whose room nothing is known", replace(FILE, free_bytes=None), NEEDED, None, NEEDED),
    Growth("as it is", free(9 * MIB), FILE_SIZE, FILE_SIZE + 9 * MIB),
    Growth(
        "a file system lacks some",
        free(9 * MIB),
        FILE_SIZE + 10 * MIB,
        FILE_SIZE + 9 * MIB,
        missing=MIB,
    ),
    Growth(
        "a limit",
        replace(free(9 * MIB), capacity_limit=FILE_SIZE + 2 * MIB),
        FILE_SIZE + MIB,
        FILE_SIZE + 2 * MIB,
        FILE_SIZE + MIB,
    ),
    Growth(
        "a limit that is too low",
        replace(free(9 * MIB), capacity_limit=FILE_SIZE + 2 * MIB),
        FILE_SIZE + 5 * MIB,
        FILE_SIZE + 2 * MIB,
        missing=3 * MIB,
    ),
    Growth("a volume", LVM, 5 * GIB + 1, 8 * GIB, 5 * GIB + 4 * MIB, kind="lvm"),
    Growth("it is large enough", LVM, 4 * GIB, 8 * GIB, kind="lvm"),
    Growth("its group lacks some", LVM, 8 * GIB + 3, 8 * GIB, missing=3, kind="lvm"),
    Growth("a device", FIXED_DEVICE, 4 * GIB, 4 * GIB, kind="block"),
    Growth("it is too small", FIXED_DEVICE, 4 * GIB + 7, 4 * GIB, missing=7, kind="block"),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.situation) for row in GROWTHS])
def test_what_becomes_of_the_volume(row: Growth) -> None:
    facts = replace(MERGE, volume=row.volume, spaces={IN_PLACE: space(row.required)})
    plan = planned_space(facts, PLAIN)
    assert plan.size == row.volume.size
    assert plan.image_end == FILE_SIZE
    assert plan.required_by_placement == {"in-place": row.required}
    assert plan.breakdown == {"guest data": row.required - FILE_SIZE}
    assert plan.shrink_to is None
    # A volume has what it has: nothing is asked of a file system.
    assert plan.allocates == (row.required - FILE_SIZE if row.kind == "file" else None)
    assert row == replace(
        row,
        required=plan.required,
        limit=plan.limit,
        grow_to=plan.grow_to,
        missing=plan.missing,
        kind=plan.kind,
    )


def test_each_way_is_named_with_what_it_takes_at_least() -> None:
    plan = planned_space(WITH_STALE, PLAIN)
    assert list(plan.required_by_placement.items()) == [
        ("cow", PRUNED),
        ("in-place", NEEDED_IN_PLACE),
    ]


SHRINK: Final = MergeOptions(shrink=True)
NO_SPARE: Final = MergeOptions(shrink=True, leave=4 * MIB)
ON_LVM: Final = replace(MERGE, volume=LVM)
CHILD: Final = qcow2(VM / "child.qcow2", MERGE.top.path)
WITH_CHILD: Final = with_relatives(ON_LVM, children=(CHILD,))
UNKNOWN_END: Final = {COW: space(NEEDED, end_after=None)}
EARLY_END: Final = {COW: space(NEEDED, end_after=FILE_SIZE + 1)}


@pytest.mark.parametrize(
    ("facts", "options", "shrink_to"),
    [
        pytest.param(ON_LVM, PLAIN, None, id="not asked for"),
        pytest.param(MERGE, SHRINK, None, id="a file"),
        pytest.param(replace(MERGE, volume=FIXED_DEVICE), SHRINK, None, id="a device"),
        pytest.param(
            with_decisions(with_base(ON_LVM, **RAW)), SHRINK, None, id="a raw image is its volume"
        ),
        pytest.param(ON_LVM, SHRINK, NEEDED + LEFT_TO_A_GUEST, id="a guest writes to it"),
        pytest.param(WITH_CHILD, SHRINK, NEEDED, id="images stand on it"),
        pytest.param(ON_LVM, NO_SPARE, NEEDED + 4 * MIB, id="as much as asked for"),
        pytest.param(
            replace(WITH_CHILD, spaces=EARLY_END),
            SHRINK,
            FILE_SIZE + 4 * MIB,
            id="whole units of its group",
        ),
        pytest.param(
            replace(WITH_CHILD, spaces=UNKNOWN_END),
            SHRINK,
            NEEDED,
            id="where the image will end is not known",
        ),
        pytest.param(
            replace(
                WITH_CHILD,
                volume=sized(NEEDED - 4 * MIB),
                spaces={
                    COW: space(
                        NEEDED,
                        end_after=FILE_SIZE,
                        required_if_pruned=PRUNED,
                        allocates_if_pruned=0,
                    )
                },
            ),
            SHRINK,
            PRUNED,
            id="nor is it where bitmaps are taken out first",
        ),
        pytest.param(
            replace(WITH_CHILD, merged=True), SHRINK, FILE_SIZE, id="all is merged: as it is"
        ),
        pytest.param(
            replace(ON_LVM, volume=sized(2 * GIB)),
            MergeOptions(shrink=True, leave=4 * GIB),
            2 * GIB,
            id="never larger than it is",
        ),
        pytest.param(
            replace(WITH_CHILD, volume=sized(FILE_SIZE), spaces={COW: space(NEEDED)}),
            MergeOptions(shrink=True, data="cow"),
            NEEDED,
            id="nor than it becomes",
        ),
    ],
)
def test_what_a_volume_is_reduced_to(
    facts: MergeFacts, options: MergeOptions, shrink_to: int | None
) -> None:
    assert planned_space(facts, options).shrink_to == shrink_to


@pytest.mark.parametrize(
    ("leave", "is_leaf", "left"),
    [(None, True, LEFT_TO_A_GUEST), (None, False, 0), (0, True, 0), (5, True, 5), (5, False, 5)],
)
def test_what_a_reduced_volume_keeps(leave: int | None, is_leaf: bool, left: int) -> None:
    assert left_free(replace(PLAIN, leave=leave), is_leaf=is_leaf) == left


def test_everything_that_is_defined_is_copied_by_qemu() -> None:
    facts = replace(MERGE, movement=Movement(data_bytes=4, zero_bytes=20, compressed_bytes=100))
    assert bytes_to_copy(facts) == 124


def test_a_pull_asks_the_same_of_top() -> None:
    facts = replace(MERGE, direction=Direction.PULL)
    assert planned_space(facts, PLAIN) == planned_space(MERGE, PLAIN)
