# SPDX-License-Identifier: Apache-2.0
"""Other users of the images: those that are known, and those that could be there."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from msgspec.structs import replace

from chainmerge.options import Direction
from tests.planning.situations.rows import (
    CHILD,
    CHILD_OF_MIDDLE,
    DELETE,
    ELSEWHERE,
    KEEP_NAME,
    MERGE,
    RANGE,
    SHARED,
    UNREADABLE,
    Row,
    sibling,
)
from tests.support.merge_facts import (
    DEVICE,
    DISK,
    VM,
    with_base,
    with_image,
    with_relatives,
    with_searched,
    with_top,
)

UNKNOWN: Final = with_relatives(
    MERGE, unreadable=((UNREADABLE, "Permission denied"),), unknown=frozenset({UNREADABLE})
)
OTHERS_UNKNOWN: Final = [
    Row("a file beside cannot be looked at", UNKNOWN, ("relative-unknown",)),
    Row(
        "so it is for each of them",
        with_relatives(
            MERGE,
            unreadable=((UNREADABLE, "Permission denied"), (VM / "b", "I/O error")),
            unknown=frozenset({UNREADABLE, VM / "b"}),
        ),
        ("relative-unknown", "relative-unknown"),
    ),
    Row(
        "it is damaged: QEMU does not open it either",
        with_relatives(MERGE, unreadable=((UNREADABLE, "its header is damaged"),)),
        spares="relative-unknown",
    ),
    Row(
        "a pull leaves what it could stand on",
        replace(UNKNOWN, direction=Direction.PULL),
        spares="relative-unknown",
    ),
    Row(
        "unless it deletes it",
        replace(UNKNOWN, direction=Direction.PULL),
        ("relative-unknown",),
        options=DELETE,
    ),
]
SMALL: Final = DISK // 2
SHORT_TOP: Final = with_top(MERGE, guest_size=SMALL)

OTHERS_AT_RISK: Final = [
    Row("base has another child", sibling(), ("base-has-other-children",)),
    Row(
        "all is merged: the other child was re-pointed to base, or a child of it",
        replace(sibling(), merged=True),
        spares="base-has-other-children",
    ),
    Row(
        "base shows what top shows, and has the same bitmaps",
        replace(sibling(), content_merged=True),
        spares="base-has-other-children",
    ),
    Row(
        "a pull leaves base as it is",
        replace(sibling(), direction=Direction.PULL),
        spares="base-has-other-children",
    ),
    Row("an image between has another child", CHILD_OF_MIDDLE, ("middle-has-other-children",)),
    Row(
        "it has, though all is merged",
        replace(CHILD_OF_MIDDLE, merged=True),
        ("middle-has-other-children",),
    ),
    Row(
        "a pull leaves it as it is",
        replace(CHILD_OF_MIDDLE, direction=Direction.PULL),
        spares="middle-has-other-children",
    ),
    Row(
        "a child is larger than top, and base has something there",
        with_relatives(SHORT_TOP, children=(CHILD,)),
        ("child-sees-more",),
    ),
    Row(
        "so it is for each such child",
        with_relatives(
            SHORT_TOP, children=(CHILD, replace(CHILD, guest_size=SMALL), replace(CHILD))
        ),
        ("child-sees-more", "child-sees-more"),
    ),
    Row(
        "the child is as large as top",
        with_relatives(SHORT_TOP, children=(replace(CHILD, guest_size=SMALL),)),
        spares="child-sees-more",
    ),
    Row(
        "base is no larger than top",
        with_relatives(MERGE, children=(replace(CHILD, guest_size=2 * DISK),)),
        spares="child-sees-more",
    ),
    Row(
        "by a pull it reads zeros there as before",
        with_relatives(replace(SHORT_TOP, direction=Direction.PULL), children=(CHILD,)),
        spares="child-sees-more",
    ),
]
INACTIVE: Final = with_relatives(MERGE, inactive=(Path("/dev/vg/other"),))
OTHERS_UNSEEN: Final = [
    Row("base is in another directory than top", SHARED, ("users-unknown",)),
    Row(
        "nobody else uses it, says the caller",
        with_searched(SHARED, sole_user=True),
        spares="users-unknown",
    ),
    Row(
        "the caller has said where others can be",
        with_searched(SHARED, named=("/machines",)),
        spares="users-unknown",
    ),
    Row(
        "base is a device, whose group is looked at",
        with_base(SHARED, **DEVICE),
        spares="users-unknown",
    ),
    Row("base is not changed any more", replace(SHARED, merged=True), spares="users-unknown"),
    Row(
        "base is not changed any more, but renamed",
        replace(with_base(SHARED), merged=True),
        ("users-unknown",),
        options=KEEP_NAME,
    ),
    Row("a pull leaves it", replace(SHARED, direction=Direction.PULL), spares="users-unknown"),
    Row(
        "a pull that deletes it does not",
        replace(SHARED, direction=Direction.PULL),
        ("users-unknown",),
        options=DELETE,
    ),
    Row(
        "an image between is elsewhere",
        with_image(RANGE, 1, path=ELSEWHERE / "mid1", real_path=ELSEWHERE / "mid1"),
        ("users-unknown",),
    ),
    Row("a volume beside is not active", INACTIVE, ("volumes-inactive",)),
    Row(
        "it is not, though base does not change any more",
        replace(INACTIVE, merged=True),
        ("volumes-inactive",),
    ),
    Row(
        "where others were looked for does not help",
        with_searched(INACTIVE, named=("/machines",)),
        ("volumes-inactive",),
    ),
    Row(
        "nobody else uses the images, says the caller",
        with_searched(INACTIVE, sole_user=True),
        spares="volumes-inactive",
    ),
    Row(
        "the caller has named the image that the guest writes to",
        with_searched(INACTIVE, active=str(MERGE.top.path)),
        spares="volumes-inactive",
    ),
    Row(
        "a pull changes nothing but top",
        replace(INACTIVE, direction=Direction.PULL),
        spares="volumes-inactive",
    ),
]
