# SPDX-License-Identifier: Apache-2.0
"""Random lives of a disk on real images, and proof that they find what they are for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.documents.progress import Stage
from tests.model.broken_rules import changed, without_tombstones
from tests.model.disk_history import (
    Backend,
    DiskHistory,
    Ending,
    FalseCheckpoint,
    HistoryViolated,
    KillPoint,
)
from tests.model.lockstep import Lockstep
from tests.model.machine import AbandonedMergesMachine, DiskHistoryMachine, KilledMergesMachine
from tests.model.memory import MemoryBackend
from tests.model.real import RealBackend, Workshop, scratch_directory
from tests.model.stories import STORIES, Story

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.options import EngineChoice

PATIENT = settings(deadline=None, suppress_health_check=list(HealthCheck), stateful_step_count=14)
MAX_IMAGES = 5
MAX_ACTIONS = 10


NATIVE_STAGES = (Stage.COPY, Stage.VERIFY, Stage.SETTLE)
QEMU_STAGES = (Stage.PRUNE, Stage.COPY, Stage.BITMAPS, Stage.SETTLE)
STAGES: list[tuple[EngineChoice, Stage]] = [
    *(("native", stage) for stage in NATIVE_STAGES),
    *(("qemu", stage) for stage in QEMU_STAGES),
]
each_engine = pytest.mark.parametrize("engine", ["native", "qemu"])


@pytest.fixture
def engine() -> EngineChoice:
    """Who merges, in tests that do not try both."""
    return "native"


@pytest.fixture
def workshop(engine: EngineChoice) -> Iterator[Workshop]:
    with scratch_directory() as directory, Workshop(Path(directory), engine) as workshop:
        yield workshop


def real_machine(workshop: Workshop) -> type[KilledMergesMachine]:
    """Lives of which the images and the model must tell the same, bit by bit."""

    class Machine(KilledMergesMachine):
        max_images = MAX_IMAGES

        def make_backend(self, variety: int) -> Backend:
            self.real = workshop.backend(variety)
            return Lockstep(MemoryBackend(), self.real)

        def teardown(self) -> None:
            ask_qemu_and_clean_up(self, self.real)

    return Machine


def abandoned_machine(workshop: Workshop) -> type[AbandonedMergesMachine]:
    """Lives in which nobody cares for what was interrupted; only the truth is left to judge."""

    class Machine(AbandonedMergesMachine):
        max_images = MAX_IMAGES

        def make_backend(self, variety: int) -> Backend:
            self.real = workshop.backend(variety)
            return self.real

        def teardown(self) -> None:
            ask_qemu_and_clean_up(self, self.real)

    return Machine


def ask_qemu_and_clean_up(machine: DiskHistoryMachine, real: RealBackend) -> None:
    # A history that has failed already is what people want to hear of.
    if sys.exc_info()[0] is None:
        spoiled = machine.history.spoiled
        real.ask_qemu([image for image in machine.history.images if image not in spoiled])
    real.throw_away()


@each_engine
def test_random_lives(workshop: Workshop) -> None:
    run_state_machine_as_test(real_machine(workshop), settings=settings(PATIENT, max_examples=8))


@each_engine
def test_random_lives_with_abandoned_merges(workshop: Workshop) -> None:
    run_state_machine_as_test(
        abandoned_machine(workshop), settings=settings(PATIENT, max_examples=4)
    )


@pytest.mark.soak
@each_engine
@pytest.mark.parametrize("part", range(10))
def test_thousands_of_random_lives(workshop: Workshop, part: int) -> None:
    """In parts, so that more than one worker can have a share."""
    run_state_machine_as_test(real_machine(workshop), settings=settings(PATIENT, max_examples=200))


@pytest.mark.soak
@each_engine
@pytest.mark.parametrize("part", range(2))
def test_hundreds_of_random_lives_with_abandoned_merges(workshop: Workshop, part: int) -> None:
    run_state_machine_as_test(
        abandoned_machine(workshop), settings=settings(PATIENT, max_examples=250)
    )


# Where a merge is killed, all places one by one.


def checkpoint_in_both(history: DiskHistory) -> None:
    history.checkpoint("cp1", 1)
    history.guest_write(0, 1)
    history.snapshot()
    history.guest_write(1, 1)


def checkpoint_in_top_over_another_image(history: DiskHistory) -> None:
    """Once base has it, the image between that lacks it looks like a gap."""
    history.snapshot()
    history.guest_write(0, 1)
    history.snapshot()
    history.checkpoint("cp1", 1)
    history.guest_write(1, 1)


def checkpoint_in_top_and_above_over_another_image(history: DiskHistory) -> None:
    checkpoint_in_top_over_another_image(history)
    history.snapshot()
    history.guest_write(2, 1)


@pytest.mark.parametrize("top_stays", [False, True])
@pytest.mark.parametrize(("engine", "stage"), STAGES)
@pytest.mark.parametrize(
    ("begin", "top"),
    [
        (checkpoint_in_both, "image1"),
        (checkpoint_in_top_over_another_image, "image2"),
        (checkpoint_in_top_and_above_over_another_image, "image2"),
    ],
)
def test_killed_anywhere(
    workshop: Workshop,
    begin: Callable[[DiskHistory], None],
    top: str,
    stage: Stage,
    top_stays: bool,
) -> None:
    """The next action is another one each time, until the merge is through with the stage."""
    for actions in range(MAX_ACTIONS):
        real = workshop.backend(0)
        history = DiskHistory(Lockstep(MemoryBackend(), real), 8, raw_root=False)
        begin(history)
        point = KillPoint(stage, actions)
        if history.merge_and_kill("image0", top, point, top_stays=top_stays) is Ending.KILLED:
            history.check()
            history.guest_write(3, 1)
            history.check()
            assert history.merge("image0", top, top_stays=top_stays)
        history.check()
        assert "cp1" in history.checkpoints(history.active)
        real.throw_away()


# What they find, if something is taken out of chainmerge.


@pytest.fixture
def no_tombstones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainmerge.bitmaps.gathering.decide", changed(without_tombstones))


@pytest.mark.parametrize(("story", "leaf"), STORIES)
def test_a_broken_checkpoint_stays_broken(workshop: Workshop, story: Story, leaf: str) -> None:
    real = workshop.backend(0)
    history = story(Lockstep(MemoryBackend(), real))
    history.check()
    assert history.checkpoints(leaf) == {}
    assert real.bitmaps(leaf)["cp1"].state is BitmapState.VALID
    tombstone = real.bitmaps("image0")["cp1"]
    assert (tombstone.state, tombstone.dirty) == (BitmapState.DISABLED, frozenset())
    real.ask_qemu(history.images)


@pytest.mark.usefixtures("no_tombstones")
@pytest.mark.parametrize(("story", "leaf"), STORIES)
def test_without_tombstones_it_becomes_a_false_one(
    workshop: Workshop, story: Story, leaf: str
) -> None:
    with pytest.raises(FalseCheckpoint, match=f"cp1 passes in {leaf} but misses the writes to"):
        story(workshop.backend(0)).check()


@pytest.mark.soak
@pytest.mark.usefixtures("no_tombstones")
def test_random_lives_find_the_missing_tombstones(workshop: Workshop) -> None:
    class Machine(DiskHistoryMachine):
        max_images = MAX_IMAGES

        def make_backend(self, variety: int) -> Backend:
            self.real = workshop.backend(variety)
            return self.real

        def teardown(self) -> None:
            self.real.throw_away()

    search = settings(
        PATIENT, max_examples=2_000, derandomize=True, database=None, phases=(Phase.generate,)
    )
    with pytest.raises(FalseCheckpoint):
        run_state_machine_as_test(Machine, settings=search)


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["qemu"])
@pytest.mark.parametrize(
    ("place", "instead"),
    [
        pytest.param(
            "records.remains.load_saved_bitmaps",
            lambda _base: None,
            id="saved bitmaps not read",
        ),
        pytest.param(
            "merging.by_qemu.stand_ins", lambda _bitmaps, _size: (), id="no bitmaps while copying"
        ),
    ],
)
def test_random_lives_find_what_a_kill_leaves(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, place: str, instead: object
) -> None:
    monkeypatch.setattr(f"chainmerge.{place}", instead)
    search = settings(
        PATIENT, max_examples=1_000, derandomize=True, database=None, phases=(Phase.generate,)
    )
    with pytest.raises(HistoryViolated):
        run_state_machine_as_test(real_machine(workshop), settings=search)
