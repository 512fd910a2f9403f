# SPDX-License-Identifier: Apache-2.0
"""Whenever the power goes while a merge writes: the guest sees its disk, a rerun completes it.

The writes and flushes are those that the kernel's block layer saw below LVM, or below a file
system, of a command as users run it. They were recorded in the virtual machine.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from tests.support import qemu
from tests.vm.conftest import POWER_CUTS
from tests.vm.power.cases import CASES, LVM
from tests.vm.power.judge import FilesJudge, Judge, VolumesJudge
from tests.vm.power.log_writes import SECTOR, Flags, read_log, states
from tests.vm.power.media import FileMedium, MemoryMedium
from tests.vm.power.recordings import directory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.vm.power.log_writes import Entry

SOAK = os.environ.get("CHAINMERGE_SOAK") == "1"
SUBSETS = 40 if SOAK else 3
SUBSETS_OF_FILES = 10 if SOAK else 1
# What file systems rely on having as a whole or not at all.
BLOCK = 4096


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_power_cuts(
    tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    case, recording = CASES[name], directory_of(name)
    assert recording.exists(), "nothing is recorded; make test-vm does that first"
    log = read_log(recording / "log")
    judge: Judge
    if case.storage == LVM:
        medium = MemoryMedium((recording / "before").read_bytes())
        judge = VolumesJudge(case, medium, log, tmp_path, thorough=SOAK)
        subsets, unit = SUBSETS, SECTOR
    else:
        copy = tmp_path / "medium"
        qemu.run("cp", "--sparse=always", recording / "before", copy)
        files = FileMedium(copy)
        judge = FilesJudge(case, files, log, tmp_path, thorough=SOAK)
        subsets, unit = SUBSETS_OF_FILES, BLOCK
    judge_all(judge, log, subsets, unit)
    judge.assert_all_was_met()
    record_property(POWER_CUTS, judge.summary())


def test_a_flush_that_is_missing_is_seen(tmp_path: Path) -> None:
    """Else nothing that is said here would be worth anything."""
    case, recording = CASES["commit"], directory_of("commit")
    without = [
        replace(entry, flags=entry.flags & ~Flags.FLUSH) for entry in read_log(recording / "log")
    ]
    medium = MemoryMedium((recording / "before").read_bytes())
    judge = VolumesJudge(case, medium, without, tmp_path, thorough=False)
    with pytest.raises(AssertionError):
        judge_all(judge, without, subsets=200)


def judge_all(judge: Judge, log: Sequence[Entry], subsets: int, unit: int = SECTOR) -> None:
    for state in states(judge.medium, log, subsets=subsets, seed=1, unit=unit):
        judge.judge(state)
