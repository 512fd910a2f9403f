# SPDX-License-Identifier: Apache-2.0
"""The rules for bitmaps: one readable row for every situation, then every small chain."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import pytest

from chainmerge.bitmaps.rules import (
    BitmapState,
    Decision,
    Fate,
    Fault,
    LayerBitmaps,
    Occurrence,
    Rule,
    chain_test,
    decide,
    explain_tombstone,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME = "cp1"


def layer(image: str, occurrence: str) -> LayerBitmaps:
    """``valid``, ``disabled``, ``in-use``, ``absent``, ``tombstone``, ``cannot`` (raw or v2).

    ``valid/4096`` gives a granularity; 65536 otherwise. ``v2:in-use`` is a name in the
    bitmaps extension of a version 2 image, which must not have one.
    """
    rest = occurrence.removeprefix("v2:")
    supports_bitmaps = rest == occurrence
    word, _, granularity = rest.partition("/")
    if word in {"absent", "cannot"}:
        return LayerBitmaps(image, {}, supports_bitmaps=word == "absent")
    state = BitmapState.DISABLED if word == "tombstone" else BitmapState(word)
    empty = word == "tombstone"
    return LayerBitmaps(
        image, {NAME: Occurrence(state, int(granularity or 65536), empty)}, supports_bitmaps
    )


def decide_one(chain: str, *, above: bool, top_stays: bool) -> Decision | None:
    """``chain`` reads from the root up: ``base=valid top=absent``."""
    layers = [layer(*part.split("=")) for part in chain.split()]
    base_index = [part.image for part in layers].index("base")
    names_above = {NAME} if above else set()
    decisions = decide(layers, base_index, names_above, top_stays=top_stays)
    assert len(decisions) <= 1
    return decisions[0] if decisions else None


@dataclass(frozen=True)
class Row:
    situation: str
    chain: str
    fate: str
    rule: str
    sources: str = ""  # the images whose bits are united, lowest first
    granularity: int | None = None
    lost: bool = False  # a checkpoint that could be used is lost
    above: bool = False  # an image above top has the name
    top_stays: bool = False
    tombstone: str = ""  # "" none, "stays", "until top goes"
    unguarded: bool = False


KEPT = [
    Row(
        "valid in base and top",
        "base=valid top=valid",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=65536,
    ),
    Row(
        "valid in base and every merged image",
        "base=valid s1=valid s2=valid top=valid",
        "keep",
        "kept-everywhere",
        sources="base s1 s2 top",
        granularity=65536,
    ),
    Row(
        "valid further down too: the parents keep their own bits",
        "root=valid base=valid top=valid",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=65536,
    ),
    Row(
        "valid in one parent, absent below it",
        "root=absent p1=valid base=valid top=valid",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=65536,
    ),
    Row(
        "began in top",
        "base=absent top=valid",
        "keep",
        "kept-from-overlay",
        sources="top",
        granularity=65536,
    ),
    Row(
        "began in top, which has two images below it that know nothing",
        "base=absent s1=absent top=valid/4096",
        "keep",
        "kept-from-overlay",
        sources="top",
        granularity=4096,
    ),
    Row(
        "began in a middle image",
        "root=absent base=absent s1=absent s2=valid top=valid",
        "keep",
        "kept-from-overlay",
        sources="s2 top",
        granularity=65536,
    ),
    Row(
        "children carry it on: nothing changes for the rule",
        "base=absent top=valid",
        "keep",
        "kept-from-overlay",
        sources="top",
        granularity=65536,
        above=True,
        top_stays=True,
    ),
    Row(
        "granularities differ: base is the finest",
        "base=valid/4096 top=valid/65536",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=4096,
    ),
    Row(
        "granularities differ: a middle image is the finest",
        "base=valid/65536 s1=valid/512 top=valid/4096",
        "keep",
        "kept-everywhere",
        sources="base s1 top",
        granularity=512,
    ),
    Row(
        "granularity of a parent does not matter",
        "root=valid/512 base=valid/65536 top=valid/4096",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=4096,
    ),
    Row(
        "raw parent below a qcow2 base",
        "root=cannot base=valid top=valid",
        "keep",
        "kept-everywhere",
        sources="base top",
        granularity=65536,
    ),
]

STALE = [
    Row("in base, absent from top", "base=valid top=absent", "prune", "stale-in-base"),
    Row("disabled in base, absent from top", "base=disabled top=absent", "prune", "stale-in-base"),
    Row("in-use in base, absent from top", "base=in-use top=absent", "prune", "stale-in-base"),
    Row("in base, in-use in top", "base=valid top=in-use", "prune", "stale-in-base"),
    Row("in base, disabled in top", "base=valid top=disabled", "prune", "stale-in-base"),
    Row("in base and between, not top", "base=valid s1=valid top=absent", "prune", "stale-in-base"),
    Row(
        "stale and a child has the name: child and base are no longer kept apart by top's gap",
        "base=valid top=absent",
        "prune",
        "stale-in-base",
        above=True,
        tombstone="stays",
    ),
    Row(
        "crashed in top, and a child has the name",
        "base=valid top=in-use",
        "prune",
        "stale-in-base",
        above=True,
        tombstone="stays",
    ),
    Row(
        "stale, and top stays without the name",
        "base=valid top=absent",
        "prune",
        "stale-in-base",
        top_stays=True,
    ),
]

GAPS = [
    Row(
        "missing between",
        "base=valid s1=absent top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "present again below base",
        "root=valid base=absent top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "present again below base, disabled",
        "root=disabled base=absent top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "present again below base, in-use",
        "root=in-use base=absent s1=valid top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "valid in base and top, gap between the parents",
        "root=valid p1=absent base=valid top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "a tombstone below the gap",
        "base=tombstone s1=absent top=valid",
        "drop",
        "gap-below",
        tombstone="until top goes",
    ),
    Row(
        "gap, and a child has the name",
        "base=valid s1=absent top=valid",
        "drop",
        "gap-below",
        above=True,
        tombstone="stays",
    ),
    Row(
        "gap, and top stays",
        "base=valid s1=absent top=valid",
        "drop",
        "gap-below",
        top_stays=True,
        tombstone="stays",
    ),
]

BROKEN = [
    Row(
        "in-use in base",
        "base=in-use top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "disabled in base",
        "base=disabled top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "in-use between",
        "base=valid s1=in-use top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "disabled between, absent from base",
        "base=absent s1=disabled top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "disabled in the parent: the run goes on below base",
        "root=disabled base=valid top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "in-use two parents down",
        "root=in-use p1=valid base=valid top=valid",
        "drop",
        "broken-in-run",
        tombstone="until top goes",
    ),
    Row(
        "broken between, and a child has the name: the evidence goes away with the merge",
        "base=absent s1=in-use top=valid",
        "drop",
        "broken-in-run",
        above=True,
        tombstone="stays",
    ),
    Row(
        "an earlier merge left a tombstone, and top made the name anew",
        "base=tombstone top=valid",
        "drop",
        "broken-in-run",
        top_stays=True,
        tombstone="stays",
    ),
]

NOT_IN_TOP = [
    Row("in-use in top only", "base=absent top=in-use", "ignore", "not-valid-in-top"),
    Row("disabled in top only", "base=absent top=disabled", "ignore", "not-valid-in-top"),
    Row("middle only", "base=absent s1=valid top=absent", "ignore", "not-valid-in-top"),
    Row(
        "disabled in top, valid between",
        "base=absent s1=valid top=disabled",
        "ignore",
        "not-valid-in-top",
    ),
    Row(
        "in-use in top only, and a child has the name",
        "base=absent top=in-use",
        "drop",
        "not-valid-in-top",
        above=True,
        tombstone="stays",
    ),
    Row(
        "middle only, and a child has the name: top's gap goes away",
        "base=absent s1=valid top=absent",
        "drop",
        "not-valid-in-top",
        above=True,
        tombstone="stays",
    ),
    Row(
        "disabled in top, which stays: it speaks for itself",
        "base=absent top=disabled",
        "ignore",
        "not-valid-in-top",
        top_stays=True,
    ),
]

TOMBSTONES = [
    Row("nobody above has the name", "base=tombstone top=absent", "prune", "tombstone-spent"),
    Row(
        "a child still has the name",
        "base=tombstone top=absent",
        "prune",
        "tombstone-stands",
        above=True,
        tombstone="stays",
    ),
    Row(
        "top is a tombstone itself, a child has the name",
        "base=absent top=tombstone",
        "drop",
        "not-valid-in-top",
        above=True,
        tombstone="stays",
    ),
    Row(
        "top is a tombstone, base has bits",
        "base=valid top=tombstone",
        "prune",
        "stale-in-base",
        above=True,
        tombstone="stays",
    ),
]

BASE_CANNOT_HOLD = [
    Row(
        "valid in top",
        "base=cannot top=valid",
        "drop",
        "base-cannot-hold",
        lost=True,
    ),
    Row(
        "valid in top and in a child",
        "base=cannot top=valid",
        "drop",
        "base-cannot-hold",
        lost=True,
        above=True,
        unguarded=True,
    ),
    Row(
        "valid in top, which stays right on its own",
        "base=cannot top=valid",
        "drop",
        "base-cannot-hold",
        lost=True,
        top_stays=True,
    ),
    Row(
        "top stays, but would lose what the middle image recorded",
        "base=cannot s1=valid top=valid",
        "drop",
        "base-cannot-hold",
        lost=True,
        top_stays=True,
        unguarded=True,
    ),
    Row(
        "bitmaps in a version 2 base cannot be trusted, and top stays",
        "base=v2:in-use top=valid",
        "drop",
        "broken-in-run",
        top_stays=True,
        unguarded=True,
    ),
    Row(
        "crashed in top: nothing to lose",
        "base=cannot top=in-use",
        "ignore",
        "not-valid-in-top",
    ),
    Row(
        "crashed in top, and a child has the name: nothing to lose, but a false checkpoint",
        "base=cannot top=in-use",
        "drop",
        "not-valid-in-top",
        above=True,
        unguarded=True,
    ),
    Row(
        "broken between: was lost already",
        "base=cannot s1=in-use top=valid",
        "drop",
        "broken-in-run",
    ),
    Row(
        "version 2 base over a parent that has the name: a gap already",
        "root=valid base=cannot top=valid",
        "drop",
        "gap-below",
    ),
]

TABLE = {
    "kept": KEPT,
    "stale": STALE,
    "gap": GAPS,
    "broken": BROKEN,
    "not valid in top": NOT_IN_TOP,
    "tombstone": TOMBSTONES,
    "base cannot hold": BASE_CANNOT_HOLD,
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
    decision = decide_one(row.chain, above=row.above, top_stays=row.top_stays)
    assert decision is not None
    images = [part.partition("=")[0] for part in row.chain.split()]
    tombstone = {
        (False, False): "",
        (False, True): "until top goes",
        (True, True): "stays",
    }[decision.tombstone, decision.tombstone_while_top_exists]
    assert row == replace(
        row,
        fate=decision.fate,
        rule=decision.rule,
        sources=" ".join(images[index] for index in decision.sources),
        granularity=decision.granularity,
        lost=decision.loses_valid_checkpoint,
        tombstone=tombstone,
        unguarded=decision.unguarded,
    )


def test_every_rule_and_every_fate_has_a_row() -> None:
    rows = [row for group in TABLE.values() for row in group]
    assert {row.rule for row in rows} == set(Rule)
    assert {row.fate for row in rows} == set(Fate)


def test_names_outside_of_the_merged_range_need_no_decision() -> None:
    assert decide_one("root=valid base=absent top=absent", above=True, top_stays=True) is None


def test_decisions_are_sorted_and_independent() -> None:
    valid = Occurrence(BitmapState.VALID, 65536, None)
    base = LayerBitmaps("base", {"z": valid, "a": valid, "-x": valid}, supports_bitmaps=True)
    top = LayerBitmaps("top", {"z": valid, "m'\"": valid}, supports_bitmaps=True)
    decisions = decide([base, top], 0, {"a"}, top_stays=False)
    assert [(d.name, str(d.fate), d.tombstone) for d in decisions] == [
        ("-x", "prune", False),
        ("a", "prune", True),
        ("m'\"", "keep", False),
        ("z", "keep", False),
    ]


@pytest.mark.parametrize("base_index", [-1, 1, 2])
def test_base_must_be_below_top(base_index: int) -> None:
    chain = [layer("base", "valid"), layer("top", "valid")]
    with pytest.raises(ValueError, match="is not below the top of a chain of 2 images"):
        decide(chain, base_index, (), top_stays=True)


@pytest.mark.parametrize(
    ("chain", "above", "top_stays", "reason"),
    [
        (
            "base=valid s1=valid top=valid",
            False,
            False,
            "'cp1' is valid in base, s1 and top: their union is kept",
        ),
        (
            "base=absent top=valid",
            False,
            False,
            "'cp1' is valid in top and not in any image below: base takes it over",
        ),
        (
            "base=valid top=absent",
            False,
            False,
            "stale: 'cp1' is in base but absent from top, so no chain that reads top can use it",
        ),
        (
            "base=valid top=in-use",
            True,
            False,
            (
                "stale: 'cp1' is in base but in-use in top, so no chain that reads top can use it; "
                "a tombstone is left in base because images above still have the name"
            ),
        ),
        (
            "base=valid s1=absent top=valid",
            False,
            True,
            (
                "'cp1' is valid in top and present again (valid) in base, "
                "but absent from s1 between them: "
                "what was written while s1 was active is recorded nowhere; "
                "a tombstone is left in base because top has the name"
            ),
        ),
        (
            "root=disabled base=valid top=valid",
            False,
            False,
            "'cp1' is valid in top but disabled in root: what was written after that is missing",
        ),
        (
            "base=in-use top=valid",
            False,
            False,
            (
                "'cp1' is valid in top but in-use in base: it was not stored properly and its bits "
                "are worthless"
            ),
        ),
        (
            "base=tombstone top=valid",
            False,
            False,
            "'cp1' is valid in top but a tombstone in base: the checkpoint was found broken before",
        ),
        (
            "base=absent s1=valid top=absent",
            False,
            False,
            "'cp1' is in s1 but absent from top, so no chain that reads top can use it",
        ),
        (
            "base=absent top=in-use",
            False,
            False,
            "'cp1' is in-use in top, so no chain that reads top can use it",
        ),
        (
            "base=tombstone top=absent",
            True,
            False,
            "'cp1' in base is a tombstone and stays one, because images above still have the name",
        ),
        (
            "base=tombstone top=absent",
            False,
            False,
            "'cp1' in base is a tombstone, and no image above top has the name any more",
        ),
        (
            "base=cannot top=valid",
            True,
            False,
            (
                "base is raw or qcow2 version 2 and cannot hold bitmaps, so the valid checkpoint "
                "'cp1' is lost; remove it from the images above, where it would pass for valid but "
                "is not"
            ),
        ),
    ],
)
def test_reasons_in_words(chain: str, above: bool, top_stays: bool, reason: str) -> None:
    decision = decide_one(chain, above=above, top_stays=top_stays)
    assert decision is not None
    assert decision.reason == reason


def test_names_from_hostile_images_cannot_reach_the_terminal_raw() -> None:
    name = "cp\x1b[2J\n\udcff"
    broken = Occurrence(BitmapState.IN_USE, 65536, None)
    chain = [LayerBitmaps(i, {name: broken}, supports_bitmaps=True) for i in ("base", "top")]
    (decision,) = decide(chain, 0, (), top_stays=False)
    assert decision.name == name
    assert decision.reason.isprintable()


def test_tombstones_are_explained() -> None:
    assert "incremental backup" in explain_tombstone()


# Every small chain.

LETTER = {"V": "valid", "D": "disabled", "I": "in-use", "A": "absent"}
STATE = {letter: BitmapState(word) for letter, word in LETTER.items()}
STATES = tuple(BitmapState)
VALID, DISABLED, ABSENT = BitmapState.VALID, BitmapState.DISABLED, BitmapState.ABSENT
TO_LETTER = {state: letter for letter, state in STATE.items()}


def passes(from_leaf_down: Sequence[BitmapState]) -> bool:
    """The chain test, written a second way."""
    return re.fullmatch("V+A*", "".join(TO_LETTER[s] for s in from_leaf_down)) is not None


@pytest.mark.parametrize(
    ("states", "fault", "depth", "culprit", "reason"),
    [
        ("V", None, 1, None, "valid in 1 image"),
        ("VVA", None, 2, None, "valid in 2 images"),
        ("", Fault.ABSENT_FROM_ACTIVE, 0, None, "absent from the active image"),
        ("AV", Fault.ABSENT_FROM_ACTIVE, 0, None, "absent from the active image"),
        ("DV", Fault.NOT_VALID_IN_ACTIVE, 0, 0, "disabled in the active image"),
        ("VI", Fault.BROKEN_BELOW, 1, 1, "in-use 1 level below the active image"),
        (
            "VVAAD",
            Fault.GAP,
            2,
            4,
            "absent 2 levels below the active image but present again (disabled) 4 levels below it",
        ),
    ],
)
def test_chain_test(
    states: str, fault: Fault | None, depth: int, culprit: int | None, reason: str
) -> None:
    verdict = chain_test([STATE[letter] for letter in states])
    assert (verdict.fault, verdict.depth, verdict.culprit) == (fault, depth, culprit)
    assert verdict.reason == reason


def test_chain_test_agrees_with_its_other_form_on_every_chain_of_six() -> None:
    for length in range(1, 7):
        for states in product(STATES, repeat=length):
            assert chain_test(states).passes == passes(states)


@dataclass(frozen=True)
class Merge:
    """One merge of one name; states are listed from the root up, ``above`` from top up."""

    below: tuple[BitmapState, ...]
    base: BitmapState
    overlays: tuple[BitmapState, ...]
    above: bool
    top_stays: bool
    base_holds: bool

    @property
    def states(self) -> tuple[BitmapState, ...]:
        return (*self.below, self.base, *self.overlays)

    @property
    def decision(self) -> Decision | None:
        layers = [
            LayerBitmaps(
                f"image{index}",
                {NAME: Occurrence(state, 65536, None)} if state is not ABSENT else {},
                supports_bitmaps=self.base_holds or index != len(self.below),
            )
            for index, state in enumerate(self.states)
        ]
        names = {NAME} if self.above else set()
        found = decide(layers, len(self.below), names, top_stays=self.top_stays)
        return found[0] if found else None

    @property
    def base_during(self) -> BitmapState:
        """Base's state from the first switch on: no kept name has its result yet."""
        decision = self.decision
        if decision is None:
            return ABSENT
        if decision.fate is Fate.KEEP:
            return ABSENT if self.base is ABSENT else DISABLED
        return DISABLED if decision.tombstone_while_top_exists else ABSENT

    @property
    def base_stored(self) -> BitmapState:
        """Base's state from the second switch until top is gone."""
        if self.decision is not None and self.decision.fate is Fate.KEEP:
            return VALID
        return self.base_during

    @property
    def base_settled(self) -> BitmapState:
        decision = self.decision
        if decision is None:
            return ABSENT
        if decision.fate is Fate.KEEP:
            return VALID
        return DISABLED if decision.tombstone else ABSENT


def merges(*, base_holds: bool) -> Iterator[Merge]:
    for length in range(2, 6):
        for states in product(STATES, repeat=length):
            for base_index in range(length - 1):
                if not base_holds and states[base_index] is not ABSENT:
                    continue
                below, base = states[:base_index], states[base_index]
                overlays = states[base_index + 1 :]
                for above, top_stays in product((False, True), repeat=2):
                    yield Merge(below, base, overlays, above, top_stays, base_holds)


def images_above(merge: Merge) -> Iterator[tuple[BitmapState, ...]]:
    """Every chain of one or two images on top of top that fits ``merge.above``."""
    for length in (1, 2):
        for states in product(STATES, repeat=length):
            if merge.above == any(state is not ABSENT for state in states):
                yield states


def seen_from_leaf(*root_up: Sequence[BitmapState]) -> list[BitmapState]:
    return [state for part in root_up for state in part][::-1]


def readers_before_and_after(merge: Merge) -> Iterator[tuple[str, bool, bool]]:
    """For every image that can be started: passes before, passes at a moment of the merge."""
    below, overlays = merge.below, merge.overlays
    during, stored, settled = (merge.base_during,), (merge.base_stored,), (merge.base_settled,)
    top = overlays[-1:]
    top_before = passes(merge.states[::-1])
    yield "top, copying", top_before, passes(seen_from_leaf(below, during, overlays))
    yield "top, stored", top_before, passes(seen_from_leaf(below, stored, overlays))
    yield "base, settled", top_before, passes(seen_from_leaf(below, settled))
    if merge.top_stays:
        yield "top, in place", top_before, passes(seen_from_leaf(below, settled, overlays))
        yield "top, re-pointed", top_before, passes(seen_from_leaf(below, settled, top))
    for above in images_above(merge):
        before = passes(seen_from_leaf(merge.states, above))
        yield "above, copying", before, passes(seen_from_leaf(below, during, overlays, above))
        yield "above, stored", before, passes(seen_from_leaf(below, stored, overlays, above))
        yield "above, partly settled", before, passes(seen_from_leaf(below, stored, above))
        yield "above, settled", before, passes(seen_from_leaf(below, settled, above))


def test_no_merge_of_a_small_chain_makes_a_false_checkpoint_at_any_moment() -> None:
    for merge in merges(base_holds=True):
        for reader, before, after in readers_before_and_after(merge):
            assert before or not after, (reader, merge, merge.decision)


def test_no_merge_of_a_small_chain_loses_a_checkpoint() -> None:
    settled = {"base, settled", "top, re-pointed", "above, settled"}
    for merge in merges(base_holds=True):
        for reader, before, after in readers_before_and_after(merge):
            if reader in settled:
                assert after or not before, (reader, merge, merge.decision)


def test_bits_are_taken_from_exactly_the_merged_images_that_have_the_name() -> None:
    for merge in merges(base_holds=True):
        decision = merge.decision
        if decision is None:
            assert set(merge.states[len(merge.below) :]) == {ABSENT}
            continue
        assert decision.states == merge.states
        assert decision.was_valid == passes(merge.states[::-1])
        assert (decision.fate is Fate.KEEP) == decision.was_valid
        present = tuple(
            index
            for index, state in enumerate(merge.states)
            if index >= len(merge.below) and state is not ABSENT
        )
        assert decision.sources == (present if decision.fate is Fate.KEEP else ())
        assert (decision.granularity is None) == (decision.fate is not Fate.KEEP)
        assert decision.tombstone_while_top_exists or not decision.tombstone
        assert not decision.unguarded


def test_a_tombstone_is_only_left_where_somebody_still_has_the_name() -> None:
    for merge in merges(base_holds=True):
        decision = merge.decision
        if decision is not None and decision.tombstone:
            assert merge.above or (merge.top_stays and merge.overlays[-1] is VALID)


def test_a_false_checkpoint_over_a_base_without_bitmaps_is_always_reported() -> None:
    for merge in merges(base_holds=False):
        decision = merge.decision
        if decision is None:
            continue
        assert decision.fate is not Fate.KEEP
        assert not decision.tombstone
        assert not decision.tombstone_while_top_exists
        # Images above that pass with any merged image's bits gone are false, whether they
        # passed before or not; top on its own is right if no other image had bits.
        harmed = [
            passes(seen_from_leaf(merge.below, (ABSENT,), above)) for above in images_above(merge)
        ]
        others = any(state is not ABSENT for state in merge.overlays[:-1])
        top_harmed = merge.top_stays and others
        top_harmed &= passes(seen_from_leaf(merge.below, (ABSENT,), merge.overlays[-1:]))
        assert decision.unguarded or not (any(harmed) or top_harmed), (merge, decision)


def test_a_finished_merge_run_again_changes_nothing() -> None:
    """Top is re-pointed at base, and so are the images that were above top."""
    for merge in merges(base_holds=True):
        if not merge.top_stays:
            continue
        again = replace(merge, base=merge.base_settled, overlays=merge.overlays[-1:])
        assert again.base_settled == merge.base_settled, (merge, merge.decision, again.decision)


def test_a_merge_killed_while_copying_and_planned_afresh_makes_no_false_checkpoint() -> None:
    """Without what was saved beside base, checkpoints are lost then, but none gets false."""
    for merge in merges(base_holds=True):
        again = replace(merge, base=merge.base_during)
        was_valid = passes(merge.states[::-1])
        for reader, _, after in readers_before_and_after(again):
            if reader.startswith(("top", "base")):
                assert was_valid or not after, (reader, merge, again.decision)
