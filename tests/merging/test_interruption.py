# SPDX-License-Identifier: Apache-2.0
"""Whatever stops a merge, the same command finishes it and no valid checkpoint is lost."""

from __future__ import annotations

import importlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from msgspec.structs import replace

import chainmerge
from chainmerge.documents.merge import MergeOutcome
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import Interrupted
from chainmerge.options import EngineChoice, MergeOptions
from chainmerge.records.saved_bitmaps import saved_bitmaps_file
from chainmerge.storage.files import WritablePort
from tests.support.merge_scenario import VALID_IN_BOTH, VALID_IN_TOP, Scenario
from tests.support.qemu import assert_clean, bitmap_names, content, create, info, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable

# The package has a function of that name.
native_commit = importlib.import_module("chainmerge.engines.native.commit")
NATIVE_STAGES = (Stage.LOCK, Stage.PLAN, Stage.COPY, Stage.VERIFY, Stage.SETTLE)
QEMU_STAGES = (
    Stage.LOCK,
    Stage.PLAN,
    Stage.PRUNE,
    Stage.COPY,
    Stage.BITMAPS,
    Stage.VERIFY,
    Stage.SETTLE,
)
STAGES: list[tuple[EngineChoice, Stage]] = [
    *(("native", stage) for stage in NATIVE_STAGES),
    *(("qemu", stage) for stage in QEMU_STAGES),
]


def _merge_and_die_at(scenario: Scenario, stage: Stage, engine: EngineChoice = "qemu") -> int:
    """Merge in a child process that kills itself when *stage* is announced."""
    pid = os.fork()
    if pid == 0:

        def on_progress(event: ProgressEvent) -> None:
            if event.stage is stage:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            options = MergeOptions(engine=engine)
            chainmerge.merge(scenario.top, options=options, on_progress=on_progress)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("engine", "stage"), STAGES)
def test_killed_at_a_stage(scenario: Scenario, engine: EngineChoice, stage: Stage) -> None:
    assert _merge_and_die_at(scenario, stage, engine) == -signal.SIGKILL
    assert content(scenario.top) == scenario.expected_content
    chainmerge.merge(scenario.top)
    scenario.assert_merged()
    assert_clean(scenario.base)
    assert not saved_bitmaps_file(scenario.base).exists()


@pytest.mark.parametrize(("engine", "stage"), STAGES)
def test_no_false_checkpoint_while_interrupted(
    scenario: Scenario, engine: EngineChoice, stage: Stage
) -> None:
    """Between the kill and the rerun a name passes the chain test only if it is whole."""
    _merge_and_die_at(scenario, stage, engine)
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


@pytest.mark.parametrize(
    ("engine", "stage"), [*STAGES[:4], *STAGES[len(NATIVE_STAGES) : len(NATIVE_STAGES) + 4]]
)
def test_cancelled(scenario: Scenario, engine: EngineChoice, stage: Stage) -> None:
    before = content(scenario.base), bitmap_names(scenario.base)
    seen: list[Stage] = []

    def should_stop() -> bool:
        return stage in seen

    with pytest.raises(Interrupted):
        chainmerge.merge(
            scenario.top,
            options=MergeOptions(engine=engine),
            on_progress=lambda event: seen.append(event.stage),
            should_stop=should_stop,
        )
    if engine == "native":
        assert (content(scenario.base), bitmap_names(scenario.base)) == before
        assert_clean(scenario.base)
    chainmerge.merge(scenario.top)
    scenario.assert_merged()


def _command(scenario: Scenario) -> list[str]:
    arguments = ("--json", "--engine", scenario.engine, str(scenario.top))
    return [sys.executable, "-m", "chainmerge", "merge", *arguments]


def _start(scenario: Scenario) -> subprocess.Popen[bytes]:
    """A merge that has come as far as its first stage."""
    process = subprocess.Popen(_command(scenario), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert b"lock" in process.stdout.readline()
    return process


def _run_time(scenario: Scenario) -> float:
    with _start(scenario) as process:
        started = time.monotonic()
        assert process.wait() == 0
    return time.monotonic() - started


def _kill_at_random_moments(template: Scenario, directory: Path, kills: int) -> None:
    """Kill merges in the middle, each followed by the same command again, until *kills* are done.

    One that comes to its end first does not count: the machine was faster than before.
    """
    chance = random.Random(kills)
    run_time = _run_time(template.copy_to(directory / "timing"))
    killed = attempts = 0
    while killed < kills:
        attempts += 1
        assert attempts < 5 * kills
        scenario = template.copy_to(directory / f"attempt-{attempts}")
        with _start(scenario) as process:
            started = time.monotonic()
            try:
                process.wait(timeout=chance.random() * run_time)
                run_time = min(run_time, time.monotonic() - started)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
        subprocess.run(_command(scenario), check=True, stdout=subprocess.DEVNULL)
        scenario.assert_merged()
        assert_clean(scenario.base)
        shutil.rmtree(scenario.directory)


ENGINES: tuple[EngineChoice, ...] = ("native", "qemu")


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_at_random_moments(
    scenario_template: Scenario, tmp_path: Path, engine: EngineChoice
) -> None:
    _kill_at_random_moments(replace(scenario_template, engine=engine), tmp_path, kills=5)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("engine", "kills"), [("native", 200), ("qemu", 100)])
def test_killed_at_many_random_moments(
    scenario_template: Scenario, tmp_path: Path, engine: EngineChoice, kills: int
) -> None:
    _kill_at_random_moments(replace(scenario_template, engine=engine), tmp_path, kills)


def test_a_cancelled_merge_does_not_leave_a_larger_file(scenario: Scenario) -> None:
    before = scenario.base.stat()
    copied = False

    def on_progress(event: ProgressEvent) -> None:
        nonlocal copied
        copied = copied or (event.stage is Stage.COPY and event.done > 0)

    with pytest.raises(Interrupted):
        chainmerge.merge(
            scenario.top,
            options=MergeOptions(engine="native"),
            on_progress=on_progress,
            should_stop=lambda: copied,
        )
    after = scenario.base.stat()
    assert after.st_size == before.st_size
    assert after.st_blocks <= before.st_blocks


@pytest.mark.parametrize("switched", [False, True])
def test_the_status_of_a_pull_and_its_command(scenario: Scenario, switched: bool) -> None:
    options = MergeOptions(direction="pull", delete=True)
    pid = os.fork()
    if pid == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                if switched:
                    patch.setattr(Path, "unlink", _die)
                else:
                    patch.setattr(native_commit, "_switch", _die)
                chainmerge.merge(scenario.top, options=options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (found,) = chainmerge.status([scenario.directory]).merges
    assert found.progress.startswith("top holds everything" if switched else "data was being")
    assert found.base_holds_data is False
    assert found.command is not None
    argv = shlex.split(found.command)
    subprocess.run([sys.executable, "-m", *argv], check=True, stdout=subprocess.DEVNULL)
    assert not scenario.base.exists()
    assert content(scenario.top) == scenario.expected_content
    assert chainmerge.status([scenario.directory]).merges == ()


def _die(*_args: object, **_more: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_finished_merge_says_so(scenario: Scenario) -> None:
    assert chainmerge.merge(scenario.top).outcome is MergeOutcome.MERGED
    assert chainmerge.merge(scenario.top).outcome is MergeOutcome.ALREADY_MERGED
    scenario.assert_merged()


@pytest.mark.parametrize("guest_writes", [False, True])
@pytest.mark.parametrize("actions", range(7))
def test_a_pull_is_killed_about_its_switch(
    tmp_path: Path, actions: int, guest_writes: bool
) -> None:
    """The rerun must not pull the next image, whatever a guest does to top in between."""
    root = create(tmp_path / "root.qcow2", 4 << 20)
    qemu_io(root, "write -P 7 0 1M")
    base = create(tmp_path / "base.qcow2", backing=root.name)
    top = create(tmp_path / "top.qcow2", backing=base.name)
    for image in (base, top):
        qemu_img("bitmap", "--add", image, "cp")
    qemu_io(base, "write -P 1 0 100k")
    qemu_io(top, "write -P 2 1M 1M")
    options = MergeOptions(direction="pull", delete=True)
    pid = os.fork()
    if pid == 0:
        try:
            _pull_and_die(top, options, actions)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    if guest_writes:
        qemu_io(top, "write -P 9 3M 64k")
    expected = content(top)
    chainmerge.merge(top, options=options)
    assert info(top)["backing-filename"] == root.name
    assert content(top) == expected
    assert_clean(top)
    assert bitmap_names(top)["cp"]["flags"] == ["auto"]
    assert not base.exists()
    assert chainmerge.merge(top, options=options).outcome is MergeOutcome.ALREADY_MERGED


def _pull_and_die(top: Path, options: MergeOptions, actions: int) -> None:
    """Pull, and die before writing or flushing for the time *actions* after the verification."""
    counted = -1

    def begin(event: ProgressEvent) -> None:
        nonlocal counted
        if event.stage is Stage.VERIFY:
            counted = max(counted, 0)

    def counting(method: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            nonlocal counted
            if counted == actions:
                os.kill(os.getpid(), signal.SIGKILL)
            counted += counted >= 0
            method(*arguments)

        return call

    for name in ("write", "flush", "punch", "truncate_to"):
        setattr(WritablePort, name, counting(getattr(WritablePort, name)))
    chainmerge.merge(top, options=options, on_progress=begin)
