# SPDX-License-Identifier: Apache-2.0
"""Space: where data goes, what base lies on, what the overlay has to hide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from chainmerge.options import MergeOptions, Placement
from chainmerge.planning.facts import HidingFacts, MergeFacts
from chainmerge.planning.space.errors import OldBytesBehindEnd
from tests.planning.situations.rows import MERGE, Row
from tests.support.merge_facts import (
    DISK,
    FILE,
    FILE_SIZE,
    FIXED_DEVICE,
    GIB,
    LVM,
    MIB,
    NEEDED,
    NEEDED_IN_PLACE,
    RAW,
    space,
    with_base,
    with_decisions,
    with_top,
)

if TYPE_CHECKING:
    from chainmerge.storage.volume_facts import VolumeFacts


def on(volume: VolumeFacts, required: int = 6 * GIB) -> MergeFacts:
    """A merge whose base has to have so many bytes on a volume, data placed in the one way."""
    spaces = {Placement.IN_PLACE: space(required)}
    return replace(MERGE, volume=volume, spaces=spaces)


NEEDS: Final = 6 * GIB
LARGER: Final = 2 * DISK
HIDDEN: Final = with_top(
    replace(on(replace(LVM, capacity_limit=32 * GIB), LARGER)), guest_size=LARGER
)
HIDING: Final = HidingFacts(HIDDEN.top, FILE, DISK, FILE_SIZE + MIB, None)
SPACE: Final = [
    Row(
        "there is only one place, and another is asked for",
        replace(MERGE, spaces={Placement.IN_PLACE: space(NEEDED)}),
        ("placement-unavailable",),
        options=MergeOptions(data="cow"),
    ),
    Row(
        "that place is asked for",
        replace(MERGE, spaces={Placement.IN_PLACE: space(NEEDED)}),
        options=MergeOptions(data="in-place"),
        spares="placement-unavailable",
    ),
    Row(
        "the file system lacks a byte",
        replace(on(replace(FILE, free_bytes=NEEDS - FILE_SIZE - 1))),
        ("file-system-full",),
    ),
    Row(
        "it has just enough",
        on(replace(FILE, free_bytes=NEEDS - FILE_SIZE)),
        spares="file-system-full",
    ),
    Row(
        "it has enough for data in place, and the choice is free",
        replace(MERGE, volume=replace(FILE, free_bytes=NEEDED_IN_PLACE - FILE_SIZE)),
        spares="file-system-full",
    ),
    Row(
        "it has so, and new clusters are asked for",
        replace(MERGE, volume=replace(FILE, free_bytes=NEEDED_IN_PLACE - FILE_SIZE)),
        ("file-system-full",),
        options=MergeOptions(data="cow"),
    ),
    Row(
        "it has so once stale bitmaps are gone",
        replace(
            MERGE,
            volume=replace(FILE, free_bytes=MIB),
            spaces={
                Placement.COW: space(
                    NEEDED, required_if_pruned=FILE_SIZE + MIB, allocates_if_pruned=MIB
                )
            },
        ),
        spares="file-system-full",
    ),
    Row(
        "all is merged: nothing is needed",
        replace(on(replace(FILE, free_bytes=0)), merged=True),
        spares="file-system-full",
    ),
    Row(
        "the file may lack a byte of what it needs",
        on(replace(FILE, capacity_limit=NEEDS - 1)),
        ("file-limit-reached",),
    ),
    Row(
        "it may become just as large",
        on(replace(FILE, capacity_limit=NEEDS)),
        spares="file-limit-reached",
    ),
    Row(
        "the device is a byte too small",
        on(replace(FIXED_DEVICE, size=NEEDS - 1, capacity_limit=NEEDS - 1)),
        ("device-too-small",),
    ),
    Row(
        "it is just large enough",
        on(replace(FIXED_DEVICE, size=NEEDS, capacity_limit=NEEDS)),
        spares="device-too-small",
    ),
    Row(
        "it is raw, and the guest's disk itself",
        with_decisions(with_base(on(FIXED_DEVICE), **RAW)),
        ("raw-device-too-small",),
    ),
    Row(
        "it is raw, in a file",
        with_decisions(with_base(on(replace(FILE, capacity_limit=NEEDS - 1)), **RAW)),
        ("file-limit-reached",),
        spares="raw-device-too-small",
    ),
    Row(
        "so is a volume, which can be extended",
        with_decisions(with_base(on(LVM), **RAW)),
        spares="raw-device-too-small",
    ),
    Row(
        "the group lacks a byte",
        on(replace(LVM, capacity_limit=NEEDS - 1)),
        ("volume-group-full",),
    ),
    Row(
        "the group has just enough",
        on(replace(LVM, capacity_limit=NEEDS)),
        spares="volume-group-full",
    ),
    Row("the volume has it already", on(replace(LVM, size=NEEDS, capacity_limit=NEEDS))),
]

HIDDEN_VOLUMES: Final = [
    Row("the overlay has room for the zeros that hide", replace(HIDDEN, hiding=HIDING)),
    Row(
        "what keeps it from being written to is said",
        replace(
            HIDDEN,
            hiding=replace(HIDING, obstacle=OldBytesBehindEnd("base", LARGER, "top is encrypted")),
        ),
        ("old-bytes-behind-end",),
    ),
    Row(
        "the overlay's file system has no room for them",
        replace(HIDDEN, hiding=replace(HIDING, volume=replace(FILE, free_bytes=MIB - 1))),
        ("file-system-full",),
    ),
    Row(
        "the overlay's volume has, and is not extended",
        replace(
            HIDDEN,
            hiding=replace(HIDING, volume=replace(LVM, size=FILE_SIZE + MIB)),
        ),
        spares="device-too-small",
    ),
    Row(
        "the overlay's volume has not, and is not extended",
        replace(
            HIDDEN,
            hiding=replace(HIDING, volume=replace(LVM, size=FILE_SIZE)),
        ),
        ("device-too-small",),
    ),
]
