# SPDX-License-Identifier: Apache-2.0
"""Which snapshots go and which stay: the rules, without any image."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from chainmerge.arithmetic.durations import SECONDS_IN, seconds_of, spelled_duration
from chainmerge.bitmaps.rules import BitmapState, LayerBitmaps, Occurrence
from chainmerge.documents.retention import RetentionRule, SnapshotFate
from chainmerge.inventory.retention import Span, ViewFacts, ages_of, judge, spans_of
from chainmerge.inventory.thinning import checkpoints_by_snapshot
from chainmerge.options import NoRetentionRule, OptionUnusable, Retention

NOW = 1_000_000.0
DAY = 86_400
RULES = RetentionRule


def snapshots(count: int = 5) -> list[ViewFacts]:
    """One a day, the uppermost one from a day ago."""
    return [
        ViewFacts(f"/images/s{number}.qcow2", written=NOW - (count - number) * DAY)
        for number in range(count)
    ]


@dataclass(frozen=True)
class Row:
    """What is told of some snapshots, and what must become of all five, from the root up."""

    about: str
    retention: Retention
    rules: str
    changes: dict[int, ViewFacts] = field(default_factory=dict)
    held: dict[int, str] = field(default_factory=dict)


def changed(number: int, **facts: object) -> dict[int, ViewFacts]:
    return {number: replace(snapshots()[number], **facts)}


LETTERS = {
    "-": RULES.NO_RULE,
    "l": RULES.KEEP_LAST,
    "w": RULES.KEEP_WITHIN,
    "p": RULES.KEEP,
    "c": RULES.KEEP_CHECKPOINTS,
    "?": RULES.AGE_UNKNOWN,
    "b": RULES.OTHER_BRANCH,
    "u": RULES.IN_USE,
    "h": RULES.BITMAPS,
    "x": RULES.NOT_REMOVABLE,
}
LAST = Retention(keep_last=1)
ROWS = [
    Row("the last ones are the uppermost ones", Retention(keep_last=2), "---ll"),
    Row("none is kept", Retention(keep_last=0), "-----"),
    Row("more than there are", Retention(keep_last=9), "lllll"),
    Row("exactly as old as allowed", Retention(keep_within=2 * DAY), "---ww"),
    Row("a little younger than the fourth", Retention(keep_within=2 * DAY - 1), "----w"),
    Row("by name", Retention(keep=("s[13].*",)), "-p-p-"),
    Row("a name is matched in whole", Retention(keep=("s1", "1.qcow2", "S2*")), "-----"),
    Row("what any rule keeps stays", Retention(1, 2 * DAY, ("s0*",)), "p--wl"),
    Row("no rule is about checkpoints", LAST, "----l", changed(2, checkpoints=("cp",))),
    Row("one is", Retention(1, keep_checkpoints=True), "--c-l", changed(2, checkpoints=("cp",))),
    Row("another branch", LAST, "--b-l", changed(2, branches=("/images/other.qcow2",))),
    Row("a device", LAST, "x---l", changed(0, not_removable="it is a block device")),
    Row("what would lose a checkpoint", LAST, "h---l", held={0: "base is raw"}),
    Row(
        "no age, and no rule that asks for it",
        LAST,
        "----l",
        {number: replace(one, written=None) for number, one in enumerate(snapshots())},
    ),
    Row(
        "no age, and a rule that asks for it",
        Retention(keep_within=DAY),
        "?????",
        {number: replace(one, written=None) for number, one in enumerate(snapshots())},
    ),
    Row(
        "a merge has written to it since: it is as old as the next one",
        Retention(keep_within=2.5 * DAY),
        "---ww",
        changed(1, written=NOW - 60),
    ),
    Row(
        "no age of its own, and the next one is too old",
        Retention(keep_within=1.5 * DAY),
        "----w",
        changed(2, written=None),
    ),
    Row(
        "in use, so the one below it cannot become one with it",
        LAST,
        "-uu-l",
        changed(2, in_use="it is locked"),
    ),
    Row(
        "in use, and kept: nothing can become one with it",
        LAST,
        "---ul",
        changed(4, in_use="it is locked"),
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.about)
def test_rows(row: Row) -> None:
    facts = [row.changes.get(number, one) for number, one in enumerate(snapshots())]
    fates = judge(facts, row.retention, NOW, row.held)
    assert [one.rule for one in fates] == [LETTERS[letter] for letter in row.rules]
    assert all(one.stays == (one.rule is not RULES.NO_RULE) for one in fates)
    assert all(one.reason for one in fates)


FATES = st.lists(st.booleans(), max_size=12).map(
    lambda stays: tuple(
        SnapshotFate(
            f"/s{number}", None, None, one, RULES.KEEP if one else RULES.NO_RULE, "because"
        )
        for number, one in enumerate(stays)
    )
)


@given(FATES)
def test_each_that_goes_is_in_one_range_and_all_that_stay_are_shown(
    fates: tuple[SnapshotFate, ...],
) -> None:
    spans = spans_of(fates)
    gone = [index for span in spans for index in range(span.base, span.top)]
    assert sorted(gone) == [index for index, one in enumerate(fates) if not one.stays]
    # What a range shows afterwards is what its top shows, which is the leaf or stays.
    assert all(span.top == len(fates) or fates[span.top].stays for span in spans)
    # No image is in two of them, and the uppermost one is the first.
    assert all(lower.top < upper.base for upper, lower in itertools.pairwise(spans))


FACTS = st.lists(
    st.builds(
        ViewFacts,
        path=st.sampled_from(("/i/daily-1.qcow2", "/i/weekly-1.qcow2", "/i/x.raw")),
        written=st.one_of(st.none(), st.floats(0, NOW)),
        branches=st.sampled_from(((), (), ("/i/other.qcow2",))),
        in_use=st.sampled_from((None, None, None, "it is in use")),
        not_removable=st.sampled_from((None, None, None, "it is a device")),
        checkpoints=st.sampled_from(((), ("cp",))),
    ),
    max_size=8,
)
RETENTION = st.builds(
    Retention,
    keep_last=st.integers(0, 9),
    keep_within=st.one_of(st.none(), st.floats(0, NOW)),
    keep=st.sampled_from(((), ("daily-*",), ("*.raw", "weekly-*"))),
    keep_checkpoints=st.booleans(),
)


@given(FACTS, RETENTION)
def test_nothing_goes_that_anybody_needs(facts: list[ViewFacts], retention: Retention) -> None:
    fates = judge(facts, retention, NOW)
    times = ages_of(facts)
    for index, (one, fate) in enumerate(zip(facts, fates, strict=True)):
        name = one.path.removeprefix("/i/")
        within, time = retention.keep_within, times[index]
        needed = (
            bool(one.branches or one.in_use or one.not_removable),
            index >= len(facts) - (retention.keep_last or 0),
            retention.keep_checkpoints and bool(one.checkpoints),
            within is not None and (time is None or time >= NOW - within),
            "daily-*" in retention.keep and name.startswith("daily-"),
        )
        if any(needed):
            assert fate.stays
    for span in spans_of(fates):
        touched = facts[span.base : span.top + 1]
        assert not any(one.in_use for one in touched)


@given(FACTS, RETENTION, RETENTION)
def test_more_rules_keep_more(facts: list[ViewFacts], one: Retention, other: Retention) -> None:
    both = Retention(
        keep_last=max(one.keep_last or 0, other.keep_last or 0),
        keep_within=max(
            (r.keep_within for r in (one, other) if r.keep_within is not None), default=None
        ),
        keep=(*one.keep, *other.keep),
        keep_checkpoints=one.keep_checkpoints or other.keep_checkpoints,
    )
    kept = {index for index, fate in enumerate(judge(facts, both, NOW)) if fate.stays}
    alone = {index for index, fate in enumerate(judge(facts, one, NOW)) if fate.stays}
    # What stays as its neighbour is in use can become one with another neighbour.
    assert {i for i in alone - kept if not _is_beside_one_in_use(facts, i)} == set()


def _is_beside_one_in_use(facts: list[ViewFacts], index: int) -> bool:
    return any(one.in_use for one in facts[index + 1 :])


@given(FACTS)
def test_none_is_younger_than_the_next_one(facts: list[ViewFacts]) -> None:
    times = ages_of(facts)
    for lower, upper in itertools.pairwise(times):
        assert upper is None or (lower is not None and lower <= upper)


def layer(**states: BitmapState) -> LayerBitmaps:
    occurrences = {name: Occurrence(state, 65536, None) for name, state in states.items()}
    return LayerBitmaps("image", occurrences, supports_bitmaps=True)


def test_a_checkpoint_begins_at_the_snapshot_below_its_lowest_image() -> None:
    valid, broken = BitmapState.VALID, BitmapState.DISABLED
    layers = [
        layer(old=valid, first=valid),
        layer(first=valid, stale=valid),
        layer(first=valid, second=valid, broken=broken),
        layer(first=valid, second=valid, third=valid, broken=valid),
    ]
    # "first" begins in the root, below which there is nothing.
    assert checkpoints_by_snapshot(layers) == {1: ("second",), 2: ("third",)}


def test_at_least_one_rule_has_to_be_given() -> None:
    for none in ({}, {"keep_checkpoints": True}, {"keep": ()}):
        with pytest.raises(NoRetentionRule):
            Retention(**none)
    for odd in ({"keep_last": -1}, {"keep_last": True}, {"keep_within": -1}, {"keep": ("",)}):
        with pytest.raises(OptionUnusable):
            Retention(**odd)


@given(st.integers(0, 10**9))
def test_durations_are_spelled_as_they_are_read(seconds: int) -> None:
    assert seconds_of(spelled_duration(seconds)) == seconds


def test_durations() -> None:
    assert [seconds_of(text) for text in ("7d", "12H", "4w", "90m", "1s")] == [
        7 * DAY,
        43_200,
        28 * DAY,
        5_400,
        1,
    ]
    for odd in ("", "7", "d", "-1d", "1.5d", "7 d", "7days", "²d", "9" * 13 + "d"):
        assert seconds_of(odd) is None
    assert spelled_duration(0.5) == "1s"
    assert list(SECONDS_IN) == ["w", "d", "h", "m", "s"]


def test_spans() -> None:
    fates = judge(snapshots(6), Retention(keep=("s2*", "s3*")), NOW)
    assert spans_of(fates) == (Span(4, 6), Span(0, 2))
