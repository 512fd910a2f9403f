# SPDX-License-Identifier: Apache-2.0
"""What a plan warns of: a situation that it speaks of, and those next to it that it does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from msgspec import Struct, field
from msgspec.structs import replace

from chainmerge.documents.plan import LeakFacts
from chainmerge.options import Direction, MergeOptions
from chainmerge.planning.facts import Evidence, ImageTimes, MergeFacts
from chainmerge.planning.removals import Belongings
from chainmerge.planning.warnings import find_warnings
from chainmerge.planning.wording import first_few, local_time, names_of, quoted, run_of_images
from chainmerge.qcow2.features import CryptMethod
from tests.support.merge_facts import (
    DISK,
    HOUR,
    MIB,
    NOON,
    VM,
    base_written_last,
    header,
    merge_of,
    pull_of,
    snapshots_in,
    times,
    with_base,
    with_image,
    with_relatives,
    with_removals,
    with_searched,
    with_top,
)

PLAIN: Final = MergeOptions()
DELETE: Final = MergeOptions(delete=True)
KEEP_NAME: Final = MergeOptions(keep_name=True)
BOTH: Final = MergeOptions(delete=True, keep_name=True)
DROP: Final = MergeOptions(drop_snapshots=True)
MERGE: Final = merge_of()
RANGE: Final = merge_of(overlays=3)
PULL: Final = pull_of()
BASE, TOP = MERGE.base.path, MERGE.top.path
MID1, MID2 = (image.path for image in RANGE.chain.images[1:3])


class Row(Struct, frozen=True):
    """A situation and everything that is said of it, in order."""

    situation: str
    facts: MergeFacts
    warnings: tuple[str, ...] = ()
    options: MergeOptions = field(default=PLAIN)


NOTHING: Final = [
    Row("a healthy merge", MERGE),
    Row("a healthy pull", PULL),
    Row("a healthy pull of a range", pull_of(overlays=3)),
]

SIZES: Final = [
    Row(
        "top has a smaller disk",
        with_top(MERGE, guest_size=DISK - 512),
        (
            (
                f"{TOP} has a smaller disk ({DISK - 512} bytes) than {BASE} ({DISK} bytes): base "
                "does not shrink, so the merged disk has the larger size"
            ),
        ),
    ),
    Row("a pull has top's size", with_top(PULL, guest_size=DISK - 512)),
    Row("top has a larger one", with_top(MERGE, guest_size=DISK + 512)),
]

BETWEEN: Final = "must not be used any more: the data underneath has changed"
RANGES: Final = [
    Row(
        "two images",
        merge_of(overlays=2),
        (f"after the merge {MID1} {BETWEEN}",),
    ),
    Row("three images", RANGE, (f"after the merge {MID1}, {MID2} {BETWEEN}",)),
    Row(
        "five images: by name while a reader can take them in",
        merge_of(overlays=5),
        (f"after the merge {VM}/mid1.qcow2 to {VM}/mid4.qcow2 (4 images) {BETWEEN}",),
    ),
    Row("that are deleted", RANGE, options=DELETE),
    Row(
        "that stay, though base has top's name",
        RANGE,
        (f"after the merge {MID1}, {MID2} {BETWEEN}",),
        KEEP_NAME,
    ),
]

TOP_DATA: Final = VM / "top.raw"
OWNING: Final = with_removals(
    MERGE, belongings={MERGE.top.identity: Belongings(data_file=TOP_DATA)}
)
KEPT: Final = f"{TOP_DATA}, the data file of {TOP}, is kept: {BASE} has its data there too"
KEEPING: Final = with_removals(
    MERGE, belongings={MERGE.top.identity: Belongings(kept_data_file=KEPT)}
)
STAYS: Final = [
    Row(
        "a pull under top's name leaves base",
        PULL,
        (f"{BASE} stays as it is: --delete deletes what was pulled up",),
        KEEP_NAME,
    ),
    Row(
        "and the images between",
        pull_of(overlays=2),
        (f"{BASE}, {MID1} stay as they are: --delete deletes what was pulled up",),
        KEEP_NAME,
    ),
    Row("it deletes it", PULL, options=BOTH),
    Row("nobody could expect it to be gone", PULL),
    Row("nor by a commit", MERGE, options=KEEP_NAME),
    Row(
        "the data of what base takes the place of",
        OWNING,
        (f"{TOP_DATA}, the data file of {TOP}, is kept: --delete deletes it",),
        KEEP_NAME,
    ),
    Row("it is deleted", OWNING, options=BOTH),
    Row(
        "there is none",
        with_removals(MERGE, belongings={MERGE.top.identity: Belongings()}),
        options=KEEP_NAME,
    ),
    Row("top itself stays", OWNING),
    Row("a data file that others need", KEEPING, (KEPT,), DELETE),
    Row("of an image that stays", KEEPING),
]

LUKS: Final = header(crypt_method=CryptMethod.LUKS)
ENCRYPTION: Final = [
    Row(
        "what was encrypted can be read in base",
        with_top(MERGE, header=LUKS),
        (f"{BASE} is not encrypted: what {TOP} holds can be read there",),
    ),
    Row(
        "of several images",
        with_image(with_top(merge_of(2), header=LUKS), 1, header=LUKS),
        (
            f"after the merge {MID1} {BETWEEN}",
            f"{BASE} is not encrypted: what {MID1}, {TOP} holds can be read there",
        ),
    ),
    Row("base is encrypted, too", with_base(with_top(MERGE, header=LUKS), header=LUKS)),
    Row("base alone is", with_base(MERGE, header=LUKS)),
    Row(
        "by a pull that is what top gets to hold",
        with_base(PULL, header=LUKS),
        (f"{TOP} is not encrypted: what {BASE} holds can be read there",),
    ),
    Row("by a pull top is", with_top(PULL, header=LUKS)),
]

VOLUMES: Final = (Path("/dev/vg/a"), Path("/dev/vg/b"))
INACTIVE: Final = with_relatives(MERGE, inactive=VOLUMES)
NOT_LOOKED_AT: Final = (
    "2 logical volumes (/dev/vg/a, /dev/vg/b) could use these images: not examined"
)
OTHERS: Final = [
    Row(
        "files that cannot be read",
        with_relatives(MERGE, unreadable=((VM / "x", "I/O error"), (VM / "y", "not sound"))),
        (
            f"{VM}/x could be another user of these images, but cannot be read: I/O error",
            f"{VM}/y could be another user of these images, but cannot be read: not sound",
        ),
    ),
    Row(
        "volumes that are not active, and of no matter for a pull",
        replace(INACTIVE, direction=Direction.PULL),
        (NOT_LOOKED_AT,),
    ),
    Row(
        "nobody else is there, says the caller",
        with_searched(INACTIVE, sole_user=True),
        (NOT_LOOKED_AT,),
    ),
    Row("they refuse the merge", INACTIVE),
]

# What a plan makes of times and content.
EQUALLY_OLD: Final = times(MERGE, NOON, NOON)
EXPLAINED: Final = (
    "a restore, a copy, a change of bitmaps or a commit of another layer would also explain it"
)


def doubt(signs: str, facts: MergeFacts = MERGE, later: str = "") -> str:
    top, base = facts.top.path, facts.base.path
    return (
        f"{signs}: if somebody has merged {top} before, or replaced {base}, the merge keeps the "
        f"wrong data; {EXPLAINED}{later}"
    )


def written(lower: str, at: int, upper: str, before: int, verb: str = "written") -> str:
    return (
        f"{VM}/{lower}.qcow2 was {verb} ({local_time(at)}) after "
        f"{VM}/{upper}.qcow2 ({local_time(before)})"
    )


LATER: Final = Evidence(times(MERGE, NOON + HOUR, NOON))
HOLDING: Final = base_written_last(MERGE, times=EQUALLY_OLD)
FIVE: Final = merge_of(overlays=5)
SINKING: Final = tuple(NOON - step * HOUR for step in range(6))
"""Each image was written after the next one above it."""


def resized(times_: tuple[ImageTimes, ...], *sizes: int) -> tuple[ImageTimes, ...]:
    return tuple(replace(one, virtual_size=size) for one, size in zip(times_, sizes, strict=True))


DOUBTS: Final = [
    Row("nothing is known", replace(MERGE, evidence=None)),
    Row("in order", replace(MERGE, evidence=Evidence(times(MERGE, NOON, NOON + 1)))),
    Row("at the same moment", replace(MERGE, evidence=Evidence(EQUALLY_OLD))),
    Row(
        "base was written later",
        replace(MERGE, evidence=LATER),
        (doubt(written("base", NOON + HOUR, "top", NOON)),),
    ),
    Row("and shows the same", replace(MERGE, evidence=replace(LATER, equal=True))),
    Row(
        "base was created later",
        replace(
            MERGE,
            evidence=Evidence(
                (
                    replace(EQUALLY_OLD[0], created=NOON),
                    replace(EQUALLY_OLD[1], created=NOON - HOUR),
                )
            ),
        ),
        (doubt(written("base", NOON, "top", NOON - HOUR, "created")),),
    ),
    Row(
        "base has a larger disk",
        replace(MERGE, evidence=Evidence(resized(EQUALLY_OLD, 2048, 1024))),
        (doubt(f"{BASE} has a larger disk (2048 bytes) than {TOP} (1024 bytes)"),),
    ),
    Row(
        "all of that",
        replace(
            MERGE,
            evidence=Evidence(
                resized(
                    (
                        replace(LATER.times[0], created=NOON),
                        replace(LATER.times[1], created=NOON - HOUR),
                    ),
                    2048,
                    1024,
                )
            ),
        ),
        (
            doubt(
                f"{written('base', NOON + HOUR, 'top', NOON)} and was created "
                f"({local_time(NOON)}) after {TOP} ({local_time(NOON - HOUR)}) and has a larger "
                f"disk (2048 bytes) than {TOP} (1024 bytes)"
            ),
        ),
    ),
    Row(
        "three pairs are named, and the others counted",
        replace(FIVE, evidence=Evidence(times(FIVE, *SINKING))),
        (
            f"after the merge {VM}/mid1.qcow2 to {VM}/mid4.qcow2 (4 images) {BETWEEN}",
            doubt(
                "; ".join(
                    [
                        written("base", SINKING[0], "mid1", SINKING[1]),
                        written("mid1", SINKING[1], "mid2", SINKING[2]),
                        written("mid2", SINKING[2], "mid3", SINKING[3]),
                        "the same holds for 2 more images",
                    ]
                ),
                FIVE,
            ),
        ),
    ),
    Row(
        "base holds most",
        replace(MERGE, evidence=HOLDING),
        (doubt(f"{BASE} already holds most clusters sampled from the images above it (15 of 16)"),),
    ),
    Row(
        "base holds half",
        replace(MERGE, evidence=replace(HOLDING, held=8, differing=8)),
    ),
    Row("base holds all", replace(MERGE, evidence=replace(HOLDING, equal=True))),
    Row(
        "base holds all that was looked at, and was written later: the merge compares",
        replace(MERGE, evidence=base_written_last(MERGE, equal=None)),
        (
            doubt(
                f"{BASE} already holds most clusters sampled from the images above it (15 of 16); "
                f"{written('base', NOON + HOUR, 'top', NOON)}",
                later="; the merge compares everything, and is refused if anything differs",
            ),
        ),
    ),
    Row(
        "so it does not where base was written before",
        replace(MERGE, evidence=replace(HOLDING, equal=None)),
        (doubt(f"{BASE} already holds most clusters sampled from the images above it (15 of 16)"),),
    ),
    Row(
        "nothing is compared where base holds little",
        replace(MERGE, evidence=base_written_last(MERGE, held=0, differing=16, equal=None)),
        (doubt(written("base", NOON + HOUR, "top", NOON)),),
    ),
    Row(
        "devices have no times",
        replace(MERGE, evidence=replace(HOLDING, times=times(MERGE, None, None))),
        (
            doubt(
                f"{BASE} already holds most clusters sampled from the images above it (15 of 16) "
                "(block devices have no times)"
            ),
        ),
    ),
    Row("it refuses the merge", replace(MERGE, evidence=base_written_last(MERGE))),
    Row(
        "it was to be merged all the same",
        replace(MERGE, evidence=base_written_last(MERGE)),
        (
            doubt(
                f"{BASE} already holds most clusters sampled from the images above it (15 of 16); "
                f"{written('base', NOON + HOUR, 'top', NOON)}"
            ),
        ),
        MergeOptions(despite_newer_base=True),
    ),
]

LEAKED: Final = f"{BASE} has {MIB} leaked bytes of unknown origin"
LEFT: Final = "they may be all that is left of the data that a lost L2 table mapped: no table"
LEAKS: Final = [
    Row("none", MERGE),
    Row("ours go without a word", replace(MERGE, leaks=LeakFacts(ours=MIB))),
    Row(
        "others'",
        replace(MERGE, leaks=LeakFacts(others=MIB)),
        (f"{LEAKED}. They stay; `chainmerge repair` shows what would give the space back",),
    ),
    Row(
        "others', that look like lost data",
        replace(MERGE, leaks=LeakFacts(others=MIB, sign="no table")),
        (f"{LEAKED}; {LEFT}. They stay; `chainmerge repair --reclaim` would destroy that",),
    ),
    Row(
        "others', as asked for",
        replace(MERGE, leaks=LeakFacts(others=MIB, reclaimed=True)),
        (f"{LEAKED}. They are given back, as requested",),
    ),
    Row(
        "others', that look like lost data, as asked for",
        replace(MERGE, leaks=LeakFacts(others=MIB, sign="no table", reclaimed=True)),
        (f"{LEAKED}; {LEFT}. They are given back, as requested",),
    ),
    Row(
        "of what a pull writes",
        replace(PULL, leaks=LeakFacts(others=MIB)),
        (
            (
                f"{TOP} has {MIB} leaked bytes of unknown origin. They stay; `chainmerge "
                "repair` shows what would give the space back"
            ),
        ),
    ),
]


def with_snapshots(*names: str, changed: int) -> MergeFacts:
    views = snapshots_in(MERGE.top, *names, changed=frozenset(range(changed)))
    return replace(MERGE, snapshots=(views,))


SNAPSHOTS: Final = [
    Row(
        "one goes",
        with_snapshots("a", "b", changed=1),
        (f"the internal snapshot 'a' of {TOP} is deleted",),
        DROP,
    ),
    Row(
        "two go",
        with_snapshots("a", "b", changed=2),
        (f"the internal snapshots 'a', 'b' of {TOP} are deleted",),
        DROP,
    ),
    Row(
        "many go",
        with_snapshots("a", "b", "c", "d", "e", changed=5),
        (f"the internal snapshots 'a', 'b', 'c' and 2 more of {TOP} are deleted",),
        DROP,
    ),
    Row(
        "with top all go",
        with_snapshots("a", "b", changed=0),
        (f"the internal snapshots 'a', 'b' of {TOP} are deleted",),
        MergeOptions(drop_snapshots=True, delete=True),
    ),
    Row("none need go", with_snapshots("a", "b", changed=0), options=DROP),
    Row("they may not: it refuses the merge", with_snapshots("a", "b", changed=1)),
]

TABLE: Final = {
    "nothing": NOTHING,
    "sizes": SIZES,
    "ranges": RANGES,
    "what stays": STAYS,
    "encryption": ENCRYPTION,
    "others": OTHERS,
    "doubts": DOUBTS,
    "leaks": LEAKS,
    "snapshots": SNAPSHOTS,
}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{group}: {row.situation}")
        for group, rows in TABLE.items()
        for row in rows
    ],
)
def test_every_situation(row: Row) -> None:
    assert tuple(find_warnings(row.facts, row.options)) == row.warnings


# Words

IMAGES: Final = merge_of(overlays=4).chain.images


def test_images_by_name() -> None:
    assert names_of(()) == ""
    assert names_of(IMAGES[:2]) == f"{VM}/base.qcow2, {VM}/mid1.qcow2"
    assert run_of_images(IMAGES[:3]) == names_of(IMAGES[:3])
    assert run_of_images(IMAGES[:4]) == f"{VM}/base.qcow2 to {VM}/mid3.qcow2 (4 images)"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("", ""),
        ("a", "'a'"),
        ("a b c", "'a', 'b', 'c'"),
        ("a b c d", "'a', 'b', 'c' and 1 more"),
        ("a b c d e", "'a', 'b', 'c' and 2 more"),
    ],
)
def test_the_first_few(names: str, words: str) -> None:
    assert first_few(tuple(names.split())) == words


def test_names_in_quotes() -> None:
    assert quoted(["a", "it's"]) == "'a', \"it's\""
    assert quoted(["\x1b[2J"]).isprintable()


def test_moments_have_a_day_a_time_and_a_zone() -> None:
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"
    assert re.fullmatch(pattern, local_time(NOON))
    assert re.fullmatch(pattern, local_time(0))
    assert local_time(None) == local_time(0)


def test_moments_that_no_calendar_has() -> None:
    assert local_time(10**21) == "1000000000000.000 s after 1970"
