# SPDX-License-Identifier: Apache-2.0
"""Merges that are built once, and recorded or cut off."""

from __future__ import annotations

import hashlib
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.options import Placement
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from tests.conftest import SOAK
from tests.support import qemu
from tests.support.crash import (
    SECTOR,
    CrashState,
    Event,
    Flushed,
    RecordingPort,
    Written,
)
from tests.support.native_merge import (
    BuiltMerge,
    build,
    end_of_use,
    on_device,
    placed_in,
    prepared,
    reclaimed,
    run,
    trusted_bitmaps,
)
from tests.support.native_scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


# In a long run every state is looked at by all means there are, of many more states.
SAMPLES = 400 if SOAK else 4
QEMU_SAMPLE = 10 if SOAK else 40
RERUN_SAMPLE = 2 if SOAK else 6
# What a volume has behind the space that the merge takes.
ROOM = 32 << 10

everywhere = pytest.mark.parametrize("device", [False, True], ids=["file", "device"])
each_merge = pytest.mark.parametrize("name", SCENARIOS)


class Builder:
    """Builds each chain once, in a directory of its own."""

    def __init__(self, directory: Callable[[str], Path]) -> None:
        self._directory = directory
        self._built: dict[str, BuiltMerge] = {}

    def __call__(self, name: str) -> BuiltMerge:
        if name not in self._built:
            self._built[name] = build(self._directory("chain"), SCENARIOS[name])
        return self._built[name]


def start_of(built: BuiltMerge, *, device: bool, size: int | None = None) -> bytes:
    """Base before the commit: without leaks, and on a device among what was there before."""
    content = reclaimed(built.base_content)
    if not device:
        return content
    if size is None:
        size = needed(built, content) + ROOM
    return on_device(content, size)


def needed(built: BuiltMerge, content: bytes) -> int:
    """The least size of a device on which the merge has room."""
    job = prepared(built, RecordingPort(content))
    clusters = max(placed_in(job).allocation.end, end_of_use(content))
    return clusters * job.disk.header.cluster_size


class Judge:
    """Says whether a state of base is one in which a crash may leave it."""

    def __init__(self, built: BuiltMerge, start: bytes, directory: Path, *, device: bool) -> None:
        self.built = built
        self.device = device
        self.states = self.seen_by_qemu = self.rerun = 0
        self._start = start
        self._seen: set[bytes] = set()
        self._directory = directory

    def judge(self, state: CrashState, switch: int | None) -> None:
        """Look at a state, unless the same one was seen before.

        Args:
            state: The state.
            switch: How many flushes return before the switch is written; None where it is not.
        """
        digest = hashlib.blake2b(state.content + bytes([state.flushes])).digest()
        if digest in self._seen:
            return
        self._seen.add(digest)
        self.states += 1
        switched = self._judge(state.content, state.label)
        if switch is None or state.flushes < switch:
            assert not switched, state.label
        elif state.flushes > switch:
            assert switched, state.label
        if self.states % RERUN_SAMPLE == 0:
            self.assert_rerun_completes(state.content, state.label)
        if self.states % QEMU_SAMPLE == 1:
            self._ask_qemu(state)

    def _judge(self, content: bytes, label: str) -> bool:
        """Whether base is the new image; fails where it is neither that nor the old one."""
        built = self.built
        image = Qcow2Image(BytesReadable("crashed", content))
        assert not image.header.dirty
        assert not image.header.corrupt
        report = check(image)
        assert report.sound, (label, report)
        switched = content[:SECTOR] != self._start[:SECTOR]
        bitmaps = built.new_bitmaps if switched else built.old_bitmaps
        assert trusted_bitmaps(content) == bitmaps, label
        assert built.through_top(content) == built.seen, label
        alone = built.base_alone(content)
        if switched:
            assert np.array_equal(alone, built.merged), label
        elif built.merge.placement is Placement.COW:
            assert np.array_equal(alone, built.old), label
        else:
            assert len(alone) == len(built.old), label
            changed = alone != built.old
            assert built.hidden[changed].all(), label
            assert np.array_equal(alone[changed], built.merged[: len(alone)][changed]), label
        return switched

    def assert_rerun_completes(self, content: bytes, label: str) -> None:
        """Run the merge on a state, as the next command does."""
        self.rerun += 1
        # A volume may have to be extended once more: base's new data has clusters already.
        room = bytes(missing_room(self.built, content)) if self.device else b""
        port = RecordingPort(content + room, is_block_device=self.device)
        reclaim_leaks(port)
        run(self.built, port)
        self.assert_complete(bytes(port.content), label)

    def assert_complete(self, content: bytes, label: str, *, leaks: bool = False) -> None:
        """Fail unless base is the new image, with nothing leaked."""
        built = self.built
        report = check(Qcow2Image(BytesReadable("completed", content)))
        assert report.sound, (label, report)
        assert leaks or report.clean, (label, report)
        assert not report.hidden_leaks or leaks, (label, report)
        assert np.array_equal(built.base_alone(content), built.merged), label
        assert built.through_top(content) == built.seen, label
        assert trusted_bitmaps(content) == built.new_bitmaps, label

    def _ask_qemu(self, state: CrashState) -> None:
        self.seen_by_qemu += 1
        base = self._put_down(state.content)
        report = qemu.check(base)
        assert not report["corruptions"], (state.label, report)
        assert report.get("check-errors", 0) == 0, (state.label, report)
        top = self.built.paths[-1]
        assert qemu.content(self._directory / top.name) == self.built.seen, state.label
        switched = state.content[:SECTOR] != self._start[:SECTOR]
        bitmaps = self.built.new_bitmaps if switched else self.built.old_bitmaps
        assert set(qemu.bitmap_names(base)) == set(bitmaps), state.label

    def ask_qemu_at_the_end(self, content: bytes) -> None:
        """QEMU's tools find nothing wrong, and the guest's disk in base alone."""
        base = self._put_down(content)
        qemu.assert_clean(base)
        assert qemu.content(base) == self.built.merged.tobytes()
        assert set(qemu.bitmap_names(base)) == set(self.built.new_bitmaps)

    def _put_down(self, content: bytes) -> Path:
        """Base's file in a copy of the chain."""
        merge = self.built.merge
        for path in self.built.paths:
            if not (self._directory / path.name).exists():
                shutil.copy(path, self._directory)
        base = self._directory / self.built.paths[merge.base].name
        base.write_bytes(content)
        return base


def missing_room(built: BuiltMerge, content: bytes) -> int:
    """How many bytes a device has to grow by for a merge that starts from a state."""
    return max(0, needed(built, reclaimed(content)) - len(content))


def flushes_before_the_switch(log: Sequence[Event]) -> int | None:
    """None where nothing is switched."""
    for number, event in enumerate(log):
        if isinstance(event, Written) and event.offset == 0:
            return sum(isinstance(each, Flushed) for each in log[:number])
    return None
