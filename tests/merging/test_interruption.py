# SPDX-License-Identifier: Apache-2.0
"""Whatever stops a merge, the same command finishes it and no valid checkpoint is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.errors import Interrupted
from chainmerge.journal import saved_bitmaps_file
from chainmerge.types import MergeOutcome, ProgressEvent, Stage
from tests.support.merge_scenario import VALID_IN_BOTH, VALID_IN_TOP, Scenario
from tests.support.qemu import assert_clean, bitmap_names, content

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STAGES = (
    Stage.LOCK,
    Stage.PLAN,
    Stage.PRUNE,
    Stage.COPY,
    Stage.BITMAPS,
    Stage.VERIFY,
    Stage.SETTLE,
)


def _merge_and_die_at(scenario: Scenario, stage: Stage) -> int:
    """Merge in a child process that kills itself when *stage* is announced."""
    pid = os.fork()
    if pid == 0:

        def on_progress(event: ProgressEvent) -> None:
            if event.stage is stage:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            chainmerge.merge(scenario.top, on_progress=on_progress)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_a_stage(scenario: Scenario, stage: Stage) -> None:
    assert _merge_and_die_at(scenario, stage) == -signal.SIGKILL
    assert content(scenario.top) == scenario.expected_content
    chainmerge.merge(scenario.top)
    scenario.assert_merged()
    assert_clean(scenario.base)
    assert not saved_bitmaps_file(scenario.base).exists()


@pytest.mark.parametrize("stage", STAGES)
def test_no_false_checkpoint_while_interrupted(scenario: Scenario, stage: Stage) -> None:
    """Between the kill and the rerun a name passes the chain test only if it is whole."""
    _merge_and_die_at(scenario, stage)
    listing = chainmerge.bitmaps_list(scenario.top)
    passing = {verdict.name for verdict in listing.verdicts if verdict.passes}
    assert passing >= set(VALID_IN_TOP)
    base_names = bitmap_names(scenario.base)
    for name in set(VALID_IN_BOTH) & passing:
        assert base_names[name]["flags"] == ["auto"]
        rows = [row for row in listing.rows if row.name == name]
        assert all(row.dirty_bytes for row in rows), rows


def test_guest_writes_between_kill_and_rerun_are_in_the_bitmap(scenario: Scenario) -> None:
    from tests.support.merge_scenario import dirty_granules, granules
    from tests.support.qemu import qemu_io

    _merge_and_die_at(scenario, Stage.BITMAPS)
    qemu_io(scenario.top, "write -P 9 150M 3M")
    expected = content(scenario.top)
    chainmerge.merge(scenario.top)
    assert content(scenario.base) == expected
    for name, bits in scenario.expected_bits.items():
        assert dirty_granules(scenario.base, name) == bits | granules(((150, 3),))


def test_saved_bitmaps_are_not_used_for_another_overlay(scenario: Scenario) -> None:
    """Somebody committed top by hand and made a new snapshot: base's bits are worthless."""
    from tests.support.qemu import create, qemu_img, qemu_io

    _merge_and_die_at(scenario, Stage.BITMAPS)
    qemu_img("commit", "-q", scenario.top)
    scenario.top.unlink()
    qemu_io(scenario.base, "write -P 77 30M 1M")
    create(scenario.top, backing="base.qcow2")
    for name in VALID_IN_BOTH:
        qemu_img("bitmap", "--add", scenario.top, name)
    report = chainmerge.merge(scenario.top)
    assert not [bitmap for bitmap in report.bitmaps if bitmap.state == "valid"]


@pytest.mark.parametrize("stage", STAGES[:4])
def test_cancelled(scenario: Scenario, stage: Stage) -> None:
    seen: list[Stage] = []

    def should_stop() -> bool:
        return stage in seen

    with pytest.raises(Interrupted):
        chainmerge.merge(
            scenario.top,
            on_progress=lambda event: seen.append(event.stage),
            should_stop=should_stop,
        )
    chainmerge.merge(scenario.top)
    scenario.assert_merged()


def _command(scenario: Scenario) -> list[str]:
    return [sys.executable, "-m", "chainmerge", "merge", "--json", str(scenario.top)]


def _run_time(scenario: Scenario) -> float:
    started = time.monotonic()
    subprocess.run(_command(scenario), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def _moments(run_time: float, rounds: int, seed: int) -> Iterator[float]:
    """Moments spread over the run, each somewhere in its own slice of it."""
    chance = random.Random(seed)
    for number in range(rounds):
        yield (number + chance.random()) * run_time / rounds


def _kill_at_random_moments(template: Scenario, directory: Path, rounds: int) -> int:
    """Returns how many of the runs were still going when they were killed."""
    run_time = _run_time(template.copy_to(directory / "timing"))
    killed = 0
    for number, moment in enumerate(_moments(run_time, rounds, seed=rounds)):
        scenario = template.copy_to(directory / f"round-{number}")
        process = subprocess.Popen(_command(scenario), stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.wait()
        subprocess.run(_command(scenario), check=True, stdout=subprocess.DEVNULL)
        scenario.assert_merged()
        assert_clean(scenario.base)
    return killed


def test_killed_at_random_moments(scenario_template: Scenario, tmp_path: Path) -> None:
    assert _kill_at_random_moments(scenario_template, tmp_path, rounds=8)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_at_100_random_moments(scenario_template: Scenario, tmp_path: Path) -> None:
    assert _kill_at_random_moments(scenario_template, tmp_path, rounds=100) > 80


def test_finished_merge_says_so(scenario: Scenario) -> None:
    assert chainmerge.merge(scenario.top).outcome is MergeOutcome.MERGED
    assert chainmerge.merge(scenario.top).outcome is MergeOutcome.ALREADY_MERGED
    scenario.assert_merged()
