# SPDX-License-Identifier: Apache-2.0
"""The images themselves: what was met while looking, which is newer, what is damaged."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from chainmerge.options import MergeOptions
from chainmerge.planning.errors import NativeUnavailable
from chainmerge.planning.space.errors import OldBytesBehindEnd
from chainmerge.qcow2.features import Incompatible
from tests.planning.situations.rows import DELETE, DELETE_AND_KEEP_NAME, MERGE, PULL, RANGE, Row
from tests.support.merge_facts import (
    DISK,
    NOON,
    RAW,
    SOUND,
    base_written_last,
    header,
    merge_of,
    times,
    with_base,
    with_decisions,
    with_top,
)

NOTHING: Final = [
    Row("a healthy merge", MERGE),
    Row("of several images", RANGE),
    Row("above others", merge_of(below=2)),
    Row("a healthy pull", PULL),
    Row("with everything deleted", RANGE, options=DELETE),
    Row("under top's name", RANGE, options=DELETE_AND_KEEP_NAME),
    Row("a pull, with base deleted", PULL, options=DELETE),
]

OBSTACLES: Final = [
    Row(
        "what was met while looking comes first, as it was met",
        with_base(
            replace(
                MERGE,
                obstacles=(
                    NativeUnavailable("base", "it is encrypted"),
                    OldBytesBehindEnd("base", DISK, "they are encrypted"),
                ),
            ),
            header=header(incompatible=Incompatible.CORRUPT),
        ),
        ("native-engine-unavailable", "old-bytes-behind-end", "image-corrupt"),
    ),
]

NEWER_BASE: Final = [
    Row(
        "base was written last and holds most",
        replace(MERGE, evidence=base_written_last(MERGE)),
        ("base-newer",),
    ),
    Row(
        "so it is with a range",
        replace(RANGE, evidence=base_written_last(RANGE)),
        ("base-newer",),
    ),
    Row(
        "as asked for",
        replace(MERGE, evidence=base_written_last(MERGE)),
        options=MergeOptions(despite_newer_base=True),
        spares="base-newer",
    ),
    Row(
        "base holds half of it",
        replace(MERGE, evidence=base_written_last(MERGE, held=8, differing=8)),
        spares="base-newer",
    ),
    Row(
        "base was written at the same moment",
        replace(MERGE, evidence=base_written_last(MERGE, times=times(MERGE, NOON, NOON))),
        spares="base-newer",
    ),
    Row(
        "one of the overlays was written later",
        replace(
            RANGE,
            evidence=base_written_last(RANGE, times=times(RANGE, NOON, NOON - 1, NOON + 1, NOON)),
        ),
        spares="base-newer",
    ),
    Row(
        "a device among them has no times",
        replace(MERGE, evidence=base_written_last(MERGE, times=times(MERGE, NOON, None))),
        spares="base-newer",
    ),
    Row(
        "base shows all that top shows",
        replace(MERGE, evidence=base_written_last(MERGE, equal=True)),
        spares="base-newer",
    ),
    Row(
        "nobody compared all of it: the merge does",
        replace(MERGE, evidence=base_written_last(MERGE, equal=None)),
        spares="base-newer",
    ),
    Row(
        "a pull leaves base as it is",
        replace(PULL, evidence=base_written_last(PULL)),
        spares="base-newer",
    ),
    Row(
        "but not if it is deleted afterwards",
        replace(PULL, evidence=base_written_last(PULL)),
        ("base-newer",),
        options=DELETE,
    ),
]

DAMAGE: Final = [
    Row(
        "base is marked corrupt",
        with_base(MERGE, header=header(incompatible=Incompatible.CORRUPT)),
        ("image-corrupt",),
    ),
    Row(
        "corrupt goes before dirty, and before what a check finds",
        replace(
            with_base(MERGE, header=header(incompatible=Incompatible.CORRUPT | Incompatible.DIRTY)),
            result_check=replace(SOUND, corruptions=1),
        ),
        ("image-corrupt",),
    ),
    Row(
        "top is, which is only read",
        with_top(MERGE, header=header(incompatible=Incompatible.CORRUPT)),
        spares="image-corrupt",
    ),
    Row(
        "base is what a pull reads only",
        with_base(PULL, header=header(incompatible=Incompatible.CORRUPT)),
        spares="image-corrupt",
    ),
    Row(
        "top is what a pull writes",
        with_top(PULL, header=header(incompatible=Incompatible.CORRUPT)),
        ("image-corrupt",),
    ),
    Row(
        "base was not closed",
        with_base(MERGE, header=header(incompatible=Incompatible.DIRTY)),
        ("image-dirty",),
    ),
    Row(
        "top was not closed",
        with_top(MERGE, header=header(incompatible=Incompatible.DIRTY)),
        spares="image-dirty",
    ),
    Row(
        "one refcount of base is wrong",
        replace(MERGE, result_check=replace(SOUND, corruptions=1)),
        ("image-damaged",),
    ),
    Row(
        "two tables of base share a cluster",
        replace(MERGE, result_check=replace(SOUND, overlaps=1)),
        ("image-damaged",),
    ),
    Row(
        "not all of base can be counted",
        replace(MERGE, result_check=replace(SOUND, complete=False)),
        ("image-damaged",),
    ),
    Row(
        "clusters of base are leaked",
        replace(MERGE, result_check=replace(SOUND, leaks=9)),
        spares="image-damaged",
    ),
    Row("nothing was checked", replace(MERGE, result_check=None), spares="image-damaged"),
    Row(
        "raw base has nothing that can be damaged",
        with_decisions(
            replace(with_base(MERGE, **RAW), result_check=replace(SOUND, corruptions=1))
        ),
        spares="image-damaged",
    ),
]
