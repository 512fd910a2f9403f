# SPDX-License-Identifier: Apache-2.0
"""The rules for bitmaps on every small chain, and the chain test that they rest on."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING, Final

import pytest
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.bitmaps.rules import (
    BitmapState,
    Decision,
    Fate,
    Fault,
    LayerBitmaps,
    Occurrence,
    chain_test,
    decide,
)
from tests.bitmaps.rows import NAME

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


LETTER = {"V": "valid", "D": "disabled", "I": "in-use", "A": "absent"}
STATE = {letter: BitmapState(word) for letter, word in LETTER.items()}
STATES = tuple(BitmapState)
VALID, DISABLED, ABSENT = BitmapState.VALID, BitmapState.DISABLED, BitmapState.ABSENT
TO_LETTER = {state: letter for letter, state in STATE.items()}


def passes(from_leaf_down: Sequence[BitmapState]) -> bool:
    """The chain test, written a second way."""
    return re.fullmatch("V+A*", "".join(TO_LETTER[s] for s in from_leaf_down)) is not None


CHAINS: Final = [
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
]
"""States from the leaf down, and what the chain test makes of them."""


@pytest.mark.parametrize(("states", "fault", "depth", "culprit", "reason"), CHAINS)
def test_chain_test(
    states: str, fault: Fault | None, depth: int, culprit: int | None, reason: str
) -> None:
    verdict = chain_test([STATE[letter] for letter in states])
    assert (verdict.fault, verdict.depth, verdict.culprit) == (fault, depth, culprit)
    assert verdict.reason == reason


def test_every_fault_has_a_row() -> None:
    assert {fault for _, fault, *_ in CHAINS} == {None, *Fault}


def test_chain_test_agrees_with_its_other_form_on_every_chain_of_six() -> None:
    for length in range(1, 7):
        for states in product(STATES, repeat=length):
            assert chain_test(states).passes == passes(states)


class Merge(Struct, frozen=True):
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
