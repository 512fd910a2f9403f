# SPDX-License-Identifier: Apache-2.0
"""What holds for the plan of any merge, however odd the facts."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.chain.relatives import Relatives
from chainmerge.documents.images import Searched
from chainmerge.documents.plan import EngineName, LeakFacts
from chainmerge.options import Direction, MergeOptions, Placement
from chainmerge.planning.aftermath import going
from chainmerge.planning.errors import NativeUnavailable
from chainmerge.planning.facts import Evidence, MergeFacts
from chainmerge.planning.plan import make_plan
from chainmerge.planning.refusals import find_refusals
from chainmerge.planning.removals import Belongings, Removals
from chainmerge.qcow2.features import CryptMethod, Incompatible
from tests.support.merge_facts import (
    DEVICE,
    DISK,
    FILE,
    FILE_SIZE,
    FIXED_DEVICE,
    GIB,
    HOUR,
    LVM,
    MIB,
    NOON,
    RAW,
    SOUND,
    VM,
    base_written_last,
    bitmap_entry,
    bits_of,
    decided,
    header,
    merge_of,
    pull_of,
    qcow2,
    snapshots_in,
    space,
    times,
    with_base,
    with_image,
    with_relatives,
    with_top,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.documents.plan import MergePlan

many = settings(max_examples=4 * settings().max_examples)

AWAY: Final = Path("/templates")
SIZES: Final = (DISK - 512, DISK, DISK + 512)
ROOM: Final = (0, 16 * MIB, 64 * MIB, 100 * GIB, 200 * GIB)


class Recipe(Struct, frozen=True):
    """What a merge is like, as plain values: from equal ones equal facts are made."""

    overlays: int
    below: int
    direction: Direction
    engine: EngineName
    sizes: tuple[int, int]
    oddities: frozenset[str]
    states: tuple[tuple[str, ...], ...]
    others: tuple[int, int, int, int, int]
    """Siblings, middle children, children, files that cannot be read, inactive volumes."""
    volume: int
    room: int
    one_way: bool
    merged: bool | None
    content_merged: bool | None
    changed: frozenset[int]
    leaks: LeakFacts
    times: tuple[int | None, ...]
    held: tuple[int, int]
    equal: bool | None


ODDITIES: Final = (
    "base away",
    "base is raw",
    "base is a device",
    "top is a device",
    "top is linked",
    "base is linked",
    "data files",
    "top is encrypted",
    "base is dirty",
    "base is damaged",
    "obstacle",
    "closed",
    "obstinate files",
    "interrupted",
    "running",
    "known users",
    "no pull",
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    overlays, below = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    images = overlays + below + 1
    state = st.sampled_from(["valid", "disabled", "in-use", "absent"])
    seen = st.tuples(*[state] * images).filter(lambda one: set(one[below:]) != {"absent"})
    odd = st.sampled_from(ODDITIES)
    few, many_more = st.frozensets(odd, max_size=2), st.frozensets(odd, min_size=4, max_size=10)
    moment = st.one_of(st.none(), st.sampled_from([NOON - HOUR, NOON, NOON + HOUR, 10**21]))
    return Recipe(
        overlays,
        below,
        draw(st.sampled_from(Direction)),
        draw(st.sampled_from(EngineName)),
        (draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))),
        draw(st.one_of(few, many_more)),
        tuple(draw(st.lists(seen, max_size=3))),
        draw(st.tuples(*[st.sampled_from([0, 0, 0, 1, 2])] * 5)),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(ROOM)),
        draw(st.booleans()),
        draw(st.sampled_from([None, False, True])),
        draw(st.sampled_from([None, False, True])),
        draw(st.one_of(st.just(frozenset()), st.frozensets(st.integers(0, 4)))),
        draw(
            st.builds(
                LeakFacts,
                ours=st.sampled_from([0, MIB]),
                others=st.sampled_from([0, MIB]),
                sign=st.sampled_from([None, "a table is lost"]),
                reclaimed=st.booleans(),
            )
        ),
        draw(st.tuples(*[moment] * (overlays + 1))),
        draw(st.tuples(st.integers(0, 16), st.integers(0, 16))),
        draw(st.sampled_from([None, False, True])),
    )


requests = st.builds(
    MergeOptions,
    delete=st.booleans(),
    keep_name=st.booleans(),
    drop_bitmaps=st.booleans(),
    drop_snapshots=st.booleans(),
    despite_newer_base=st.booleans(),
    data=st.sampled_from(["auto", "cow", "in-place"]),
    shrink=st.booleans(),
    leave=st.sampled_from([None, 0, MIB]),
)


def facts_of(recipe: Recipe) -> MergeFacts:
    """The facts of a recipe, all of it made anew."""
    facts = merge_of(
        recipe.overlays,
        recipe.below,
        direction=recipe.direction,
        engine=recipe.engine,
        merged=recipe.merged,
        content_merged=recipe.content_merged,
        leaks=recipe.leaks,
    )
    facts = _with_odd_images(facts, recipe)
    facts = _with_bitmaps(facts, recipe)
    facts = replace(facts, relatives=_relatives(facts, recipe))
    facts = _with_space(facts, recipe)
    facts = _with_odd_places(facts, recipe)
    snapshots = tuple(
        snapshots_in(
            image,
            *"abcde",
            changed=recipe.changed,
            removable="running" not in recipe.oddities,
            left_by_other_way=True,
        )
        for image in facts.chain.images[facts.base_index :: 2]
    )
    evidence = Evidence(times(facts, *recipe.times), *recipe.held, equal=recipe.equal)
    return replace(facts, snapshots=snapshots if recipe.changed else (), evidence=evidence)


def _with_odd_images(facts: MergeFacts, recipe: Recipe) -> MergeFacts:
    odd = recipe.oddities
    base_size, top_size = recipe.sizes
    facts = with_base(with_top(facts, guest_size=top_size), guest_size=base_size)
    if "base away" in odd:
        facts = with_base(facts, path=AWAY / "base.qcow2", real_path=AWAY / "base.qcow2")
    if "base is dirty" in odd:
        facts = with_base(facts, header=header(incompatible=Incompatible.DIRTY))
    if "top is encrypted" in odd:
        facts = with_top(facts, header=header(crypt_method=CryptMethod.LUKS))
    if "base is a device" in odd:
        facts = with_base(facts, **DEVICE)
    if "top is a device" in odd:
        facts = with_top(facts, **DEVICE)
    if "top is linked" in odd:
        facts = with_top(facts, path=VM / "current")
    if "base is linked" in odd:
        facts = with_base(facts, path=VM / "template")
    return with_base(facts, **RAW) if "base is raw" in odd else facts


def _with_bitmaps(facts: MergeFacts, recipe: Recipe) -> MergeFacts:
    decisions = tuple(
        decided(
            *states,
            name=f"cp{index}",
            base_index=recipe.below,
            base_holds=facts.base.header is not None,
            above=recipe.others[2] > 0,
        )
        for index, states in enumerate(recipe.states)
    )
    return replace(facts, decisions=decisions, final_bits=bits_of(decisions))


def _relatives(facts: MergeFacts, recipe: Recipe) -> Relatives:
    siblings, middle, children, unreadable, inactive = recipe.others
    backings = {
        "sibling": (facts.base, siblings),
        "branch": (facts.chain.images[facts.base_index + 1], middle if recipe.overlays > 1 else 0),
        "child": (facts.top, children),
    }
    found = {
        kind: tuple(
            qcow2(
                VM / f"{kind}{index}.qcow2",
                backing.path,
                bitmaps=(bitmap_entry("cp0"),),
                guest_size=DISK + 512 * index,
            )
            for index in range(count)
        )
        for kind, (backing, count) in backings.items()
    }
    files = [(VM / f"odd{index}", "Permission denied") for index in range(unreadable)]
    return Relatives(
        siblings=found["sibling"],
        middle_children=found["branch"],
        children=found["child"],
        beside=(*found["sibling"], *found["branch"]),
        above=(),
        unreadable=tuple(files),
        unknown=frozenset(path for path, _ in files[:1]),
        searched=Searched(directories=(str(VM),), sole_user="known users" in recipe.oddities),
        inactive=tuple(Path(f"/dev/vg/{index}") for index in range(inactive)),
    )


def _with_space(facts: MergeFacts, recipe: Recipe) -> MergeFacts:
    volume = (
        replace(FILE, free_bytes=recipe.room),
        replace(FIXED_DEVICE, size=FILE_SIZE + recipe.room),
        replace(LVM, size=FILE_SIZE, capacity_limit=FILE_SIZE + recipe.room),
    )[recipe.volume]
    spaces = {
        Placement.IN_PLACE: space(FILE_SIZE + 16 * MIB),
        Placement.COW: space(
            FILE_SIZE + 64 * MIB,
            required_if_pruned=FILE_SIZE + 32 * MIB,
            allocates_if_pruned=32 * MIB,
        ),
    }
    if recipe.one_way:
        del spaces[Placement.COW]
    return replace(facts, volume=volume, spaces=spaces)


def _with_odd_places(facts: MergeFacts, recipe: Recipe) -> MergeFacts:
    odd = recipe.oddities
    belongings = {
        image.identity: Belongings(
            links=(image.path,) if image.path != image.real_path else (),
            data_file=image.real_path.with_suffix(".raw") if "data files" in odd else None,
        )
        for image in facts.chain.images
    }
    obstacles = {
        path: "the file is immutable"
        for image in facts.chain.images[1:]
        for path in (image.real_path, image.real_path.with_suffix(".raw"))
    }
    return replace(
        facts,
        removals=Removals(
            belongings,
            obstacles if "obstinate files" in odd else {},
            {VM: "Read-only file system"} if "closed" in odd else {},
            {},
        ),
        obstacles=(NativeUnavailable("base", "of its data file"),) if "obstacle" in odd else (),
        result_check=replace(SOUND, corruptions=2) if "base is damaged" in odd else SOUND,
        interrupted="interrupted" in odd,
        pull_obstacle="top is raw" if "no pull" in odd else None,
    )


@many
@given(recipe=recipes(), options=requests)
def test_the_same_facts_give_the_same_plan(recipe: Recipe, options: MergeOptions) -> None:
    facts = facts_of(recipe)
    assert make_plan(facts, options) == make_plan(facts, options)
    assert make_plan(facts, options) == make_plan(facts_of(recipe), replace(options))


@many
@given(recipe=recipes(), options=requests)
def test_a_plan_is_feasible_if_nothing_refuses_it(recipe: Recipe, options: MergeOptions) -> None:
    facts = facts_of(recipe)
    plan = make_plan(facts, options)
    codes = [error.code for error in find_refusals(facts, options)]
    assert [one.code for one in plan.refusals] == codes
    assert plan.feasible == (not codes)
    assert not (plan.feasible and plan.space.missing)


@many
@given(recipe=recipes(), options=requests)
def test_only_merged_images_are_deleted_and_never_the_result(
    recipe: Recipe, options: MergeOptions
) -> None:
    facts = facts_of(recipe)
    plan = make_plan(facts, options)
    with_them = going(facts, options).paths
    deleted = plan.delete[: len(plan.delete) - len(with_them)]
    assert plan.delete[len(deleted) :] == tuple(map(str, with_them))
    merged = {str(path) for image in facts.merged_images for path in (image.path, image.real_path)}
    assert set(deleted) <= merged
    assert str(facts.result.real_path) not in plan.delete
    if plan.rename is not None:
        # Top's file is replaced, not deleted: its name is the one that counts.
        assert str(facts.top.real_path) not in plan.delete
    own = {image.identity for image in facts.chain.images[: facts.base_index]}
    below = [one for image, one in facts.removals.belongings.items() if image in own]
    assert not {path for one in below for path in (one.data_file, *one.links)} & set(with_them)
    if not options.delete:
        assert not deleted
        assert not going(facts, options).data_files


@many
@given(recipe=recipes(), options=requests)
def test_nobody_is_repointed_to_what_is_deleted(recipe: Recipe, options: MergeOptions) -> None:
    plan = make_plan(facts_of(recipe), options)
    for change in plan.repoint:
        assert change.child not in plan.delete
        if plan.rename is None:
            assert str(Path(change.child).parent / change.new_backing) not in plan.delete


@many
@given(recipe=recipes(), options=requests)
def test_all_that_is_said_is_in_whole_sentences(recipe: Recipe, options: MergeOptions) -> None:
    for text in words_of(make_plan(facts_of(recipe), options)):
        assert text == text.strip()
        assert len(text.split()) > 2
        assert not re.search(r"[{}]|\bNone\b|  |,,|\(\)", text), text
        assert text.isprintable()


def words_of(plan: MergePlan) -> Iterator[str]:
    yield from plan.warnings
    for finding in plan.refusals:
        yield finding.sentence
        yield finding.hint
    yield from (bitmap.reason for bitmap in plan.bitmaps)


# Singular and plural

SINGLE: Final = merge_of()
CHILD: Final = qcow2(VM / "child.qcow2", SINGLE.top.path)
RAW_BASE: Final = with_base(SINGLE, **RAW)


def of_snapshots(count: int, **more: bool) -> MergeFacts:
    views = snapshots_in(SINGLE.top, *"abc"[:count], changed=frozenset(range(count)), **more)
    return replace(SINGLE, snapshots=(views,))


def of_bitmaps(count: int, *, above: bool = False) -> MergeFacts:
    decisions = tuple(
        decided("absent", "valid", name=name, base_holds=False, above=above)
        for name in "abc"[:count]
    )
    return replace(RAW_BASE, decisions=decisions, final_bits={})


def of_children(kind: str, count: int, facts: MergeFacts) -> MergeFacts:
    found = tuple(replace(CHILD, path=VM / f"{kind}{index}") for index in range(count))
    return with_relatives(facts, **{kind: found})


def of_volumes(count: int) -> MergeFacts:
    return with_relatives(
        SINGLE, inactive=tuple(Path(f"/dev/vg/{index}") for index in range(count))
    )


def of_misfits(count: int) -> MergeFacts:
    """So many pairs that are out of order beyond those that are named."""
    facts = merge_of(overlays=count + 3)
    seen = times(facts, *(NOON - step * HOUR for step in range(count + 4)))
    return replace(facts, evidence=Evidence(seen))


def of_away(count: int) -> MergeFacts:
    facts = merge_of(overlays=count)
    for index, image in enumerate(facts.chain.images[:-1]):
        path = AWAY / image.path.name
        facts = with_image(facts, index, path=path, real_path=path)
    return facts


def missing(count: int) -> MergeFacts:
    room = replace(FILE, free_bytes=16 * MIB - count)
    return replace(SINGLE, volume=room)


COUNTED: Final[dict[str, tuple[Callable[[int], MergeFacts], MergeOptions]]] = {
    "snapshots that would change": (of_snapshots, MergeOptions()),
    "snapshots that go": (of_snapshots, MergeOptions(drop_snapshots=True)),
    "snapshots that are deleted": (of_snapshots, MergeOptions(delete=True)),
    "snapshots of a VM": (lambda n: of_snapshots(n, removable=False), MergeOptions()),
    "bitmaps": (of_bitmaps, MergeOptions()),
    "bitmaps above": (lambda n: of_bitmaps(n, above=True), MergeOptions(drop_bitmaps=True)),
    "siblings": (lambda n: of_children("siblings", n, SINGLE), MergeOptions()),
    "middle children": (
        lambda n: of_children("middle_children", n, merge_of(2)),
        MergeOptions(delete=True),
    ),
    "siblings of what a pull deletes": (
        lambda n: of_children("siblings", n, pull_of()),
        MergeOptions(delete=True),
    ),
    "images that a pull deletes": (
        lambda n: of_children("siblings", 2, pull_of(overlays=n)),
        MergeOptions(delete=True),
    ),
    "siblings that lose a name": (
        lambda n: of_children("siblings", n, replace(SINGLE, merged=True)),
        MergeOptions(keep_name=True),
    ),
    "volumes": (of_volumes, MergeOptions()),
    "volumes that are of no matter": (
        lambda n: replace(of_volumes(n), direction=Direction.PULL),
        MergeOptions(),
    ),
    "misfits": (of_misfits, MergeOptions()),
    "images away": (of_away, MergeOptions()),
    "places that are damaged": (
        lambda n: replace(SINGLE, result_check=replace(SOUND, corruptions=n)),
        MergeOptions(),
    ),
    "missing bytes": (missing, MergeOptions()),
    "clusters looked at": (
        lambda n: replace(SINGLE, evidence=base_written_last(SINGLE, held=n, differing=0)),
        MergeOptions(),
    ),
    "images between": (lambda n: merge_of(overlays=n + 1), MergeOptions()),
    "encrypted images": (
        lambda n: with_image(
            with_top(merge_of(2), header=header(crypt_method=CryptMethod.LUKS)),
            1,
            header=header(crypt_method=CryptMethod.LUKS if n > 1 else CryptMethod.NONE),
        ),
        MergeOptions(delete=True),
    ),
    "images that stay": (lambda n: pull_of(overlays=n), MergeOptions(keep_name=True)),
}
"""What can be one or several: the merge with so many of them."""

WRONG: Final = {
    ("missing bytes", 1): "1 bytes",
}
"""Words of today that do not fit the number. To be emptied, not to be added to."""

_ONE_AS_MANY: Final = re.compile(
    r"(?<![\d.'/-])1 (?:more |logical )?(?!is\b|has\b|was\b)[a-z]+s\b"
    r"|\b1 of 1 clusters"
    r"|\b(?:snapshots|bitmaps) '[^']*'(?!,| and )"
    r"|\b1 logical volume \([^)]*\)[^:;]*\bwere\b"
)
_MANY_AS_ONE: Final = re.compile(
    r"\b(?:snapshot|bitmap) '[^']*'(?:,| and )"
    r"|(?<![\d.'/-])(?<!version )(?:[2-9]|\d\d+) (?:more |logical )?"
    r"(?:image|volume|snapshot|bitmap|cluster|place|byte)\b"
    r"|\S, \S+ cannot be deleted: it\b"
    r"|\S, \S+ stays as it is"
    r"|\d logical volumes \([^)]*\)[^:;]*\bwas\b"
)


def number_faults(text: str) -> list[str]:
    """The places where singular and plural do not fit what they count."""
    return [
        found[0] for pattern in (_ONE_AS_MANY, _MANY_AS_ONE) for found in pattern.finditer(text)
    ]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("what", COUNTED)
def test_singular_and_plural_fit_what_they_count(what: str, count: int) -> None:
    make, options = COUNTED[what]
    plan = make_plan(make(count), options)
    said = list(words_of(plan))
    assert said
    wrong = [text for text in said if number_faults(text)]
    known = WRONG.get((what, count))
    if known is None:
        assert not wrong
    else:
        assert any(known in text for text in wrong), "now right: take it off the list"
        assert all(known in text for text in wrong)


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [
        ("1 bytes are missing", True),
        ("1 byte is missing", False),
        ("11 bytes are missing", False),
        ("2 byte are missing", True),
        ("1 more images are like that", True),
        ("the internal snapshots 'a' of x", True),
        ("the internal snapshot 'a' of x", False),
        ("the internal snapshots 'a', 'b' of x", False),
        ("the internal snapshot 'a', 'b' of x", True),
        ("cannot hold the bitmaps 'a'", True),
        ("/a, /b cannot be deleted: it has other children", True),
        ("/a cannot be deleted: it has other children", False),
        ("15 of 16 clusters looked at", False),
    ],
)
def test_faults_of_number_are_seen(text: str, is_wrong: bool) -> None:
    assert bool(number_faults(text)) == is_wrong


def test_every_pair_of_counted_and_wrong_is_one_that_is_tried() -> None:
    assert set(WRONG) <= set(product(COUNTED, [1, 2]))
