# SPDX-License-Identifier: Apache-2.0
"""Storage that fails under a merge: a clear error, nothing lost, and a rerun that finishes."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import chainmerge
from chainmerge.documents.progress import ProgressEvent, Stage
from chainmerge.errors import ChainmergeError
from chainmerge.options import MergeOptions
from tests.support.qemu import bitmap_names, content, create, qemu_img, qemu_io, run
from tests.vm.commands import Running, chainmerge_forked
from tests.vm.guest import faults
from tests.vm.guest.conftest import SOAK
from tests.vm.guest.faults import SECTOR, Patient, patient
from tests.vm.guest.volumes import MIB, Group

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS: Final = 50 if SOAK else 5
DISK: Final = 8 * MIB
VOLUME: Final = 12 * MIB


@dataclass(frozen=True)
class Ward:
    """A chain of two images on volumes that can be made sick, and how both were at first."""

    base: Path
    top: Path
    base_content: bytes
    top_content: bytes
    seen: bytes
    patients: dict[str, Patient]

    def refill(self) -> None:
        self.base.write_bytes(self.base_content)
        self.top.write_bytes(self.top_content)
        self.forget_cached()

    @staticmethod
    def forget_cached() -> None:
        """From here on what is read is what the storage has."""
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")

    def assert_nothing_lost(self, label: object) -> None:
        self.forget_cached()
        qemu_img("check", "-q", "-f", "qcow2", self.base, expect=(0, 3))
        assert content(self.top) == self.seen, label
        names = bitmap_names(self.base)
        for name in ("both", "new"):
            if name in names:
                assert names[name]["flags"] == ["auto"], label
        assert "both" in names, label

    def assert_merged(self, label: object) -> None:
        self.forget_cached()
        qemu_img("check", "-q", "-f", "qcow2", self.base)
        assert content(self.base) == self.seen, label
        names = bitmap_names(self.base)
        assert names.keys() == {"both", "new"}, label
        assert all(bitmap["flags"] == ["auto"] for bitmap in names.values()), label


@pytest.fixture
def ward(group: Group) -> Iterator[Ward]:
    base = create(group.create("base", VOLUME), DISK)
    for name in ("both", "stale"):
        qemu_img("bitmap", "--add", "-f", "qcow2", base, name)
    qemu_io(base, "write -P 1 0 3M")
    top = create(group.create("top", VOLUME), backing=base)
    for name in ("both", "new"):
        qemu_img("bitmap", "--add", "-f", "qcow2", top, name)
    qemu_io(top, "write -P 2 2M 2M", "write -P 3 6M 1M", "write -z 5M 512k")
    seen = content(top)
    with (
        patient(group.mapper_name("base")) as sick_base,
        patient(group.mapper_name("top")) as sick_top,
    ):
        patients = {"base": sick_base, "top": sick_top}
        yield Ward(base, top, base.read_bytes(), top.read_bytes(), seen, patients)


def random_fault(choice: random.Random, sectors: int, target: str) -> str:
    start = choice.randrange(8, sectors - 8)
    kinds = [
        faults.fails_between(start, sectors, sectors),
        faults.fails_between(start, min(start + choice.randrange(1, 4096), sectors), sectors),
        faults.everything_fails(),
    ]
    if target == "base":
        kinds += [
            faults.writes_fail(),
            faults.writes_are_lost(),
            # Long writes are of data, and read back. What happens to a single sector behind
            # its owner's back nobody can tell before it is too late.
            faults.writes_are_corrupted(choice.randrange(5000, 60_000), 0x5A),
        ]
    return choice.choice(kinds)


@pytest.mark.timeout(36_000)
def test_faults_at_random_moments(ward: Ward, capsys: pytest.CaptureFixture[str]) -> None:
    ward.refill()
    started = time.monotonic()
    ran = chainmerge_forked("merge", ward.top)
    run_time = time.monotonic() - started
    assert ran.status == 0, ran
    ward.assert_merged("without a fault")
    outcomes = []
    for number in range(ROUNDS):
        choice = random.Random(number)
        data = choice.choice(("cow", "in-place"))
        target = choice.choice(("base", "base", "top"))
        sick = ward.patients[target]
        table = random_fault(choice, sick.sectors, target)
        label = (number, data, target, table)
        ward.refill()
        running = Running("merge", "--data", data, ward.top)
        wait_until(running, choice.random() * run_time)
        sick.sicken(table)
        ran = running.wait()
        sick.heal()
        outcomes.append(ran.status)
        assert ran.status in (0, 1, 3, 4), (label, ran)
        assert "Traceback" not in ran.err + ran.out, (label, ran)
        assert "internal error" not in ran.err, (label, ran)
        if ran.status:
            assert "what to do" in ran.err, (label, ran)
        ward.assert_nothing_lost((label, ran))
        again = chainmerge_forked("merge", "--data", data, ward.top)
        assert again.status == 0, (label, ran, again)
        ward.assert_merged((label, ran))
        with capsys.disabled():
            print(f"\nround {number}, {data}, {target}: exit {ran.status}", end="", flush=True)
    with capsys.disabled():
        failed = sum(status != 0 for status in outcomes)
        print(f"\n{ROUNDS} rounds, {failed} of them failed: all finished by a rerun")


def wait_until(running: Running, seconds: float) -> None:
    """Let a command go on for a while, or until it ends."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not running.has_ended():
        os.sched_yield()


@pytest.mark.parametrize("fault", ["writes fail", "everything fails", "writes are lost"])
def test_the_switch_itself_does_not_reach_the_storage(ward: Ward, fault: str) -> None:
    """What is cached then is the new image, and what the storage has is the old one."""
    table = {
        "writes fail": faults.writes_fail(),
        "everything fails": faults.everything_fails(),
        "writes are lost": faults.writes_are_lost(),
    }[fault]
    sick = ward.patients["base"]
    ward.refill()
    # A flush that is lost is found out, too: nothing is believed that was not read again.
    assert merged_with_fault(ward.top, sick, table) == 4
    sick.heal()
    # Nothing makes the kernel forget what it has cached.
    again = chainmerge_forked("merge", ward.top)
    assert again.status == 0, again
    ward.assert_merged(again)


@pytest.fixture
def mounted_volume(group: Group) -> Iterator[tuple[Path, Patient]]:
    """A file system on a volume that can be made sick."""
    device = group.create("files", 96 * MIB)
    place = Path("/tmp/files")
    place.mkdir(exist_ok=True)
    run("mkfs.ext4", "-q", device)
    with patient(group.mapper_name("files")) as sick:
        run("mount", device, place)
        yield place, sick
        run("umount", place)


def first_sectors(file: Path) -> tuple[int, int]:
    """Where the first 4096 bytes of a file lie on its file system's device."""
    line = next(
        line for line in run("filefrag", "-b512", "-v", file).stdout.splitlines() if " 0: " in line
    )
    start = int(line.split(":")[2].split("..")[0])
    return start, start + 4096 // SECTOR


def test_a_switch_that_failed_is_not_believed_for_being_cached(
    mounted_volume: tuple[Path, Patient],
) -> None:
    """The kernel goes on showing what it could not write, until it needs the memory.

    A rerun that believed that would delete top, and the data with it.
    """
    place, sick = mounted_volume
    base, top = create(place / "base.qcow2", DISK), place / "top.qcow2"
    qemu_io(base, "write -P 1 0 1M")
    create(top, backing=base.name)
    qemu_img("bitmap", "--add", "-f", "qcow2", top, "new")
    qemu_io(top, "write -P 2 512k 4M")
    seen = content(top)
    Ward.forget_cached()
    start, end = first_sectors(base)
    table = faults.writes_fail_between(start, end, sick.sectors)
    assert merged_with_fault(top, sick, table) == 4
    sick.heal()
    again = chainmerge_forked("merge", "--delete", top)
    assert again.status == 0, again
    Ward.forget_cached()
    assert content(base) == seen
    assert bitmap_names(base)["new"]["flags"] == ["auto"]
    assert not top.exists()


def merged_with_fault(top: Path, sick: Patient, table: str) -> int:
    """The exit status of a merge under which, right before the switch, the storage fails."""
    pid = os.fork()
    if pid == 0:

        def on_progress(event: ProgressEvent) -> None:
            if event.stage is Stage.VERIFY and event.done and event.done == event.total:
                sick.sicken(table)

        status = 99
        try:
            chainmerge.merge(top, options=MergeOptions(), on_progress=on_progress)
            status = 0
        except ChainmergeError as error:
            status = error.exit_code
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
