# SPDX-License-Identifier: Apache-2.0
"""A repair can be interrupted anywhere: the same command mends what that leaves, and undoes it."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any, Final

import pytest

import chainmerge
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.metadata.rebuilding import clear_marks, rebuild
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import iter_extents
from chainmerge.repairing.diagnosis import Circumstances, Diagnosis, Treatment, diagnose
from chainmerge.storage.files import AppendedFile, WritablePort
from tests.support import qemu
from tests.support.ailments import AILMENTS
from tests.support.crash import RecordingPort, crash_states
from tests.support.hostile import Victim, build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chainmerge.qcow2.bits import BitSet

BY_NAME: Final = {ailment.name: ailment for ailment in AILMENTS}
WORST: Final = "all of it: bitmaps, their directory, refcounts, dirty and corrupt"
REBUILT: Final = (
    WORST,
    "refcounts are lost: a block of zeros",
    "refcount table: a block is where an L2 table is",
    "header: the refcount table has no clusters",
    "COPIED flags are missing",
    "COPIED flags are set on what a snapshot shares",
    "bitmap: two have the same bits",
)
ALONE: Final = Circumstances(guarded={"both": 512}, merge_pending=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return build(tmp_path_factory.mktemp("template") / "images")


@pytest.fixture
def victim(template: Victim, tmp_path: Path) -> Victim:
    return template.copy_to(tmp_path / "images")


def _treat(port: RecordingPort, diagnosis: Diagnosis) -> None:
    bitmaps = diagnosis.bitmaps or ()
    match diagnosis.treatment:
        case Treatment.REBUILD:
            rebuild(port, [one for one in bitmaps if isinstance(one, StoredBitmap)])
        case Treatment.MARKS:
            clear_marks(port)
        case Treatment.BITMAPS:
            if diagnosis.bitmaps is not None:
                replace_bitmaps(port, bitmaps)
            reclaim_leaks(port)


def _mapping(port: RecordingPort) -> list[tuple[object, ...]]:
    """Where the guest's disk is in the file, whatever the refcounts."""
    return [
        tuple(run)
        for extents in iter_extents(Qcow2Image(port))
        for run in zip(
            extents.guest.tolist(),
            extents.length.tolist(),
            extents.kind.tolist(),
            extents.host.tolist(),
            strict=True,
        )
    ]


def _bits(port: RecordingPort) -> dict[str, BitSet]:
    """The content of every bitmap that passes for a good one."""
    image = Qcow2Image(port)
    return {
        entry.name: read_bits(image, entry)
        for entry in read_directory(image)
        if entry.auto and not entry.in_use
    }


@pytest.mark.parametrize("name", REBUILT)
def test_every_crash_of_a_rebuilding(victim: Victim, name: str) -> None:
    """Whatever is left is mended to the same disk, and no bitmap has other bits than it had."""
    path = victim.base
    sound = _bits(RecordingPort(path.read_bytes()))
    BY_NAME[name].inflict(path)
    damaged = path.read_bytes()
    port = RecordingPort(damaged)
    diagnosis = diagnose(port, ALONE)
    assert diagnosis.treatment is Treatment.REBUILD
    _treat(port, diagnosis)
    expected = _mapping(port)
    assert check(Qcow2Image(port)).clean
    states = 0
    for state in crash_states(damaged, port.log, seed=1, samples=20):
        states += 1
        left = RecordingPort(state.content)
        _treat(left, diagnose(left, ALONE))
        image = Qcow2Image(left)
        assert check(image).clean, state.label
        assert not image.header.dirty, state.label
        assert not image.header.corrupt, state.label
        assert _mapping(left) == expected, state.label
        assert _bits(left).items() <= sound.items(), state.label
    assert states > 20


def _dying(action: Callable[[], object], survives: int) -> bool:
    """Do *action* in a process that is killed before it touches a disk for the time *survives*.

    Returns whether it was killed.
    """
    pid = os.fork()
    if pid == 0:
        _die_at(survives)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def _die_at(survives: int) -> None:
    counted = 0

    def counting(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            nonlocal counted
            if counted == survives:
                os.kill(os.getpid(), signal.SIGKILL)
            counted += 1
            return method(*arguments)

        return call

    for owner, names in (
        (WritablePort, ("write", "flush", "truncate_to")),
        (AppendedFile, ("append", "flush")),
    ):
        for name in names:
            setattr(owner, name, counting(getattr(owner, name)))


def _backups(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.chainmerge-repair-*"))


FOREIGN_WRITER: Final = "a program that does not know bitmaps wrote to the image"


@pytest.mark.parametrize("name", [WORST, FOREIGN_WRITER])
def test_killed_before_any_write_or_flush(template: Victim, tmp_path: Path, name: str) -> None:
    """The same command mends it, and undoing both repairs brings back the damage."""
    damaged = template.copy_to(tmp_path / "damaged")
    BY_NAME[name].inflict(damaged.base)
    expected = qemu.content(template.base)
    survives = 0
    while True:
        victim = damaged.copy_to(tmp_path / str(survives))
        path = victim.base
        if not _dying(lambda path=path: chainmerge.repair(path), survives):  # type: ignore[misc]
            break
        chainmerge.repair(path)
        qemu.assert_clean(path)
        assert chainmerge.plan_repair(path).actions == ()
        assert qemu.content(path) == expected
        for backup in reversed(_backups(path)):
            # One that was killed before it had begun has nothing in it.
            if backup.stat().st_size > 100:
                chainmerge.undo_repair(backup)
        assert path.read_bytes() == damaged.base.read_bytes()
        survives += 1
    assert survives > 10


def test_killed_while_undoing(template: Victim, tmp_path: Path) -> None:
    """Of a repair that wrote to one place twice: the last write has to go first."""
    damaged = template.copy_to(tmp_path / "damaged")
    BY_NAME[FOREIGN_WRITER].inflict(damaged.base)
    survives = 0
    while True:
        victim = damaged.copy_to(tmp_path / str(survives))
        path = victim.base
        backup = chainmerge.repair(path).backup
        assert backup is not None
        kept = backup
        killed = _dying(lambda kept=kept: chainmerge.undo_repair(kept), survives)  # type: ignore[misc]
        chainmerge.undo_repair(backup)
        assert path.read_bytes() == damaged.base.read_bytes()
        if not killed:
            break
        survives += 1
    assert survives > 5
