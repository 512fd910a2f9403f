# SPDX-License-Identifier: Apache-2.0
"""What is next, from every situation, and which bitmaps that changes. No VM needed."""

from __future__ import annotations

from itertools import product

import pytest
from msgspec.structs import replace

from chainmerge.live.convergence import PATIENCE_SECONDS, Convergence, Remedy
from chainmerge.live.nodes import BlockNode, NodeBitmap
from chainmerge.live.port import (
    AddBitmap,
    BitmapAction,
    ClearBitmap,
    DisableBitmap,
    EnableBitmap,
    JobPhase,
    JobState,
    MergeBitmap,
    RemoveBitmap,
)
from chainmerge.live.qmp.bitmap_actions import (
    disable_actions,
    faults,
    switch_actions,
    undo_actions,
    window_actions,
)
from chainmerge.live.qmp.steps import LiveStep, Situation, next_step
from chainmerge.records.identity import ImageIdentity
from chainmerge.records.live_journal import (
    VERSION,
    KeptName,
    LiveJournal,
    LiveState,
    TombstoneName,
)

MIB = 1 << 20
# What must never happen while the job is in this phase: it would change what is not to change.
ENDS = {LiveStep.SETTLE, LiveStep.RESTORE, LiveStep.START}


def job(phase: JobPhase, *, out_of_space: bool = False, stopped_by_error: bool = False) -> JobState:
    return JobState(phase, 1, 2, out_of_space, stopped_by_error)


def situation(state: LiveState, found: JobState | None, *, merged: bool = False) -> Situation:
    return Situation(state, found, merged)


@pytest.mark.parametrize(("state", "phase"), list(product(LiveState, JobPhase)))
def test_with_a_job_nothing_is_started_settled_or_given_up_for_lost(
    state: LiveState, phase: JobPhase
) -> None:
    assert next_step(situation(state, job(phase))) not in ENDS


@pytest.mark.parametrize("state", LiveState)
def test_without_a_job_the_chain_tells_whether_it_was_merged(state: LiveState) -> None:
    assert next_step(situation(state, None, merged=True)) is LiveStep.SETTLE
    expected = LiveStep.START if state is LiveState.PREPARING else LiveStep.RESTORE
    assert next_step(situation(state, None)) is expected


@pytest.mark.parametrize("phase", JobPhase)
def test_what_is_undone_is_never_let_go_on(phase: JobPhase) -> None:
    step = next_step(situation(LiveState.UNDOING, job(phase)))
    assert step in {LiveStep.UNDO, LiveStep.WAIT, LiveStep.DISMISS}


def test_the_window_comes_before_the_copy() -> None:
    assert next_step(situation(LiveState.PREPARING, job(JobPhase.RUNNING))) is LiveStep.PAUSE
    for phase in (JobPhase.PAUSED, JobPhase.READY, JobPhase.HELD):
        assert next_step(situation(LiveState.PREPARING, job(phase))) is LiveStep.PREPARE


def test_a_full_volume_is_no_error() -> None:
    full = job(JobPhase.PAUSED, out_of_space=True, stopped_by_error=True)
    assert next_step(situation(LiveState.COPYING, full)) is LiveStep.MAKE_ROOM
    broken = job(JobPhase.PAUSED, stopped_by_error=True)
    assert next_step(situation(LiveState.COPYING, broken)) is LiveStep.GIVE_UP


# Bitmaps


def bitmap(
    name: str, *, recording: bool = True, dirty: int = 65536, broken: bool = False
) -> NodeBitmap:
    return NodeBitmap(
        name, 65536, dirty, recording, persistent=True, inconsistent=broken, busy=False
    )


def node(name: str, *bitmaps: NodeBitmap) -> BlockNode:
    return BlockNode(name, "qcow2", None, True, MIB, None, "file", (), bitmaps)


def image(name: str) -> ImageIdentity:
    return ImageIdentity(f"/{name}", "file", 1, "")


def journal(*, active: bool, stale: tuple[str, ...] = ("stale",)) -> LiveJournal:
    return LiveJournal(
        version=VERSION,
        address=[],
        job="job",
        base=image("base"),
        overlays=[image("middle"), image("top")],
        above=None if active else image("above"),
        backing_name=None,
        kept=[
            KeptName("kept", 65536, in_base=True, sources=[0, 1]),
            KeptName("new", 4096, in_base=False, sources=[1]),
        ],
        stale=list(stale),
        tombstones=[
            TombstoneName("old-tomb", 65536, in_base=True),
            TombstoneName("new-tomb", 65536, in_base=False),
        ],
        delete=False,
        full_verify=True,
    )


BASE = node("base", bitmap("kept"), bitmap("stale"), bitmap("old-tomb"))
OVERLAYS = (node("middle"), node("top"))


def applied(base: BlockNode, actions: tuple[BitmapAction, ...]) -> BlockNode:
    """The node as QEMU has it after a transaction."""
    found = {one.name: one for one in base.bitmaps}
    for action in actions:
        assert action.node == base.name
        match action:
            case AddBitmap():
                assert action.name not in found
                found[action.name] = bitmap(action.name, recording=False, dirty=0)
            case RemoveBitmap():
                del found[action.name]
            case ClearBitmap():
                assert not found[action.name].inconsistent
                found[action.name] = replace(found[action.name], dirty_bytes=0)
            case EnableBitmap():
                found[action.name] = replace(found[action.name], recording=True)
            case DisableBitmap():
                found[action.name] = replace(found[action.name], recording=False)
            case MergeBitmap():
                found[action.name] = replace(found[action.name], dirty_bytes=131072)
    return replace(base, bitmaps=tuple(found.values()))


def after_window(plan: LiveJournal, base: BlockNode) -> BlockNode:
    base = applied(base, disable_actions(plan, base))
    for actions in window_actions(plan, base, OVERLAYS):
        base = applied(base, actions)
    return base


@pytest.mark.parametrize("active", [False, True])
def test_nothing_of_base_records_the_copy(active: bool) -> None:
    base = after_window(journal(active=active), BASE)
    assert not any(one.recording for one in base.bitmaps)
    assert {one.name for one in base.bitmaps} == {"kept", "new", "old-tomb", "new-tomb"}


@pytest.mark.parametrize("active", [False, True])
def test_in_the_end_all_is_as_planned(active: bool) -> None:
    plan = journal(active=active)
    window = after_window(plan, BASE)
    assert list(faults(plan, window))
    end = applied(window, switch_actions(plan, window, OVERLAYS))
    assert list(faults(plan, end)) == []


@pytest.mark.parametrize("active", [False, True])
def test_the_window_can_be_used_again(active: bool) -> None:
    plan = journal(active=active)
    once = after_window(plan, BASE)
    assert after_window(plan, once) == once


def test_bits_of_an_active_image_are_united_when_the_guest_waits_and_not_before() -> None:
    plan = journal(active=True)
    window = [action for actions in window_actions(plan, BASE, OVERLAYS) for action in actions]
    assert not any(isinstance(action, MergeBitmap) for action in window)
    silent = after_window(plan, BASE)
    switch = switch_actions(plan, silent, OVERLAYS)
    assert MergeBitmap("base", "kept", ("middle", "top")) in switch
    assert MergeBitmap("base", "new", ("top",)) in switch


def test_a_broken_bitmap_that_leaves_a_tombstone_goes_first() -> None:
    base = node("base", bitmap("kept"), bitmap("old-tomb", broken=True))
    plan = journal(active=False, stale=())
    first, second = window_actions(plan, base, OVERLAYS)
    assert RemoveBitmap("base", "old-tomb") in first
    assert second == (AddBitmap("base", "old-tomb", 65536),)


@pytest.mark.parametrize("active", [False, True])
def test_undoing_leads_back(active: bool) -> None:
    plan = journal(active=active)
    for base in (BASE, after_window(plan, BASE)):
        undone = applied(base, undo_actions(plan, base))
        assert {one.name: one.recording for one in undone.bitmaps if one.name != "stale"} == {
            "kept": True,
            "old-tomb": base.bitmap("old-tomb") == bitmap("old-tomb"),
        }


# Convergence


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def judged(convergence: Convergence, clock: Clock, seconds: float, done: int, total: int) -> Remedy:
    clock.now += seconds
    state = JobState(JobPhase.RUNNING, done, total)
    convergence.observe(state)
    return convergence.judge(state)


def test_a_copy_that_catches_up_is_left_alone() -> None:
    clock = Clock()
    convergence = Convergence("abort", None, clock)
    for step in range(100):
        assert judged(convergence, clock, 2.0, step * MIB, 100 * MIB) is Remedy.NOTHING


def test_a_copy_that_does_not_is_dealt_with_as_asked() -> None:
    clock = Clock()
    convergence = Convergence("abort", None, clock)
    judged(convergence, clock, 0, 0, 100 * MIB)
    assert judged(convergence, clock, PATIENCE_SECONDS, 50 * MIB, 150 * MIB) is Remedy.NOTHING
    assert judged(convergence, clock, 1, 60 * MIB, 160 * MIB) is Remedy.ABORT
    patient = Convergence("wait", 1.0, clock)
    judged(patient, clock, 0, 0, 100 * MIB)
    assert judged(patient, clock, 1000, 0, 100 * MIB) is Remedy.NOTHING


def test_a_deadline_is_kept_though_the_copy_gets_on() -> None:
    clock = Clock()
    convergence = Convergence("abort", 10.0, clock)
    judged(convergence, clock, 0, 0, 100 * MIB)
    assert judged(convergence, clock, 10, 50 * MIB, 100 * MIB) is Remedy.NOTHING
    assert judged(convergence, clock, 1, 60 * MIB, 100 * MIB) is Remedy.ABORT


def test_the_guest_is_slowed_down_step_by_step() -> None:
    clock = Clock()
    convergence = Convergence("throttle", None, clock)
    judged(convergence, clock, 0, 0, 100 * MIB)
    limits = [
        convergence.limit or 0
        for step in range(1, 200)
        if judged(convergence, clock, 2.0, step * 8 * MIB, (100 + step * 8) * MIB)
        is Remedy.THROTTLE
    ]
    assert limits[0] == 2 * MIB
    assert limits == sorted(limits, reverse=True)
    assert limits[1] == MIB
    assert limits[-1] == 256 << 10
