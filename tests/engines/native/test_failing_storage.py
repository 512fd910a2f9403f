# SPDX-License-Identifier: Apache-2.0
"""Storage that fails, or loses what it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chainmerge.engines.metadata.backing import change_backing
from chainmerge.engines.metadata.errors import NotEnoughSpace, ReleaseFailed, SwitchUnknown
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.engines.native.errors import MergeNotWritten
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.storage.errors import FlushFailed, NoSpaceLeft, WriteFailed
from tests.conftest import SOAK
from tests.engines.native.recorded import (
    RERUN_SAMPLE,
    SAMPLES,
    Builder,
    Judge,
    everywhere,
    flushes_before_the_switch,
    start_of,
)
from tests.support.crash import (
    SECTOR,
    CrashState,
    Event,
    Flushed,
    Punched,
    RecordingPort,
    Reserved,
    Written,
    crash_states,
)
from tests.support.native_merge import (
    run,
)
from tests.support.native_scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chainmerge.errors import ChainmergeError


class DyingPort(RecordingPort):
    """Storage that fails at one operation, for good or just then.

    Where *everything* counts, reserving, resizing and punching may fail, too.
    """

    def __init__(
        self, content: bytes, survives: int, *, device: bool, everything: bool, recovers: bool
    ) -> None:
        super().__init__(content, is_block_device=device)
        self._left = survives
        self._everything = everything
        self._recovers = recovers

    @property
    def failed(self) -> bool:
        return self._left < 0

    def _fails(self) -> bool:
        if self._left < 0:
            return not self._recovers
        self._left -= 1
        return self._left < 0

    def write(self, offset: int, data: bytes) -> None:
        if self._fails():
            raise WriteFailed(self.name, offset, len(data), "the storage is gone")
        super().write(offset, data)

    def flush(self) -> None:
        if self._fails():
            raise FlushFailed(self.name, "the storage is gone")
        super().flush()

    def reserve(self, offset: int, length: int) -> None:
        if self._everything and self._fails():
            raise NoSpaceLeft(self.name, offset, length, "the file system is full")
        super().reserve(offset, length)

    def truncate_to(self, size: int) -> None:
        if self._everything and self._fails():
            raise WriteFailed(self.name, size, 0, "the storage is gone")
        super().truncate_to(size)

    def punch(self, offset: int, length: int) -> None:
        if self._everything and self._fails():
            raise WriteFailed(self.name, offset, length, "the storage is gone")
        super().punch(offset, length)


FAILING = (
    SCENARIOS
    if SOAK
    else (
        "small clusters",
        "extended below plain, in place",
        "pieces longer than a refcount block",
        "blocks that describe themselves",
        "a snapshot in base, in place",
        "bitmaps grow with the disk, in place",
        "nothing but data, all of it in place",
    )
)


@pytest.mark.parametrize(
    ("recovers", "everything"),
    [(False, False), (True, True)],
    ids=["for good", "once, whatever it is"],
)
@everywhere
@pytest.mark.parametrize("name", FAILING)
def test_whatever_fails_leaves_the_guest_its_disk(
    tmp_path: Path, built: Builder, name: str, device: bool, recovers: bool, everything: bool
) -> None:
    merge = built(name)
    start = start_of(merge, device=device)
    smooth = RecordingPort(start, is_block_device=device)
    run(merge, smooth)
    switch = flushes_before_the_switch(smooth.log)
    judge = Judge(merge, start, tmp_path, device=device)
    events = [event for event in smooth.log if everything or isinstance(event, Written | Flushed)]
    for survives, event in enumerate(events):
        if not SOAK and survives % 8 and isinstance(event, Punched | Reserved):
            continue
        port = DyingPort(start, survives, device=device, everything=everything, recovers=recovers)
        expected = expected_error(event, events[:survives], switch)
        label = f"operation {survives} fails: {event}"[:80]
        if expected is None:
            run(merge, port)
        else:
            with pytest.raises(expected):
                run(merge, port)
        assert port.failed
        content = bytes(port.content)
        reached = None if expected in (MergeNotWritten, NotEnoughSpace) else switch
        for state in crash_states(start, port.log, seed=13, samples=SAMPLES // 20):
            judge.judge(CrashState(state.content, state.flushes, label), reached)
        report = check(Qcow2Image(BytesReadable("failed", content)))
        assert report.sound, label
        if recovers and expected in (MergeNotWritten, NotEnoughSpace):
            assert report.clean, label
            assert not report.hidden_leaks, label
        if expected is None:
            judge.assert_complete(content, label)
        elif survives % RERUN_SAMPLE == 0 or SOAK:
            judge.assert_rerun_completes(content, label)


def expected_error(
    event: Event, before: Sequence[Event], switch: int | None
) -> type[ChainmergeError] | None:
    """What a merge says if this is what fails; None where it does not matter."""
    flushes = sum(isinstance(each, Flushed) for each in before)
    if isinstance(event, Punched):
        return None
    if isinstance(event, Reserved):
        return NotEnoughSpace
    if switch is None or flushes < switch:
        return MergeNotWritten
    return SwitchUnknown if flushes == switch else ReleaseFailed


class LosingPort(RecordingPort):
    """Storage that never gets the first sector, and says it has: the kernel's cache has it."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._stored = content[:SECTOR]

    def forget_cached(self) -> None:
        self.content[:SECTOR] = self._stored


def test_a_switch_that_the_storage_loses_is_found_out(tmp_path: Path, built: Builder) -> None:
    merge = built("bitmaps united")
    start = start_of(merge, device=False)
    port = LosingPort(start)
    with pytest.raises(SwitchUnknown, match="does not have it"):
        run(merge, port)
    judge = Judge(merge, start, tmp_path, device=False)
    judge.assert_rerun_completes(bytes(port.content), "the switch was lost")


def test_a_lost_switch_of_bitmaps_or_a_backing_file_is_found_out(built: Builder) -> None:
    content = start_of(built("bitmaps united"), device=False)
    with pytest.raises(SwitchUnknown, match="does not have it"):
        replace_bitmaps(LosingPort(content), [])
    with pytest.raises(SwitchUnknown, match="does not have it"):
        change_backing(LosingPort(content), "elsewhere.qcow2", "qcow2")
