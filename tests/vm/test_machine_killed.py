# SPDX-License-Identifier: Apache-2.0
"""The whole machine dies in the middle of a merge; booted again, the same command finishes it."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Final

import pytest

from tests.vm.rig import MIB, PROJECT, Disk, booted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.vm.rig import Machine

KILLS: Final = 20 if os.environ.get("CHAINMERGE_SOAK") == "1" else 3
ENVIRONMENT: Final = {"PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}"}


@pytest.mark.timeout(6000)
def test_the_machine_is_killed(tmp_path: Path) -> None:
    disks = [
        Disk("plain0", tmp_path / "plain0", 96 * MIB),
        Disk("state", tmp_path / "state", 16 * MIB),
    ]
    run_time = 0.0
    for number in range(KILLS):
        # In the first life nobody knows yet how long a merge takes.
        from_outside = number % 2 == 0
        mode = "outside" if from_outside else str(run_time)
        with booted(_life(number, mode), disks, ENVIRONMENT) as machine:
            if from_outside:
                _wait_for(machine, "merging")
                run_time = run_time or _told_time(machine.output)
                machine.kill_after(random.Random(number).random() * run_time)
            assert machine.power_lost() is None, machine.output
            assert "merging" in machine.output, machine.output
    with booted(_life(KILLS, "end"), disks, ENVIRONMENT) as machine:
        assert machine.wait() == 0, machine.output


def _life(number: int, mode: str) -> list[str]:
    return ["python3", "-m", "tests.vm.guest.killed", str(number), mode]


def _wait_for(machine: Machine, line: str) -> None:
    while line not in machine.output:
        assert machine.process.poll() is None, machine.output
        machine.wait_for_output()


def _told_time(output: Sequence[str]) -> float:
    (line,) = (line for line in output if line.startswith("takes "))
    return float(line.split()[1])
