# SPDX-License-Identifier: Apache-2.0
"""Two ways to merge: QEMU's commands one after the other, and chainmerge."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

from demo.scenario import GOOD, GRANULARITY, Case, Workshop

# What nobody would wait for.
_PATIENCE_SECONDS = 300


@dataclass(frozen=True)
class Step:
    """One command that was run, and how it ended."""

    command: tuple[str, ...]
    status: int
    stderr: str


@dataclass(frozen=True)
class Attempt:
    """What a way to merge did: its steps up to the first that failed, and its time."""

    steps: tuple[Step, ...]
    seconds: float

    @property
    def succeeded(self) -> bool:
        """Whether every command said so by its exit status."""
        return all(step.status == 0 for step in self.steps)


def merge_with_qemu_img(case: Case) -> Attempt:
    """The sequence that management software uses, with the bitmaps' names known to it."""
    base = case.volume.backing_name
    Workshop.let_stand_on(case.top, base)
    image = (base,) if base.startswith("json:") else ("-f", "qcow2", base)
    return _attempt(
        ("qemu-img", "commit", "-q", "-f", "qcow2", "-d", "-b", base, str(case.top)),
        ("qemu-img", "bitmap", "--add", "-g", str(GRANULARITY), *image, GOOD),
        ("qemu-img", "bitmap", "--merge", GOOD, "-F", "qcow2", "-b", str(case.top), *image, GOOD),
    )


def merge_with_chainmerge(case: Case) -> Attempt:
    """The command that a user would type."""
    return _attempt(
        (
            *(sys.executable, "-m", "chainmerge", "merge", str(case.top)),
            *("--base", str(case.volume.path), *case.volume.merge_arguments),
        )
    )


def _attempt(*commands: tuple[str, ...]) -> Attempt:
    steps: list[Step] = []
    started = time.monotonic()
    for command in commands:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS
        )
        steps.append(Step(command, result.returncode, result.stderr))
        if result.returncode != 0:
            break
    return Attempt(tuple(steps), time.monotonic() - started)
