# SPDX-License-Identifier: Apache-2.0
"""Whenever the power goes in a native merge: the guest sees its disk, a rerun completes it."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chainmerge.engines.metadata.backing import change_backing
from chainmerge.engines.metadata.errors import NotEnoughSpace, ReleaseFailed, SwitchUnknown
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.engines.native.errors import MergeNotWritten
from chainmerge.errors import Interrupted
from chainmerge.options import Placement
from chainmerge.qcow2.check import check
from chainmerge.qcow2.extents import Kind
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import COMPRESSED, OFFSET_MASK, iter_extents
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import read_refcount_table
from chainmerge.storage.errors import FlushFailed, NoSpaceLeft, WriteFailed
from tests.conftest import SOAK
from tests.support import qemu
from tests.support.crash import (
    SECTOR,
    CrashState,
    Event,
    Flushed,
    Punched,
    RecordingPort,
    Reserved,
    Resized,
    Written,
    crash_states,
)
from tests.support.native_merge import (
    BuiltMerge,
    all_refcounts,
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
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from chainmerge.chain.view import GuestView
    from chainmerge.errors import ChainmergeError

# In a long run every state is looked at by all means there are, of many more states.
SAMPLES = 400 if SOAK else 4
EXHAUSTIVE = 10 if SOAK else 4
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


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp)


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


# Every state


@everywhere
@each_merge
def test_every_crash_leaves_the_guest_its_disk(
    tmp_path: Path,
    built: Builder,
    name: str,
    device: bool,
    record_property: Callable[[str, object], None],
) -> None:
    merge = built(name)
    start = start_of(merge, device=device)
    port = RecordingPort(start, is_block_device=device)
    run(merge, port)
    judge = Judge(merge, start, tmp_path, device=device)
    judge.assert_complete(bytes(port.content), "no crash")
    judge.ask_qemu_at_the_end(bytes(port.content))
    switch = flushes_before_the_switch(port.log)
    for state in crash_states(start, port.log, seed=11, samples=SAMPLES, exhaustive=EXHAUSTIVE):
        judge.judge(state, switch)
    record_property("states", judge.states)
    record_property("states run on from", judge.rerun)
    record_property("states shown to qemu", judge.seen_by_qemu)
    assert judge.states >= 5


@pytest.mark.parametrize("device", [False, True] if SOAK else [False])
@each_merge
def test_a_merge_that_is_stopped_gives_back_what_it_took(
    tmp_path: Path, built: Builder, name: str, device: bool
) -> None:
    """Also giving back may be interrupted anywhere."""
    merge = built(name)
    start = start_of(merge, device=device)
    port = RecordingPort(start, is_block_device=device)

    def stop(image: Qcow2Image, merged: GuestView) -> None:
        raise Interrupted("just before the switch")

    with pytest.raises(Interrupted):
        run(merge, port, stop)
    judge = Judge(merge, start, tmp_path, device=device)
    assert flushes_before_the_switch(port.log) is None
    for state in crash_states(start, port.log, seed=12, samples=SAMPLES // 4):
        judge.judge(state, None)
    after = Qcow2Image(BytesReadable("stopped", bytes(port.content)))
    report = check(after)
    assert report.clean
    assert not report.hidden_leaks
    blocks = set(read_refcount_table(after).tolist()) - set(
        read_refcount_table(Qcow2Image(BytesReadable("start", start))).tolist()
    )
    # What the refcount table names is in use, so that the file must go on having it.
    assert device or blocks or len(port.content) == len(start)
    assert bytes(port.content[:SECTOR]) == start[:SECTOR]


# The order of writes


@dataclass(frozen=True)
class Steps:
    """A commit's log, cut at its flushes."""

    fill: list[Event]
    count: list[Event]
    link: list[Event]
    switch: list[Event]
    release: list[Event]
    after: list[Event]


def steps_of(log: Sequence[Event], *, links: bool) -> Steps:
    steps: list[list[Event]] = [[]]
    for event in log:
        if isinstance(event, Flushed):
            steps.append([])
        else:
            steps[-1].append(event)
    assert len(steps) in (3, 5 + links)
    if len(steps) == 3:
        fill, count, after = steps
        return Steps(fill, count, [], [], [], after)
    fill, count, *link, switch, release, after = steps
    return Steps(fill, count, link[0] if links else [], switch, release, after)


class OldImage:
    """What each byte of base's file was for before the merge."""

    def __init__(self, built: BuiltMerge, content: bytes) -> None:
        self.image = Qcow2Image(BytesReadable("old", content))
        header = self.image.header
        self.cluster_size = header.cluster_size
        self.table = read_refcount_table(self.image)
        self.refcounts = all_refcounts(content)
        self.table_clusters = set(
            range(
                header.refcount_table_offset // self.cluster_size,
                header.refcount_table_offset // self.cluster_size + header.refcount_table_clusters,
            )
        )
        self._built = built
        self._guest_of = self._guest_bytes()
        self._data_clusters = set(self._plain_hosts().tolist())

    def refcount(self, cluster: int) -> int:
        return int(self.refcounts[cluster]) if cluster < len(self.refcounts) else 0

    def assert_may_be_filled(self, write: Written, content: bytes) -> None:
        """Fail unless what a write changes is nothing that this image shows or leads to."""
        size = self.cluster_size
        for cluster in clusters_of(write, size):
            if self.refcount(cluster) == 0:
                continue
            start = max(write.offset, cluster * size)
            end = min(write.offset + len(write.data), (cluster + 1) * size)
            before = np.frombuffer(content[start:end], dtype=np.uint8)
            data = write.data[start - write.offset : end - write.offset]
            changed = start + np.flatnonzero(before != np.frombuffer(data, dtype=np.uint8))
            if cluster == 0:
                assert not (changed < self._header_end()).any()
                continue
            # A cluster of data that is nobody else's: what shows of it is hidden from above.
            assert cluster in self._data_clusters, cluster
            assert self.refcount(cluster) == 1, cluster
            guest = self._guest_of[changed]
            if self._built.merge.placement is Placement.COW:
                assert (guest < 0).all()
            else:
                assert self._built.hidden[guest[guest >= 0]].all()

    def _header_end(self) -> int:
        """Where what the header uses of the first cluster ends."""
        header = self.image.header
        end = max(SECTOR, header.backing_name_offset + header.backing_name_length)
        for extension in header.extensions:
            end = max(end, extension.offset + 8 + -(-len(extension.data) // 8) * 8 + 8)
        return end

    def _guest_bytes(self) -> npt.NDArray[np.int64]:
        """For each byte of the file the guest byte that it shows, -1 for none."""
        guest_of = np.full(self.image.readable.size, -1, dtype=np.int64)
        for extents in iter_extents(self.image):
            for index in np.flatnonzero(extents.kind == Kind.DATA).tolist():
                guest, length = int(extents.guest[index]), int(extents.length[index])
                host = int(extents.host[index])
                guest_of[host : host + length] = np.arange(guest, guest + length)
        return guest_of

    def _plain_hosts(self) -> npt.NDArray[np.int64]:
        """Clusters that the L2 tables name as holding uncompressed data, or as kept for it."""
        tables = self.image.l1.astype(np.uint64) & np.uint64(OFFSET_MASK)
        words = np.frombuffer(
            b"".join(self.image.readable.read(int(at), self.cluster_size) for at in tables if at),
            dtype=">u8",
        ).astype(np.uint64)
        entries = words[::2] if self.image.header.extended_l2 else words
        plain = entries[entries & np.uint64(COMPRESSED) == 0] & np.uint64(OFFSET_MASK)
        hosts: npt.NDArray[np.int64] = plain[plain != 0].astype(np.int64) // self.cluster_size
        return hosts


def clusters_of(event: Written | Punched, cluster_size: int) -> Iterator[int]:
    length = len(event.data) if isinstance(event, Written) else event.length
    yield from range(event.offset // cluster_size, -(-(event.offset + length) // cluster_size))


def applied(content: bytes, writes: Sequence[Event]) -> bytes:
    port = RecordingPort(content)
    for write in writes:
        assert isinstance(write, Written)
        port.write(write.offset, write.data)
    return bytes(port.content)


def assert_only_in(writes: Sequence[Event], clusters: set[int], cluster_size: int) -> None:
    for write in writes:
        assert isinstance(write, Written)
        assert set(clusters_of(write, cluster_size)) <= clusters


@everywhere
@each_merge
def test_the_order_of_writes_is_the_documented_one(built: Builder, name: str, device: bool) -> None:
    merge = built(name)
    start = start_of(merge, device=device)
    port = RecordingPort(start, is_block_device=device)
    job = prepared(merge, port)
    allocation = placed_in(job).allocation
    old = OldImage(merge, start)
    size = old.cluster_size
    run(merge, port)
    links = bool(len(allocation.blocks.index)) and allocation.table_start is None
    steps = steps_of(port.log, links=links)

    fills = [event for event in steps.fill if isinstance(event, Written)]
    others = [event for event in steps.fill if not isinstance(event, Written)]
    assert all(isinstance(event, Reserved | Resized) for event in others)
    # Everything is reserved before anything is written, and not on a device.
    assert steps.fill[: len(others)] == others
    assert not (device and others)
    for write in fills:
        old.assert_may_be_filled(write, start)
    filled = port_after(start, steps.fill)

    blocks = {int(at) // size for at in old.table if at}
    assert_only_in(steps.count, blocks, size)
    counted = applied(filled, steps.count)
    after = all_refcounts(counted)
    before = np.zeros_like(after)
    before[: len(old.refcounts)] = old.refcounts
    assert (after[before != after] == 1).all()
    assert (before[before != after] == 0).all()

    assert bool(steps.link) == links
    assert_only_in(steps.link, old.table_clusters, size)
    linked = applied(counted, steps.link)
    table = read_refcount_table(Qcow2Image(BytesReadable("linked", linked)))
    assert (table[old.table != 0] == old.table[old.table != 0]).all()
    assert set(np.flatnonzero(table != old.table).tolist()) == (
        set(allocation.blocks.index.tolist()) if links else set()
    )

    if job.tree.changes_nothing:
        assert not steps.count
        assert not steps.after
        return
    (switch,) = steps.switch
    assert isinstance(switch, Written)
    assert (switch.offset, len(switch.data)) == (0, SECTOR)
    switched = applied(linked, steps.switch)

    new_table = read_refcount_table(Qcow2Image(BytesReadable("switched", switched)))
    assert_only_in(steps.release, {int(at) // size for at in new_table if at}, size)
    released = all_refcounts(applied(switched, steps.release))
    assert (released <= all_refcounts(switched)).all()
    assert not (device and steps.after)
    for event in steps.after:
        assert isinstance(event, Punched)
        punched = np.array(list(clusters_of(event, size)))
        assert not released[punched[punched < len(released)]].any()


def port_after(start: bytes, events: Sequence[Event]) -> bytes:
    port = RecordingPort(start)
    for event in events:
        if isinstance(event, Written):
            port.write(event.offset, event.data)
        elif isinstance(event, Resized):
            port.truncate_to(event.size)
    return bytes(port.content)


# Storage that fails


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


# The exact size


@each_merge
def test_the_size_that_was_worked_out_is_enough_and_no_less_is(
    tmp_path: Path, built: Builder, name: str
) -> None:
    merge = built(name)
    content = reclaimed(merge.base_content)
    size = needed(merge, content)
    start = start_of(merge, device=True, size=size)
    port = RecordingPort(start, is_block_device=True)
    outcome = run(merge, port)
    assert outcome.required_size <= size
    Judge(merge, start, tmp_path, device=True).assert_complete(bytes(port.content), "exact size")
    cluster_size = Qcow2Image(BytesReadable("base", content)).header.cluster_size
    if size == end_of_use(content) * cluster_size:
        return
    start = start_of(merge, device=True, size=size - cluster_size)
    port = RecordingPort(start, is_block_device=True)
    with pytest.raises(NotEnoughSpace):
        run(merge, port)
    assert all(isinstance(event, Flushed) for event in port.log)
    assert bytes(port.content) == start
