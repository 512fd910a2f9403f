# SPDX-License-Identifier: Apache-2.0
"""Every reason not to merge: a situation that has it, and one next to it that has not.

Facts are values here. What takes real images to find out (the obstacles, what an image's bitmaps
and snapshots are, who uses it) is tested where it is found out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from msgspec.structs import replace

from chainmerge.chain import unseen_users
from chainmerge.errors import ChainmergeError, all_errors
from chainmerge.options import Direction, MergeOptions
from chainmerge.planning import refusals
from chainmerge.planning.errors import NativeUnavailable
from chainmerge.planning.refusals import find_refusals
from chainmerge.qcow2.features import Incompatible
from chainmerge.storage.volume_errors import (
    DeviceTooSmall,
    FileLimitReached,
    FileSystemFull,
    VolumeGroupFull,
)
from tests.planning.situations.of_bitmaps import BITMAPS, CHECKPOINTS, SNAPSHOTS
from tests.planning.situations.of_images import DAMAGE, NEWER_BASE, NOTHING, OBSTACLES
from tests.planning.situations.of_settling import RECORDS, SETTLING
from tests.planning.situations.of_space import HIDDEN_VOLUMES, SPACE
from tests.planning.situations.of_users import OTHERS_AT_RISK, OTHERS_UNKNOWN, OTHERS_UNSEEN
from tests.planning.situations.rows import (
    AWAY,
    DELETE,
    FIRST,
    IMMUTABLE,
    KEEP_NAME,
    MERGE,
    NO_WRITES,
    PLAIN,
    PULL,
    SHARED,
    SIBLING,
    UNREADABLE,
    Row,
    with_snapshots,
)
from tests.support.merge_facts import (
    FILE,
    VM,
    base_written_last,
    codes_of,
    decided,
    header,
    qcow2,
    snapshots_in,
    with_base,
    with_decisions,
    with_relatives,
    with_removals,
)

if TYPE_CHECKING:
    from chainmerge.planning.facts import MergeFacts


TABLE: Final = {
    "nothing": NOTHING,
    "obstacles": OBSTACLES,
    "newer base": NEWER_BASE,
    "damage": DAMAGE,
    "unknown": OTHERS_UNKNOWN,
    "at risk": OTHERS_AT_RISK,
    "checkpoints": CHECKPOINTS,
    "bitmaps": BITMAPS,
    "snapshots": SNAPSHOTS,
    "settling": SETTLING,
    "records": RECORDS,
    "unseen": OTHERS_UNSEEN,
    "space": SPACE,
    "hiding": HIDDEN_VOLUMES,
}
ROWS: Final = [row for rows in TABLE.values() for row in rows]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{group}: {row.situation}")
        for group, rows in TABLE.items()
        for row in rows
    ],
)
def test_every_situation(row: Row) -> None:
    assert codes_of(find_refusals(row.facts, row.options)) == row.codes


def yielded() -> set[str]:
    """The codes of all errors that the planner itself finds: those that its modules know."""
    known = {
        value
        for module in (refusals, unseen_users)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ChainmergeError) and value.code
    }
    # What VolumeFacts.refusal makes, as the planner asks it to.
    known |= {DeviceTooSmall, FileLimitReached, FileSystemFull, VolumeGroupFull}
    assert known < set(all_errors())
    return {error.code for error in known}


def test_every_refusal_has_a_row_that_has_it_and_one_that_only_just_has_not() -> None:
    assert yielded() <= {code for row in ROWS for code in row.codes}
    assert yielded() == {row.spares for row in ROWS if row.spares}


def test_what_is_spared_is_next_to_what_is_not() -> None:
    for rows in TABLE.values():
        for row in rows:
            if row.spares:
                near = {code for other in rows for code in other.codes}
                assert row.spares in near, row.situation
                assert row.spares not in row.codes, row.situation


def test_the_most_fundamental_comes_first() -> None:
    """All at once, each from another stage of the search."""
    child = qcow2(VM / "child.qcow2", MERGE.top.path)
    facts = replace(
        MERGE,
        obstacles=(NativeUnavailable("base", "it is encrypted"),),
        evidence=base_written_last(MERGE),
        snapshots=(snapshots_in(MERGE.top, "one"),),
        volume=replace(FILE, free_bytes=0),
    )
    facts = with_base(facts, **AWAY, header=header(incompatible=Incompatible.DIRTY, version=2))
    facts = with_decisions(facts, decided("absent", "valid", base_holds=False, above=True))
    facts = with_relatives(
        facts,
        siblings=(SIBLING,),
        children=(child,),
        unreadable=((UNREADABLE, "I/O error"),),
        unknown=frozenset({UNREADABLE}),
        inactive=(Path("/dev/vg/other"),),
    )
    facts = with_removals(facts, closed={VM: NO_WRITES}, obstacles={facts.top.path: IMMUTABLE})
    assert codes_of(find_refusals(facts, DELETE)) == (
        "native-engine-unavailable",
        "base-newer",
        "image-dirty",
        "relative-unknown",
        "base-has-other-children",
        "base-cannot-hold-bitmaps",
        "bitmaps-unguarded",
        "internal-snapshots",
        "state-directory-unusable",
        "cannot-take-away",
        "volumes-inactive",
        "users-unknown",
        "file-system-full",
    )


@pytest.mark.parametrize("row", [pytest.param(row, id=row.situation) for row in ROWS if row.codes])
def test_every_refusal_is_a_sentence_with_advice(row: Row) -> None:
    for error in find_refusals(row.facts, row.options):
        for text in (error.sentence, error.advice):
            assert text.strip() == text
            assert text
            assert not re.search(r"[{}]", text), text
            assert "None" not in text
        assert not error.sentence.endswith(".")


@pytest.mark.parametrize(
    ("facts", "options", "advice"),
    [
        pytest.param(
            with_snapshots(MERGE, FIRST, left_by_other_way=True),
            PLAIN,
            "merge the other way (--direction pull), which changes no snapshots; or copy out",
            id="a pull changes none",
        ),
        pytest.param(
            with_snapshots(
                replace(MERGE, pull_obstacle="top is raw"), FIRST, left_by_other_way=True
            ),
            PLAIN,
            "copy out",
            id="a pull would, and there is none",
        ),
        pytest.param(
            with_snapshots(
                replace(PULL, pull_obstacle="of no matter"), FIRST, left_by_other_way=True
            ),
            PLAIN,
            "merge the other way (--direction commit), which changes no snapshots; or copy out",
            id="a commit changes none",
        ),
        pytest.param(with_snapshots(MERGE, FIRST), PLAIN, "copy out", id="either way changes some"),
        pytest.param(
            with_snapshots(MERGE),
            DELETE,
            "leave out --delete, or copy out",
            id="they go with the file only",
        ),
        pytest.param(
            with_snapshots(MERGE),
            KEEP_NAME,
            "leave out --keep-name, or copy out",
            id="they go with the name only",
        ),
        pytest.param(
            with_snapshots(MERGE, FIRST), DELETE, "copy out", id="they would change anyway"
        ),
        pytest.param(
            SHARED,
            PLAIN,
            "pull instead (--direction pull), which leaves /templates/base.qcow2 as it is; if",
            id="a pull leaves base",
        ),
        pytest.param(
            replace(SHARED, pull_obstacle="top is raw"),
            PLAIN,
            "find out which images use /templates/base.qcow2; if",
            id="there is no pull that would",
        ),
        pytest.param(
            replace(SHARED, direction=Direction.PULL),
            DELETE,
            "leave --delete and --keep-name out: a pull does not need them; if",
            id="a pull without deleting leaves base",
        ),
    ],
)
def test_the_way_out_is_one_that_is_there(
    facts: MergeFacts, options: MergeOptions, advice: str
) -> None:
    (error,) = find_refusals(facts, options)
    assert error.advice.startswith(advice)
