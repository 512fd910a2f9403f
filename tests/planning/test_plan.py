# SPDX-License-Identifier: Apache-2.0
"""The plan as a function of facts: what it says of each situation."""

from __future__ import annotations

from typing import Any, Final

import pytest
from msgspec import Struct, field
from msgspec.structs import replace

from chainmerge.chain.relatives import Descent, ImageAbove
from chainmerge.documents.plan import (
    DirectionCost,
    EngineName,
    Finding,
    LeakFacts,
    MergePlan,
    Movement,
    PlannedBitmap,
    PlannedHiding,
    PlannedImage,
    PlannedSnapshots,
    Repoint,
)
from chainmerge.documents.versions import PLAN_VERSION
from chainmerge.options import MergeOptions, Placement
from chainmerge.planning.facts import HidingFacts, MergeFacts
from chainmerge.planning.plan import make_plan
from chainmerge.planning.refusals import find_refusals
from chainmerge.planning.warnings import find_warnings
from tests.support.merge_facts import (
    DISK,
    FILE,
    FILE_SIZE,
    GIB,
    LVM,
    MIB,
    RAW,
    VM,
    bitmap_entry,
    decided,
    header,
    merge_of,
    pull_of,
    qcow2,
    snapshots_in,
    space,
    with_base,
    with_decisions,
    with_image,
    with_relatives,
    with_top,
)

PLAIN: Final = MergeOptions()
DELETE: Final = MergeOptions(delete=True)
KEEP_NAME: Final = MergeOptions(keep_name=True)
MERGE: Final = merge_of()
RANGE: Final = merge_of(overlays=3, below=1)
PULL: Final = pull_of(below=1)
BASE, TOP = (str(image.path) for image in MERGE.chain.images)
CHILD: Final = qcow2(VM / "child.qcow2", MERGE.top.path)
SIBLING: Final = qcow2(VM / "sibling.qcow2", MERGE.base.path)
OVERLAY: Final = HidingFacts(MERGE.top, FILE, DISK // 2, FILE_SIZE + MIB, None)


class Row(Struct, frozen=True):
    """A situation, and what of the plan is other than that of a healthy merge."""

    situation: str
    facts: MergeFacts
    options: MergeOptions = field(default=PLAIN)
    differs: dict[str, Any] = field(default_factory=dict)


def planned(facts: MergeFacts = MERGE, options: MergeOptions = PLAIN) -> MergePlan:
    return make_plan(facts, options)


HEALTHY: Final = planned()

SITUATIONS: Final = [
    Row("a healthy merge", MERGE),
    Row(
        "an earlier run came to somewhere",
        replace(MERGE, interrupted=True),
        differs={
            "progress": "interrupted",
        },
    ),
    Row(
        "an earlier run came to the end",
        replace(MERGE, merged=True, interrupted=True),
        differs={
            "progress": "merged",
            "space": replace(HEALTHY.space, required=FILE_SIZE, grow_to=None, allocates=0),
        },
    ),
    Row("nobody found it at the end", replace(MERGE, merged=False), differs={}),
    Row("top is deleted", MERGE, DELETE, {"delete": (TOP,)}),
    Row("base gets top's name", MERGE, KEEP_NAME, {"rename": (BASE, TOP)}),
    Row(
        "a child of top is re-pointed",
        with_relatives(MERGE, children=(CHILD,)),
        differs={
            "repoint": (Repoint(str(CHILD.path), "top.qcow2", "base.qcow2", "qcow2"),),
            "other_users": (str(CHILD.path),),
        },
    ),
    Row(
        "QEMU copies",
        replace(MERGE, engine=EngineName.QEMU, engine_reason="of a data file"),
        differs={"engine": "qemu", "engine_reason": "of a data file"},
    ),
    Row(
        "metadata only is verified",
        MERGE,
        MergeOptions(verify="metadata"),
        {
            "verify": "metadata",
        },
    ),
    Row(
        "data goes over the old one",
        MERGE,
        MergeOptions(data="in-place"),
        {
            "space": replace(
                HEALTHY.space,
                placement=Placement.IN_PLACE,
                required=FILE_SIZE + 16 * MIB,
                grow_to=FILE_SIZE + 16 * MIB,
                allocates=16 * MIB,
                breakdown={"guest data": 16 * MIB},
            ),
        },
    ),
    Row(
        "warnings of who looked come first",
        replace(with_top(MERGE, guest_size=DISK - 512), warnings=("base is old",)),
        differs={
            "warnings": (
                "base is old",
                (
                    f"{TOP} has a smaller disk ({DISK - 512} bytes) than {BASE} ({DISK} bytes): "
                    "base does not shrink, so the merged disk has the larger size"
                ),
            )
        },
    ),
    Row(
        "top is larger",
        with_top(MERGE, guest_size=2 * DISK),
        differs={
            "virtual_size_after": 2 * DISK,
        },
    ),
    Row(
        "the overlay hides what a larger volume shows",
        replace(MERGE, hiding=OVERLAY),
        differs={
            "hides": PlannedHiding(TOP, DISK // 2, DISK, FILE_SIZE + MIB),
        },
    ),
    Row(
        "once all is merged nothing has to be hidden",
        replace(MERGE, hiding=OVERLAY, merged=True),
        differs={
            "progress": "merged",
            "space": replace(HEALTHY.space, required=FILE_SIZE, grow_to=None, allocates=0),
        },
    ),
    Row(
        "ours is given back",
        replace(MERGE, leaks=LeakFacts(ours=MIB)),
        differs={
            "leaks": LeakFacts(ours=MIB),
        },
    ),
    Row(
        "top has a snapshot",
        replace(MERGE, snapshots=(snapshots_in(MERGE.top, "a"),)),
        differs={
            "snapshots": (PlannedSnapshots(TOP, ("a",), (), (), 0),),
        },
    ),
    Row(
        "it has no new cluster to give",
        replace(
            MERGE,
            spaces={Placement.IN_PLACE: space(FILE_SIZE, new_clusters=0, new_l2_tables=0)},
        ),
        differs={
            "movement": replace(HEALTHY.movement, new_clusters=0, new_l2_tables=0),
            "space": replace(
                HEALTHY.space,
                placement=Placement.IN_PLACE,
                required=FILE_SIZE,
                grow_to=None,
                allocates=0,
                breakdown={"guest data": 0},
                required_by_placement={"in-place": FILE_SIZE},
            ),
        },
    ),
]
# What follows from the images themselves is the subject of tests of its own.
_OF_IMAGES: Final = {"images"}


@pytest.mark.parametrize("row", [pytest.param(row, id=row.situation) for row in SITUATIONS])
def test_every_situation(row: Row) -> None:
    found = planned(row.facts, row.options)
    differs = {
        name: getattr(found, name)
        for name in MergePlan.__struct_fields__
        if name not in _OF_IMAGES and getattr(found, name) != getattr(HEALTHY, name)
    }
    assert differs == row.differs
    assert found.feasible


def test_a_healthy_merge() -> None:
    assert HEALTHY.version == PLAN_VERSION
    assert (HEALTHY.base, HEALTHY.top) == (BASE, TOP)
    assert HEALTHY.progress == "new"
    assert HEALTHY.engine == "native"
    assert HEALTHY.movement == Movement(48 * MIB, MIB, 0, new_clusters=512, new_l2_tables=1)
    assert HEALTHY.virtual_size_before == HEALTHY.virtual_size_after == DISK
    assert HEALTHY.searched == MERGE.relatives.searched
    assert HEALTHY.feasible
    assert not HEALTHY.pulls
    for nothing in ("snapshots", "hides", "repoint", "delete", "rename", "other_users", "warnings"):
        assert not getattr(HEALTHY, nothing)


def test_a_pull_is_about_top() -> None:
    plan = planned(with_top(PULL, guest_size=DISK + 512), DELETE)
    assert plan.pulls
    assert plan.virtual_size_before == plan.virtual_size_after == DISK + 512
    assert plan.delete == (BASE,)
    assert plan.rename is None
    assert plan.repoint == ()


def test_a_commit_into_a_larger_base_leaves_its_size() -> None:
    plan = planned(with_top(MERGE, guest_size=DISK - 512))
    assert (plan.virtual_size_before, plan.virtual_size_after) == (DISK, DISK)


@pytest.mark.parametrize(
    ("facts", "commit", "pull"),
    [
        pytest.param(
            MERGE,
            DirectionCost(49 * MIB, True, "what top defines goes down into base"),
            DirectionCost(900 * MIB, True, "what only base defines is pulled up into top"),
            id="both",
        ),
        pytest.param(
            replace(MERGE, pull_obstacle="top is raw"),
            DirectionCost(49 * MIB, True, "what top defines goes down into base"),
            DirectionCost(900 * MIB, False, "top is raw"),
            id="one",
        ),
    ],
)
def test_what_each_direction_costs(
    facts: MergeFacts, commit: DirectionCost, pull: DirectionCost
) -> None:
    directions = planned(facts).directions
    assert (directions.commit, directions.pull) == (commit, pull)
    assert directions.chosen == "commit"


# Images


def roles(plan: MergePlan) -> dict[str, tuple[str, str | None]]:
    """Each image's role and parent, by short names."""
    return {
        _short(image.path): (image.role, image.parent and _short(image.parent))
        for image in plan.images
    }


def _short(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".qcow2")


def test_each_image_has_a_role_and_a_parent() -> None:
    assert roles(planned(merge_of(overlays=3, below=2))) == {
        "root0": ("below", None),
        "root1": ("below", "root0"),
        "base": ("base", "root1"),
        "mid1": ("middle", "base"),
        "mid2": ("middle", "mid1"),
        "top": ("top", "mid2"),
    }


def test_the_roles_are_the_same_by_a_pull() -> None:
    assert roles(planned(pull_of(overlays=2))) == roles(planned(merge_of(overlays=2)))


def test_images_above_top_follow_it() -> None:
    leaf = qcow2(VM / "leaf.qcow2", CHILD.path)
    above = (ImageAbove(CHILD, None), ImageAbove(leaf, Descent(CHILD.path, None)))
    found = roles(planned(with_relatives(MERGE, children=(CHILD,), above=above)))
    assert list(found.items())[1:] == [
        ("top", ("top", "base")),
        ("child", ("above", "top")),
        ("leaf", ("above", "child")),
    ]


def test_an_image_of_another_format_has_no_size_that_is_known() -> None:
    plan = planned(with_image(RANGE, 0, format="vmdk", header=None, guest_size=None))
    assert plan.images[0].virtual_size == 0


def test_an_image_is_described() -> None:
    facts = with_image(
        MERGE,
        0,
        **RAW,
        format_declared=False,
        file_size=3 * GIB,
        guest_size=3 * GIB + 512,
        notes=("its format is a guess",),
    )
    base, top = planned(with_top(with_decisions(facts), bitmaps=(bitmap_entry("a"),))).images
    assert base == PlannedImage(
        path=BASE,
        role="base",  # type: ignore[arg-type]
        format="raw",
        format_declared=False,
        virtual_size=3 * GIB + 512,
        file_size=3 * GIB,
        cluster_size=None,
        bitmaps=0,
        parent=None,
        notes=("its format is a guess",),
    )
    assert top.cluster_size == 65536
    assert top.bitmaps == 1
    assert top.format_declared


def test_others_are_named_from_base_up() -> None:
    branch = qcow2(VM / "branch.qcow2", RANGE.chain.images[2].path)
    facts = with_relatives(RANGE, children=(CHILD,), middle_children=(branch,), siblings=(SIBLING,))
    plan = planned(facts)
    assert list(map(_short, plan.other_users)) == ["sibling", "branch", "child"]


# Bitmaps


@pytest.mark.parametrize(
    ("states", "fate", "dirty", "recovered"),
    [
        pytest.param(("valid", "valid"), "keep", 65536, False, id="kept"),
        pytest.param(("valid", "valid"), "keep", 65536, True, id="kept by an earlier run"),
        pytest.param(("valid", "absent"), "prune", None, False, id="pruned"),
    ],
)
def test_what_becomes_of_a_bitmap(
    states: tuple[str, ...], fate: str, dirty: int | None, recovered: bool
) -> None:
    decision = decided(*states)
    names = frozenset({decision.name}) if recovered else frozenset()
    facts = replace(with_decisions(MERGE, decision), recovered=names)
    assert planned(facts).bitmaps == (
        PlannedBitmap(
            name="cp1",
            fate=fate,
            rule=decision.rule,
            reason=decision.reason,
            tombstone=False,
            granularity=decision.granularity,
            dirty_bytes=dirty,
            was_valid=fate == "keep",
            unguarded=False,
            states={BASE: states[0], TOP: states[1]},
            recovered=recovered,
        ),
    )


def test_a_tombstone_and_a_name_that_cannot_have_one() -> None:
    stone = decided("valid", "absent", name="a", above=True)
    unguarded = decided("absent", "in-use", name="b", above=True, base_holds=False)
    one, other = planned(with_decisions(MERGE, stone, unguarded)).bitmaps
    assert (one.name, one.tombstone, one.unguarded) == ("a", True, False)
    assert (other.name, other.tombstone, other.unguarded) == ("b", False, True)


# What refuses it


def test_refusals_are_told_in_the_words_of_the_errors() -> None:
    facts = with_relatives(MERGE, siblings=(SIBLING,))
    (error,) = find_refusals(facts, PLAIN)
    plan = planned(facts)
    assert plan.refusals == (Finding(error.code, error.sentence, error.advice),)
    assert not plan.feasible


def test_a_refused_plan_says_what_it_would_do() -> None:
    facts = with_relatives(RANGE, siblings=(SIBLING,))
    refused, plan = planned(facts, DELETE), planned(RANGE, DELETE)
    assert refused.refusals
    assert refused == replace(plan, refusals=refused.refusals, other_users=refused.other_users)


def test_a_plan_with_a_missing_byte_is_refused() -> None:
    facts = replace(
        MERGE,
        volume=replace(LVM, capacity_limit=LVM.size),
        spaces={
            Placement.IN_PLACE: space(LVM.size + 1),
        },
    )
    plan = planned(facts)
    assert plan.space.missing == 1
    assert [one.code for one in plan.refusals] == ["volume-group-full"]


def test_warnings_are_those_of_the_facts_and_of_the_planner() -> None:
    facts = replace(RANGE, warnings=("one", "two"))
    assert planned(facts).warnings == ("one", "two", *find_warnings(facts, PLAIN))


def test_a_base_of_version_2_is_no_matter_where_no_bitmap_is() -> None:
    facts = with_decisions(with_base(MERGE, header=header(version=2)))
    assert planned(facts).feasible


# What is shared, and what is given back

OCCUPIED: Final = {image.identity: 100 * MIB for image in RANGE.chain.images}
RANGE_ON_DISK: Final = replace(RANGE, occupied=OCCUPIED)
MOVES: Final = RANGE.movement.data_bytes
ALL_THREE: Final = 300 * MIB


@pytest.mark.parametrize(
    ("facts", "options", "shared", "freed", "deletable"),
    [
        pytest.param(RANGE_ON_DISK, PLAIN, 0, 0, ALL_THREE, id="images stay"),
        pytest.param(RANGE_ON_DISK, DELETE, 0, ALL_THREE, ALL_THREE, id="images are deleted"),
        pytest.param(RANGE_ON_DISK, KEEP_NAME, 0, 100 * MIB, ALL_THREE, id="base replaces top"),
        pytest.param(
            replace(RANGE_ON_DISK, shares=True),
            DELETE,
            MOVES,
            ALL_THREE - MOVES,
            ALL_THREE - MOVES,
            id="what is shared is not given back",
        ),
        pytest.param(
            replace(RANGE_ON_DISK, shares=True, merged=True),
            PLAIN,
            0,
            0,
            ALL_THREE,
            id="nothing moves any more",
        ),
    ],
)
def test_what_is_shared_and_given_back(
    facts: MergeFacts, options: MergeOptions, shared: int, freed: int, deletable: int
) -> None:
    plan = planned(facts, options)
    assert (plan.shared_bytes, plan.freed_bytes, plan.deletable_bytes) == (shared, freed, deletable)
