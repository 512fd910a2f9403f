# SPDX-License-Identifier: Apache-2.0
"""Giving back leaked clusters: all of them, nothing else, and safely."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chainmerge.chain.errors import ImageCorrupt, ImageDamaged, ImageDirty
from chainmerge.engines.metadata import leaks
from chainmerge.engines.metadata.leaks import reclaim_leaks
from chainmerge.engines.metadata.refcount_blocks import refcount_writes
from chainmerge.qcow2.check import check, computed_refcounts
from chainmerge.qcow2.extents import Kind
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import OFFSET_MASK, iter_extents
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.refcounts import read_refcount_table, read_refcounts, refcounts_per_block
from tests.support import qemu
from tests.support.crash import RecordingPort, crash_states

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
CLUSTER = 1024


def opened(content: bytes) -> Qcow2Image:
    return Qcow2Image(BytesReadable("image", content))


def with_refcounts(content: bytes, clusters: list[int], refcount: int) -> bytes:
    """The image with other stored refcounts for some clusters."""
    port = RecordingPort(content)
    image = Qcow2Image(port)
    table = read_refcount_table(image)
    chosen = np.array(sorted(clusters), dtype=np.int64)
    counts = np.full(len(chosen), refcount, dtype=np.uint64)
    for offset, data in refcount_writes(port, image.header, table, chosen, counts):
        port.write(offset, data)
    return bytes(port.content)


def free_clusters(content: bytes) -> list[int]:
    """Free clusters among those that the image's refcount blocks describe."""
    image = opened(content)
    entries = refcounts_per_block(image.header)
    blocks = np.flatnonzero(read_refcount_table(image)).tolist()
    return [
        index * entries + int(at)
        for index in blocks
        for at in np.flatnonzero(read_refcounts(image, index * entries, entries) == 0)
    ]


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_leaks_go_as_qemu_img_check_takes_them_away(
    tmp_path: Path, refcount_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One block at a time, so that images with wide refcounts take several goes.
    monkeypatch.setattr(leaks, "_CLUSTERS_AT_ONCE", 1)
    image = qemu.create(
        tmp_path / "image.qcow2", 3 * MIB, cluster_size=CLUSTER, refcount_bits=refcount_bits
    )
    discards = ("discard -q 256k 256k", "discard -q 2560k 256k")
    qemu.qemu_io(image, "write -q -P 1 0 1M", "write -q -P 2 2M 1M", *discards)
    guest = qemu.content(image)
    content = image.read_bytes()
    choice = random.Random(refcount_bits)
    within = [at for at in free_clusters(content) if at < len(content) // CLUSTER]
    leaked = choice.sample(within, len(within) // 2)
    refcount = choice.randrange(1, min(5, 1 << refcount_bits))
    leaking = with_refcounts(content, leaked, refcount)
    image.write_bytes(leaking)
    assert qemu.check(image)["leaks"] == len(leaked) > 20

    port = RecordingPort(leaking)
    assert reclaim_leaks(port) == len(leaked)
    assert check(Qcow2Image(port)).clean
    for state in crash_states(leaking, port.log, seed=refcount_bits, samples=50):
        report = check(opened(state.content))
        assert report.sound
        assert report.leaks <= len(leaked)

    qemu.qemu_img("check", "-q", "-r", "leaks", image)
    total = len(content) // CLUSTER
    ours, theirs = Qcow2Image(port), opened(image.read_bytes())
    assert (read_refcounts(ours, 0, total) == read_refcounts(theirs, 0, total)).all()
    image.write_bytes(port.content)
    qemu.assert_clean(image)
    assert qemu.content(image) == guest
    again = RecordingPort(bytes(port.content))
    assert reclaim_leaks(again) == 0
    assert bytes(again.content) == bytes(port.content)


def test_void_bitmaps_are_leaks(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "image.qcow2", 3 * MIB)
    qemu.qemu_img("bitmap", "--add", image, "b")
    content = image.read_bytes()
    port = RecordingPort(content[:95] + b"\0" + content[96:])
    assert reclaim_leaks(port) == 2
    assert check(Qcow2Image(port)).clean


def test_clusters_behind_the_end_of_the_file_are_given_back_too(tmp_path: Path) -> None:
    content = qemu.create(tmp_path / "image.qcow2", 3 * MIB).read_bytes()
    behind = [at for at in free_clusters(content) if at > len(content) // 65536][:100:7]
    port = RecordingPort(with_refcounts(content, behind, 1))
    assert check(Qcow2Image(port)).clean
    assert reclaim_leaks(port) == len(behind)
    assert bytes(port.content) == content


def test_a_refcount_that_should_be_1_is_left_to_qemu(tmp_path: Path) -> None:
    """Its COPIED flag would have to change with it."""
    image = qemu.create(tmp_path / "image.qcow2", 3 * MIB)
    qemu.qemu_io(image, "write -q -P 1 0 1M")
    qemu.qemu_img("snapshot", "-c", "s", image)
    content = bytearray(image.read_bytes())
    # The snapshot gone, but its references not: what a crash leaves of its deletion.
    content[60:72] = bytes(12)
    before = check(opened(bytes(content)))
    assert before.only_leaks
    port = RecordingPort(bytes(content))
    reclaimed = reclaim_leaks(port)
    after = check(Qcow2Image(port))
    assert after.sound
    assert after.leaks == before.leaks - reclaimed
    # The data, and the table that maps it.
    assert after.leaks == 17


def test_a_refcount_that_should_be_1_is_lowered_where_no_flag_goes_with_it(
    tmp_path: Path,
) -> None:
    """Compressed clusters that share one, and what only a snapshot uses."""
    image = qemu.create(tmp_path / "image.qcow2", 3 * MIB)
    qemu.qemu_io(image, "write -q -c -P 1 0 256k", "write -q -P 2 1M 64k")
    qemu.qemu_img("snapshot", "-c", "s", image)
    qemu.qemu_io(image, "write -q -P 3 1M 64k")
    content = image.read_bytes()
    computed = computed_refcounts(opened(content)).counts
    # The packed data; and what of the snapshot the image has replaced since, its L1 table first.
    single = [int(at) for at in np.flatnonzero(computed == 1)]
    port = RecordingPort(with_refcounts(content, single, 2))
    report = check(Qcow2Image(port))
    assert not report.sound, "the COPIED flags of the active tables are wrong now"
    extents = next(iter_extents(opened(content)))
    data = [int(at) // 65536 for at in extents.host[extents.kind == Kind.DATA]]
    tables = [int(at & OFFSET_MASK) // 65536 for at in opened(content).l1]
    unflagged = [at for at in single if at not in {*data, *tables}]
    port = RecordingPort(with_refcounts(content, unflagged, 2))
    assert check(Qcow2Image(port)).shared_leaks == len(unflagged)
    assert reclaim_leaks(port) == len(unflagged)
    assert bytes(port.content) == content
    qemu.qemu_img("check", image)


def test_images_with_more_than_leaks_are_refused(tmp_path: Path) -> None:
    content = qemu.create(tmp_path / "image.qcow2", 3 * MIB).read_bytes()
    l1_table = opened(content).header.l1_table_offset // 65536
    for damaged, error in (
        (content[:79] + b"\1" + content[80:], ImageDirty),
        (content[:79] + b"\2" + content[80:], ImageCorrupt),
        (with_refcounts(content, [l1_table], 0), ImageDamaged),
    ):
        port = RecordingPort(damaged)
        with pytest.raises(error):
            reclaim_leaks(port)
        assert not port.log
