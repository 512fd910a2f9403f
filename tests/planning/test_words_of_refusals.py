# SPDX-License-Identifier: Apache-2.0
"""What a refusal names: the images, numbers and options that a person needs to go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
from msgspec.structs import replace

from chainmerge.options import MergeOptions
from chainmerge.planning.refusals import find_refusals
from chainmerge.planning.wording import local_time
from tests.planning.situations.rows import (
    AWAY,
    CHILD,
    DELETE,
    DELETE_AND_KEEP_NAME,
    FIRST,
    IMMUTABLE,
    KEEP_NAME,
    MERGE,
    NO_WRITES,
    PLAIN,
    PULL,
    SIBLING,
    TAKEN_OVER,
    UNREADABLE,
    sibling,
    with_snapshots,
)
from tests.support.merge_facts import (
    DEVICE,
    DISK,
    FILE,
    FILE_SIZE,
    HOUR,
    MIB,
    NEEDED_IN_PLACE,
    NOON,
    RAW,
    SOUND,
    VM,
    base_written_last,
    bitmap_entry,
    decided,
    header,
    merge_of,
    qcow2,
    times,
    with_base,
    with_decisions,
    with_relatives,
    with_removals,
    with_searched,
    with_top,
)

if TYPE_CHECKING:
    from chainmerge.planning.facts import MergeFacts

BASE, TOP = (str(image.path) for image in MERGE.chain.images)
RANGE: Final = merge_of(overlays=2)
DROP_BITMAPS: Final = MergeOptions(drop_bitmaps=True)
RAW_BASE: Final = with_base(MERGE, **RAW)
OF_TWO_SIZES: Final = with_top(MERGE, guest_size=DISK // 2)


def lost(*names: str, above: bool = False) -> MergeFacts:
    """Bitmaps that raw base cannot hold."""
    decisions = [
        decided("absent", "valid", name=name, base_holds=False, above=above) for name in names
    ]
    return with_decisions(RAW_BASE, *decisions)


@pytest.mark.parametrize(
    ("facts", "options", "named"),
    [
        pytest.param(
            replace(
                RANGE,
                evidence=base_written_last(
                    RANGE, times=times(RANGE, NOON + HOUR, NOON - HOUR, NOON)
                ),
            ),
            PLAIN,
            {
                "base": BASE,
                "top": TOP,
                "held": 15,
                "looked_at": 16,
                "base_time": local_time(NOON + HOUR),
                "top_time": local_time(NOON),
            },
            id="of base that is newer: what was seen, and when the last overlay was written",
        ),
        pytest.param(
            replace(
                MERGE,
                result_check=replace(
                    SOUND,
                    corruptions=2,
                    overlaps=3,
                    messages=("cluster 5 is used twice", "cluster 6 is used twice"),
                ),
            ),
            PLAIN,
            {"image": BASE, "corruptions": 5, "first": "cluster 5 is used twice"},
            id="of damage: how much, and the first of it",
        ),
        pytest.param(
            replace(MERGE, result_check=replace(SOUND, complete=False)),
            PLAIN,
            {"image": BASE, "corruptions": 0, "first": "see chainmerge check"},
            id="of damage without a word: where there is one",
        ),
        pytest.param(
            with_relatives(
                MERGE, unreadable=((UNREADABLE, "I/O error"),), unknown=frozenset({UNREADABLE})
            ),
            PLAIN,
            {"image": str(UNREADABLE), "base": BASE, "top": TOP, "reason": "I/O error"},
            id="of an unknown file",
        ),
        pytest.param(
            with_relatives(MERGE, siblings=(SIBLING, CHILD)),
            PLAIN,
            {"base": BASE, "others": f"{SIBLING.path}, {CHILD.path}"},
            id="of other children: all",
        ),
        pytest.param(
            with_relatives(OF_TWO_SIZES, children=(CHILD,)),
            PLAIN,
            {
                "base": BASE,
                "top": TOP,
                "child": str(CHILD.path),
                "base_size": DISK,
                "top_size": DISK // 2,
                "child_size": DISK,
            },
            id="of a child that sees more: all sizes",
        ),
        pytest.param(
            with_decisions(
                replace(
                    with_relatives(
                        MERGE,
                        siblings=(
                            SIBLING,
                            replace(SIBLING, path=VM / "b", bitmaps=(bitmap_entry("cp1"),)),
                        ),
                    ),
                    content_merged=True,
                ),
                TAKEN_OVER,
            ),
            PLAIN,
            {"base": BASE, "name": "cp1", "top": TOP, "others": str(VM / "b")},
            id="of others' checkpoints: those that have the name",
        ),
        pytest.param(
            lost("a", "b"),
            PLAIN,
            {"base": BASE, "format": "raw", "names": "'a', 'b'"},
            id="of bitmaps that raw base cannot hold",
        ),
        pytest.param(
            with_decisions(
                with_base(MERGE, header=header(version=2)),
                decided("absent", "valid", base_holds=False),
            ),
            PLAIN,
            {"base": BASE, "format": "a version 2 qcow2 image", "names": "'cp1'"},
            id="of bitmaps that a version 2 base cannot hold",
        ),
        pytest.param(
            with_relatives(lost("a", above=True), children=(CHILD,)),
            DROP_BITMAPS,
            {"base": BASE, "names": "'a'", "holders": str(CHILD.path)},
            id="of unguarded bitmaps: the children that would pass",
        ),
        pytest.param(
            lost("a", above=True),
            DROP_BITMAPS,
            {"base": BASE, "names": "'a'", "holders": TOP},
            id="of unguarded bitmaps: top without children",
        ),
        pytest.param(
            with_snapshots(MERGE, FIRST, removable=False),
            PLAIN,
            {"image": TOP, "names": "'one'"},
            id="of a VM's snapshots: those that would change",
        ),
        pytest.param(
            with_snapshots(MERGE, removable=False),
            DELETE,
            {"image": TOP, "names": "'one', 'two'"},
            id="of a VM's snapshots: all that would go",
        ),
        pytest.param(
            with_snapshots(MERGE, FIRST),
            KEEP_NAME,
            {"image": TOP, "names": "'one', 'two'", "option": "--keep-name", "instead": ""},
            id="of snapshots that go: all, and with which option",
        ),
        pytest.param(
            with_top(MERGE, **DEVICE),
            DELETE_AND_KEEP_NAME,
            {"image": TOP, "option": "--delete"},
            id="of devices: the first option",
        ),
        pytest.param(
            with_top(MERGE, **DEVICE),
            KEEP_NAME,
            {"image": TOP, "option": "--keep-name"},
            id="of devices: the other option",
        ),
        pytest.param(
            with_removals(MERGE, obstacles={MERGE.top.path: IMMUTABLE}),
            DELETE,
            {"path": TOP, "option": "--delete", "reason": IMMUTABLE},
            id="of what cannot be deleted",
        ),
        pytest.param(
            with_removals(MERGE, obstacles={MERGE.top.path: IMMUTABLE}),
            KEEP_NAME,
            {"path": TOP, "option": "--keep-name", "reason": IMMUTABLE},
            id="of what cannot be replaced",
        ),
        pytest.param(
            with_searched(
                with_base(
                    MERGE,
                    **AWAY,
                    data_file=VM / "base.raw",
                    header=header(data_file_name="base.raw"),
                ),
                sole_user=True,
            ),
            KEEP_NAME,
            {"base": str(AWAY["path"]), "name": "base.raw", "directory": str(VM)},
            id="of a data file out of reach",
        ),
        pytest.param(
            with_relatives(PULL, siblings=(SIBLING,)),
            DELETE,
            {"doomed": BASE, "others": str(SIBLING.path)},
            id="of what a pull cannot delete",
        ),
        pytest.param(
            replace(sibling(), merged=True),
            KEEP_NAME,
            {"base": BASE, "top": TOP, "others": str(SIBLING.path)},
            id="of others that have base's name",
        ),
        pytest.param(
            with_removals(MERGE, closed={VM: NO_WRITES}),
            PLAIN,
            {"directory": str(VM), "reason": NO_WRITES},
            id="of a directory that takes no files",
        ),
        pytest.param(
            replace(MERGE, volume=replace(FILE, free_bytes=MIB)),
            PLAIN,
            {
                "image": BASE,
                "kind": "file",
                "size": FILE_SIZE,
                "required": NEEDED_IN_PLACE,
                "limit": None,
                "missing": 15 * MIB,
            },
            id="of space: how much there is, and how much not",
        ),
    ],
)
def test_what_is_named(facts: MergeFacts, options: MergeOptions, named: dict[str, Any]) -> None:
    (error,) = find_refusals(facts, options)
    assert error.facts == named


def test_overlays_without_times_are_as_old_as_can_be() -> None:
    """Only who was written later can be told of, so there is always a time to tell."""
    facts = replace(MERGE, evidence=base_written_last(MERGE, times=times(MERGE, NOON, 0)))
    (error,) = find_refusals(facts, PLAIN)
    assert error.facts["top_time"] == local_time(0)


def test_a_name_that_is_not_stored_is_told_as_none() -> None:
    away = with_searched(with_base(MERGE, **AWAY, data_file=VM / "x"), sole_user=True)
    (error,) = find_refusals(away, KEEP_NAME)
    assert error.facts["name"] == ""


def test_who_stands_on_the_others_is_not_named() -> None:
    leaf = qcow2(VM / "leaf.qcow2", SIBLING.path)
    facts = with_relatives(MERGE, siblings=(SIBLING,), beside=(SIBLING, leaf))
    (error,) = find_refusals(facts, PLAIN)
    assert error.facts["others"] == str(SIBLING.path)
