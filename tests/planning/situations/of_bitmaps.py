# SPDX-License-Identifier: Apache-2.0
"""What images hold beside data: bitmaps and internal snapshots."""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from chainmerge.options import MergeOptions
from tests.planning.situations.rows import (
    CHILD,
    DELETE,
    DELETE_AND_KEEP_NAME,
    FIRST,
    KEEP_NAME,
    MERGE,
    PULL,
    RANGE,
    SIBLING,
    TAKEN_OVER,
    Row,
    sibling,
    with_snapshots,
)
from tests.support.merge_facts import (
    CHECKPOINT,
    RAW,
    bitmap_entry,
    decided,
    header,
    with_base,
    with_decisions,
    with_relatives,
)

DROP_SNAPSHOTS: Final = MergeOptions(drop_snapshots=True)
WITH_CP1: Final[dict[str, Any]] = {"bitmaps": (bitmap_entry(CHECKPOINT),)}

CONTENT_IS_THERE: Final = replace(sibling(**WITH_CP1), content_merged=True)
LOST: Final = decided("valid", "absent")
CHECKPOINTS: Final = [
    Row(
        "base loses a bitmap that its other child has, too",
        with_decisions(CONTENT_IS_THERE, LOST),
        ("checkpoint-of-others",),
    ),
    Row(
        "base gets one of a name that its other child has",
        with_decisions(CONTENT_IS_THERE, TAKEN_OVER),
        ("checkpoint-of-others",),
    ),
    Row(
        "it gets one of a name that what stands on its other child has",
        with_decisions(
            with_relatives(
                replace(MERGE, content_merged=True),
                siblings=(SIBLING,),
                beside=(SIBLING, replace(CHILD, **WITH_CP1)),
            ),
            TAKEN_OVER,
        ),
        ("checkpoint-of-others",),
    ),
    Row(
        "base gets a tombstone of such a name, until top is gone",
        with_decisions(
            replace(
                with_relatives(RANGE, siblings=(replace(SIBLING, **WITH_CP1),)),
                content_merged=True,
            ),
            decided("absent", "disabled", "valid", "valid"),
        ),
        ("checkpoint-of-others",),
    ),
    Row(
        "base keeps it",
        with_decisions(CONTENT_IS_THERE, decided("valid", "valid")),
        spares="checkpoint-of-others",
    ),
    Row(
        "base loses one that is of use to nobody",
        with_decisions(CONTENT_IS_THERE, decided("in-use", "absent")),
        spares="checkpoint-of-others",
    ),
    Row(
        "the other child has one of another name",
        with_decisions(
            replace(sibling(bitmaps=(bitmap_entry("other"),)), content_merged=True), LOST
        ),
        spares="checkpoint-of-others",
    ),
    Row(
        "top has a name that base does not get",
        with_decisions(CONTENT_IS_THERE, decided("absent", "in-use")),
        spares="checkpoint-of-others",
    ),
]

RAW_BASE: Final = with_base(MERGE, **RAW)
BITMAPS: Final = [
    Row(
        "a valid checkpoint and a raw base",
        with_decisions(RAW_BASE, decided("absent", "valid", base_holds=False)),
        ("base-cannot-hold-bitmaps",),
    ),
    Row(
        "a valid checkpoint and a base of version 2",
        with_decisions(
            with_base(MERGE, header=header(version=2)),
            decided("absent", "valid", base_holds=False),
        ),
        ("base-cannot-hold-bitmaps",),
    ),
    Row(
        "it may be lost",
        with_decisions(RAW_BASE, decided("absent", "valid", base_holds=False)),
        options=MergeOptions(drop_bitmaps=True),
        spares="base-cannot-hold-bitmaps",
    ),
    Row(
        "there is none that is valid",
        with_decisions(RAW_BASE, decided("absent", "in-use", base_holds=False)),
        spares="base-cannot-hold-bitmaps",
    ),
    Row(
        "a child would pass for one that has all of it",
        with_decisions(RAW_BASE, decided("absent", "valid", base_holds=False, above=True)),
        ("base-cannot-hold-bitmaps", "bitmaps-unguarded"),
    ),
    Row(
        "that bitmaps may be lost does not make false ones good",
        with_decisions(RAW_BASE, decided("absent", "valid", base_holds=False, above=True)),
        ("bitmaps-unguarded",),
        options=MergeOptions(drop_bitmaps=True),
    ),
    Row(
        "no image above has the name",
        with_decisions(RAW_BASE, decided("absent", "in-use", base_holds=False)),
        spares="bitmaps-unguarded",
    ),
    Row(
        "base holds a tombstone for it",
        with_decisions(MERGE, decided("absent", "in-use", above=True)),
        spares="bitmaps-unguarded",
    ),
]
SNAPSHOTS: Final = [
    Row("one would show other data", with_snapshots(MERGE, FIRST), ("snapshots-would-change",)),
    Row("none would", with_snapshots(MERGE), spares="snapshots-would-change"),
    Row(
        "it may be deleted",
        with_snapshots(MERGE, FIRST),
        options=DROP_SNAPSHOTS,
        spares="snapshots-would-change",
    ),
    Row(
        "base has that data already",
        with_snapshots(replace(MERGE, content_merged=True), FIRST),
        spares="snapshots-would-change",
    ),
    Row(
        "base has, but top is put on base, past the image between",
        with_snapshots(replace(RANGE, content_merged=True), FIRST),
        ("snapshots-would-change",),
    ),
    Row(
        "the image between is not",
        with_snapshots(replace(RANGE, content_merged=True), FIRST, index=1),
        spares="snapshots-would-change",
    ),
    Row(
        "a pull of what base has already puts top elsewhere all the same",
        with_snapshots(replace(PULL, content_merged=True), FIRST),
        ("snapshots-would-change",),
    ),
    Row(
        "all would go with top",
        with_snapshots(MERGE),
        ("internal-snapshots",),
        options=DELETE,
    ),
    Row(
        "all would go with what base takes the place of",
        with_snapshots(MERGE, FIRST),
        ("internal-snapshots",),
        options=KEEP_NAME,
    ),
    Row(
        "those of base stay where they are",
        with_snapshots(MERGE, index=0),
        options=DELETE_AND_KEEP_NAME,
        spares="internal-snapshots",
    ),
    Row(
        "they may",
        with_snapshots(MERGE),
        options=MergeOptions(delete=True, drop_snapshots=True),
        spares="internal-snapshots",
    ),
    Row(
        "one would show other data in a running VM",
        with_snapshots(MERGE, FIRST, removable=False),
        ("snapshots-would-change-live",),
    ),
    Row(
        "those of a running VM would go with top",
        with_snapshots(MERGE, removable=False),
        ("snapshots-would-change-live",),
        options=DELETE,
    ),
    Row(
        "those of a running VM show the same",
        with_snapshots(MERGE, removable=False),
        spares="snapshots-would-change-live",
    ),
]
