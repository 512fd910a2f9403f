# SPDX-License-Identifier: Apache-2.0
"""The order of writes is the documented one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chainmerge.options import Placement
from chainmerge.qcow2.extents import Kind
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import COMPRESSED, OFFSET_MASK, iter_extents
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import read_refcount_table
from tests.engines.native.recorded import Builder, each_merge, everywhere, start_of
from tests.support.crash import (
    SECTOR,
    Event,
    Flushed,
    Punched,
    RecordingPort,
    Reserved,
    Resized,
    Written,
)
from tests.support.native_merge import (
    BuiltMerge,
    all_refcounts,
    placed_in,
    prepared,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt


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
