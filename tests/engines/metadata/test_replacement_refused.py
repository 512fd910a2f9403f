# SPDX-License-Identifier: Apache-2.0
"""Sets of bitmaps where images are damaged, full, or cannot hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from chainmerge.chain.errors import ImageCorrupt, ImageDamaged, ImageDirty
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.engines.metadata.errors import (
    BitmapSetUnfit,
    NotEnoughSpace,
    ReleaseFailed,
    RewriteFailed,
    SwitchUnknown,
)
from chainmerge.engines.metadata.replacement import plan_bitmap_set, replace_bitmaps
from chainmerge.qcow2.bitmaps import BitmapFlag, read_directory
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.check import check
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.refcounts import read_refcounts
from tests.engines.metadata.bitmap_sets import AUTO, DISABLED, MIB, random_set, stored_set
from tests.support import qemu
from tests.support.crash import (
    FailingPort,
    FullFileSystem,
    RecordingPort,
    Reserved,
    Written,
)
from tests.support.images import open_qcow2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


# Damaged bitmaps


def damaged_image(tmp_path: Path) -> tuple[bytes, Qcow2Image]:
    path = qemu.create(tmp_path / "damaged.qcow2", 3 * MIB, cluster_size=4096)
    qemu.qemu_img("bitmap", "--add", "-g", "512", path, "one")
    qemu.qemu_img("bitmap", "--add", "-g", "512", path, "two")
    qemu.qemu_io(path, "write -q -P 1 0 1M", "write -q -P 1 2M 64k")
    return path.read_bytes(), open_qcow2(path)


def test_bitmaps_without_their_autoclear_bit_become_leaks(tmp_path: Path) -> None:
    content, _ = damaged_image(tmp_path)
    port = RecordingPort(content[:95] + b"\0" + content[96:])
    bitmaps = random_set(8, 3 * MIB, 2)
    leaked = check(Qcow2Image(port)).leaks
    assert leaked >= 5
    replace_bitmaps(port, bitmaps)
    report = check(Qcow2Image(port))
    assert (report.sound, report.leaks) == (True, leaked)
    assert stored_set(Qcow2Image(port)) == bitmaps


def garbage_in_directory(content: bytearray, image: Qcow2Image) -> None:
    assert image.header.bitmaps is not None
    content[image.header.bitmaps.directory_offset + 8] ^= 0xFF


def directory_outside_the_file(content: bytearray, image: Qcow2Image) -> None:
    extension = next(item for item in image.header.extensions if item.type == 0x23852875)
    content[extension.offset + 8 + 16] = 0x40


def garbage_in_table(content: bytearray, image: Qcow2Image) -> None:
    content[read_directory(image)[0].table_offset + 7] = 0xFE


def table_that_names_guest_data(content: bytearray, image: Qcow2Image) -> None:
    """Freed with the old bitmaps, the cluster would be lost to the guest."""
    (guest_table,) = np.frombuffer(bytes(image.l1[:1]), ">u8") & 0x00FF_FFFF_FFFF_FE00
    data = content[guest_table : guest_table + 8]
    table = read_directory(image)[0].table_offset
    content[table : table + 8] = bytes([data[0] & 0x3F]) + data[1:]


def two_bitmaps_with_one_table(content: bytearray, image: Qcow2Image) -> None:
    first, _ = read_directory(image)
    assert image.header.bitmaps is not None
    second = image.header.bitmaps.directory_offset + 32
    content[second : second + 8] = first.table_offset.to_bytes(8, "big")


DAMAGES = [
    garbage_in_directory,
    directory_outside_the_file,
    garbage_in_table,
    table_that_names_guest_data,
    two_bitmaps_with_one_table,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_bitmaps_are_replaced_and_nothing_is_freed_that_was_not_theirs(
    tmp_path: Path, damage: object
) -> None:
    content, image = damaged_image(tmp_path)
    path = tmp_path / "damaged.qcow2"
    guest = qemu.content(path)
    broken = bytearray(content)
    assert callable(damage)
    damage(broken, image)
    port = RecordingPort(bytes(broken))
    assert not check(Qcow2Image(port)).sound
    bitmaps = random_set(9, 3 * MIB, 2)
    replace_bitmaps(port, bitmaps)
    report = check(Qcow2Image(port))
    assert report.sound, report
    assert stored_set(Qcow2Image(port)) == bitmaps
    path.write_bytes(port.content)
    assert qemu.check(path)["corruptions"] == 0
    # A guest that writes wherever QEMU finds a free cluster does no harm to the rest.
    qemu.qemu_io(path, "write -q -P 2 1M 1M")
    assert qemu.check(path)["corruptions"] == 0
    assert qemu.content(path) == guest[:MIB] + b"\2" * MIB + guest[2 * MIB :]


def test_only_what_the_old_set_used_alone_is_freed(tmp_path: Path) -> None:
    content, image = damaged_image(tmp_path)
    assert image.header.bitmaps is not None
    directory = image.header.bitmaps.directory_offset // 4096
    tables = {entry.table_offset // 4096 for entry in read_directory(image)}
    freed = set(plan_bitmap_set(image, []).released.tolist())
    assert freed >= tables | {directory}
    assert len(freed) == 1 + len(tables) + 2

    shared = bytearray(content)
    two_bitmaps_with_one_table(shared, image)
    still_used = Qcow2Image(RecordingPort(bytes(shared)))
    assert not tables & set(plan_bitmap_set(still_used, []).released.tolist())

    # A refcount of 2 says that somebody else counts on the cluster.
    counted_twice = bytearray(content)
    counted_twice[2 * 4096 + 2 * directory + 1] = 2
    port = RecordingPort(bytes(counted_twice))
    assert check(Qcow2Image(port)).only_leaks
    replace_bitmaps(port, random_set(15, 3 * MIB, 2))
    assert read_refcounts(Qcow2Image(port), directory, 1).tolist() == [2]


# Refusals


def assert_refused(
    content: bytes, bitmaps: Sequence[StoredBitmap], error: type[Exception]
) -> Exception:
    port = RecordingPort(content)
    with pytest.raises(error) as refusal:
        replace_bitmaps(port, bitmaps)
    assert not port.log
    return refusal.value


def test_images_that_must_be_repaired_first_are_refused(tmp_path: Path) -> None:
    content = qemu.create(tmp_path / "i.qcow2", MIB).read_bytes()
    bitmaps = random_set(10, MIB, 1)
    dirty = content[:79] + b"\1" + content[80:]
    refusal = assert_refused(dirty, bitmaps, ImageDirty)
    assert isinstance(refusal, ImageDirty)
    assert "chainmerge repair" in refusal.advice
    assert_refused(content[:79] + b"\2" + content[80:], bitmaps, ImageCorrupt)
    # The L1 table is marked free.
    refcounts = 2 * 65536
    freed = content[: refcounts + 6] + b"\0\0" + content[refcounts + 8 :]
    assert_refused(freed, bitmaps, ImageDamaged)


def test_sets_that_an_image_cannot_hold_are_refused(tmp_path: Path) -> None:
    content = qemu.create(tmp_path / "i.qcow2", MIB).read_bytes()
    empty = BitSet.empty(MIB, 65536)
    unfit: list[list[StoredBitmap]] = [
        [StoredBitmap("twice", empty, AUTO), StoredBitmap("twice", empty, DISABLED)],
        [StoredBitmap("", empty, AUTO)],
        [StoredBitmap("x" * 1024, empty, AUTO)],
        [StoredBitmap("nul \0", empty, AUTO)],
        [StoredBitmap("no text \ud800", empty, AUTO)],
        [StoredBitmap("another size", BitSet.empty(2 * MIB, 65536), AUTO)],
        [StoredBitmap("too fine", BitSet.empty(MIB, 256), AUTO)],
        [StoredBitmap("too coarse", BitSet.empty(MIB, 1 << 32), AUTO)],
        [StoredBitmap("in use", empty, BitmapFlag.IN_USE)],
        [StoredBitmap(f"{number}", empty, AUTO) for number in range(65536)],
    ]
    for bitmaps in unfit:
        assert_refused(content, bitmaps, BitmapSetUnfit)
    version_2 = qemu.create(tmp_path / "2.qcow2", MIB, compat="0.10").read_bytes()
    assert_refused(version_2, random_set(11, MIB, 1), BitmapSetUnfit)
    no_disk = qemu.create(tmp_path / "0.qcow2", 0).read_bytes()
    assert_refused(no_disk, [StoredBitmap("b", BitSet.empty(0, 512), AUTO)], BitmapSetUnfit)


def test_nothing_is_written_where_there_is_nothing_to_do(tmp_path: Path) -> None:
    for compat in ("0.10", "1.1"):
        content = qemu.create(tmp_path / "i.qcow2", MIB, compat=compat).read_bytes()
        port = RecordingPort(content)
        replace_bitmaps(port, [])
        assert not port.log


# Space and failures


def runs_in_use(image: Qcow2Image) -> Iterator[tuple[int, int]]:
    """File ranges (offset, length in bytes) of the clusters that are marked used."""
    cluster_size = image.header.cluster_size
    for cluster in np.flatnonzero(read_refcounts(image, 0, image.readable.size // cluster_size)):
        yield int(cluster) * cluster_size, cluster_size


def test_all_space_is_reserved_before_the_first_write(tmp_path: Path) -> None:
    content, _ = damaged_image(tmp_path)
    port = RecordingPort(content)
    bitmaps = random_set(12, 3 * MIB, 5)
    plan = plan_bitmap_set(Qcow2Image(port), bitmaps)
    outcome = replace_bitmaps(port, bitmaps)
    # What the image's sparse file may lack: all that is behind its end, and its free clusters.
    backed = np.zeros(plan.required_size, dtype=np.bool_)
    for first, count in runs_in_use(Qcow2Image(RecordingPort(content))):
        backed[first : first + count] = True
    reserved = [event for event in port.log if isinstance(event, Reserved)]
    assert port.log[: len(reserved)] == reserved
    for reservation in reserved:
        backed[reservation.offset : reservation.offset + reservation.length] = True
    for event in port.log:
        if isinstance(event, Written):
            assert backed[event.offset : event.offset + len(event.data)].all()
    assert outcome.required_size == plan.required_size == port.size
    assert plan.required_size % plan.cluster_size == 0


def test_a_full_file_system_is_a_refusal(tmp_path: Path) -> None:
    content, _ = damaged_image(tmp_path)
    with pytest.raises(NotEnoughSpace) as refusal:
        replace_bitmaps(FullFileSystem(content), random_set(13, 3 * MIB, 3))
    assert refusal.value.missing > 0


def test_errors_say_which_set_the_image_holds(tmp_path: Path) -> None:
    content, image = damaged_image(tmp_path)
    old = stored_set(image)
    new = random_set(14, 3 * MIB, 3)
    seen = []
    for survives in range(100):
        port = FailingPort(content, survives)
        try:
            replace_bitmaps(port, new)
        except RewriteFailed:
            assert stored_set(Qcow2Image(port)) == old
            seen.append("old")
        except SwitchUnknown:
            assert stored_set(Qcow2Image(port)) in (old, new)
            seen.append("unknown")
        except ReleaseFailed:
            assert stored_set(Qcow2Image(port)) == new
            seen.append("new")
        else:
            break
        assert check(Qcow2Image(port)).sound
    assert list(dict.fromkeys(seen)) == ["old", "unknown", "new"]
    assert seen.count("unknown") == 2
