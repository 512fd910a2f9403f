# SPDX-License-Identifier: Apache-2.0
"""Random lives of a disk in memory, and proof that they find what they are for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from msgspec.structs import replace

from chainmerge.bitmaps.rules import BitmapState, Decision, Fate, LayerBitmaps, decide
from tests.model.broken_rules import changed, without_tombstones
from tests.model.disk_history import (
    Backend,
    ChangedCheckpoint,
    DiskHistory,
    FalseCheckpoint,
    HistoryViolated,
    LostCheckpoint,
)
from tests.model.lockstep import BackendsDiffer, Lockstep
from tests.model.machine import DiskHistoryMachine
from tests.model.memory import Decide, MemoryBackend
from tests.model.stories import STORIES, Story, gap_goes_away

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

PATIENT = settings(deadline=None, suppress_health_check=list(HealthCheck), stateful_step_count=30)


def test_random_lives() -> None:
    run_state_machine_as_test(DiskHistoryMachine, settings=settings(PATIENT, max_examples=400))


@pytest.mark.soak
def test_thousands_of_random_lives() -> None:
    run_state_machine_as_test(DiskHistoryMachine, settings=settings(PATIENT, max_examples=5_000))


# What the histories would find, if the rules were other than they are.


def without_passing_tombstones(decision: Decision) -> Decision:
    return replace(decision, tombstone_while_top_exists=decision.tombstone)


def with_bits_of_top_only(decision: Decision) -> Decision:
    return replace(decision, sources=decision.sources[-1:])


def with_bits_of_base_only(decision: Decision) -> Decision:
    return replace(decision, sources=decision.sources[:1])


def with_granularity_of_the_coarsest(decision: Decision) -> Decision:
    return replace(decision, granularity=decision.granularity and 4)


def losing_what_began_in_an_overlay(decision: Decision) -> Decision:
    if decision.rule == "kept-from-overlay":
        return replace(
            decision,
            fate=Fate.DROP,
            was_valid=False,
            tombstone=True,
            tombstone_while_top_exists=True,
        )
    return decision


def heedless_of_a_base_that_cannot_hold_bitmaps(decision: Decision) -> Decision:
    return replace(decision, unguarded=False)


def blind_to_parents(
    chain: Sequence[LayerBitmaps],
    base_index: int,
    names_above: Collection[str],
    *,
    top_stays: bool,
) -> tuple[Decision, ...]:
    decisions = decide(chain[base_index:], 0, names_above, top_stays=top_stays)
    return tuple(
        replace(decision, sources=tuple(base_index + index for index in decision.sources))
        for decision in decisions
    )


def blind_to_images_above(
    chain: Sequence[LayerBitmaps],
    base_index: int,
    names_above: Collection[str],
    *,
    top_stays: bool,
) -> tuple[Decision, ...]:
    return decide(chain, base_index, (), top_stays=top_stays)


def blind_to_a_top_that_stays(
    chain: Sequence[LayerBitmaps],
    base_index: int,
    names_above: Collection[str],
    *,
    top_stays: bool,
) -> tuple[Decision, ...]:
    decisions = decide(chain, base_index, names_above, top_stays=False)
    return tuple(without_passing_tombstones(decision) for decision in decisions)


def machine_with(otherwise: Decide) -> type[DiskHistoryMachine]:
    class Machine(DiskHistoryMachine):
        def make_backend(self, variety: int) -> Backend:
            return MemoryBackend(otherwise)

    return Machine


@pytest.mark.parametrize(
    ("otherwise", "violation"),
    [
        pytest.param(changed(without_tombstones), FalseCheckpoint, id="no tombstones"),
        pytest.param(
            changed(without_passing_tombstones), FalseCheckpoint, id="none until top is gone"
        ),
        pytest.param(blind_to_parents, FalseCheckpoint, id="parents not looked at"),
        pytest.param(blind_to_images_above, FalseCheckpoint, id="images above not looked at"),
        pytest.param(blind_to_a_top_that_stays, FalseCheckpoint, id="top that stays forgotten"),
        pytest.param(changed(with_bits_of_top_only), HistoryViolated, id="bits of top only"),
        pytest.param(changed(with_bits_of_base_only), HistoryViolated, id="bits of base only"),
        pytest.param(
            changed(with_granularity_of_the_coarsest), ChangedCheckpoint, id="coarse granularity"
        ),
        pytest.param(
            changed(losing_what_began_in_an_overlay), LostCheckpoint, id="overlay's own names lost"
        ),
        pytest.param(
            changed(heedless_of_a_base_that_cannot_hold_bitmaps),
            FalseCheckpoint,
            id="raw base not guarded",
        ),
    ],
)
def test_random_lives_find_a_broken_rule(
    otherwise: Decide, violation: type[HistoryViolated]
) -> None:
    search = settings(
        PATIENT, max_examples=20_000, derandomize=True, database=None, phases=(Phase.generate,)
    )
    with pytest.raises(violation):
        run_state_machine_as_test(machine_with(otherwise), settings=search)


# The traps, one by one.


@pytest.mark.parametrize(("story", "leaf"), STORIES)
def test_a_broken_checkpoint_stays_broken(story: Story, leaf: str) -> None:
    history = story(MemoryBackend())
    history.check()
    assert history.checkpoints(leaf) == {}
    assert history.backend.bitmaps(leaf)["cp1"].state is BitmapState.VALID
    tombstone = history.backend.bitmaps("image0")["cp1"]
    assert (tombstone.state, tombstone.dirty) == (BitmapState.DISABLED, frozenset())


@pytest.mark.parametrize(("story", "leaf"), STORIES)
def test_without_tombstones_it_becomes_a_false_one(story: Story, leaf: str) -> None:
    with pytest.raises(FalseCheckpoint, match=f"cp1 passes in {leaf} but misses the writes to"):
        story(MemoryBackend(changed(without_tombstones))).check()


def test_a_tombstone_goes_when_nobody_above_has_the_name() -> None:
    history = gap_goes_away(MemoryBackend())
    history.snapshot()
    history.remove_bitmap("image3", "cp1")
    history.remove_bitmap("image2", "cp1")
    assert history.merge("image0", "image2")
    assert dict(history.backend.bitmaps("image0")) == {}


def test_top_has_no_false_checkpoint_while_the_merge_runs() -> None:
    """Nothing above, and top will go: only a kill in the middle would show it."""

    def merge_over_a_broken_base(otherwise: Decide) -> DiskHistory:
        history = DiskHistory(MemoryBackend(otherwise), 8, raw_root=False)
        history.checkpoint("cp1", 1)
        history.guest_write(0, 1)
        history.snapshot()
        history.disable_bitmap("image0", "cp1")
        history.merge("image0", "image1")
        return history

    history = merge_over_a_broken_base(decide)
    assert dict(history.backend.bitmaps("image0")) == {}
    with pytest.raises(FalseCheckpoint, match="cp1 passes in image1"):
        merge_over_a_broken_base(changed(without_passing_tombstones))


@pytest.mark.parametrize("top_stays", [False, True])
def test_a_checkpoint_over_a_raw_base_is_refused_or_given_up_everywhere(top_stays: bool) -> None:
    history = DiskHistory(MemoryBackend(), 8, raw_root=True)
    history.snapshot()
    history.checkpoint("cp1", 1)
    history.guest_write(0, 1)
    history.snapshot()
    assert not history.merge("image0", "image1", top_stays=top_stays)
    assert history.checkpoints("image2") == {"cp1": {0}}
    assert history.merge("image0", "image1", top_stays=top_stays, give_up_checkpoints=True)
    history.check()
    assert dict(history.backend.bitmaps("image2")) == {}


def test_a_name_that_began_in_top_stays_usable_in_a_top_that_stays() -> None:
    history = DiskHistory(MemoryBackend(), 8, raw_root=False)
    history.snapshot()
    history.snapshot()
    history.checkpoint("cp1", 2)
    history.guest_write(0, 1)
    assert history.merge("image0", "image2", top_stays=True)
    assert history.backing["image2"] == "image0"
    assert history.checkpoints("image2") == history.checkpoints("image0") == {"cp1": {0, 1}}


# The model itself.


def test_backends_in_lockstep_agree() -> None:
    class Machine(DiskHistoryMachine):
        def make_backend(self, variety: int) -> Backend:
            return Lockstep(MemoryBackend(), MemoryBackend())

    run_state_machine_as_test(Machine, settings=settings(PATIENT, max_examples=20))


@pytest.mark.parametrize(
    "otherwise",
    [
        pytest.param(changed(with_granularity_of_the_coarsest), id="bits"),
        pytest.param(changed(without_tombstones), id="tombstone"),
    ],
)
def test_backends_in_lockstep_show_a_difference(otherwise: Decide) -> None:
    history = DiskHistory(Lockstep(MemoryBackend(), MemoryBackend(otherwise)), 8, raw_root=False)
    history.checkpoint("cp1", 4)
    history.checkpoint("cp2", 1)
    history.snapshot()
    history.guest_write(0, 1)
    history.disable_bitmap("image0", "cp1")
    with pytest.raises(BackendsDiffer):
        history.merge("image0", "image1", top_stays=True)


def test_a_removal_that_would_deceive_by_itself_does_not_happen() -> None:
    """A foreign tool can do that, but then no merge is to blame."""
    history = DiskHistory(MemoryBackend(), 8, raw_root=False)
    history.checkpoint("cp1", 1)
    history.guest_write(0, 1)
    history.snapshot()
    history.remove_bitmap("image0", "cp1")
    assert history.checkpoints("image1") == {"cp1": {0}}
    history.remove_bitmap("image1", "cp1")
    history.remove_bitmap("image0", "cp1")
    assert list(history.describe()) == [
        " image0 on nothing: no bitmaps",
        "*image1 on image0: no bitmaps",
    ]


def test_content_follows_the_guest_through_forks_and_merges() -> None:
    history = DiskHistory(MemoryBackend(), 8, raw_root=False)
    history.guest_write(0, 4)
    history.snapshot(grow=1)
    history.guest_write_zeroes(1, 1)
    history.guest_write(10, 1)
    assert history.backend.content("image1") == (2, 0, 2, 2, 0, 0, 0, 0, 0, 0, 3, 0)
    assert history.merge("image0", "image1")
    history.check()
    assert history.active == "image0"
    assert history.backend.content("image0") == (2, 0, 2, 2, 0, 0, 0, 0, 0, 0, 3, 0)
