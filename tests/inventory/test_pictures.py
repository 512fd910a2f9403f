# SPDX-License-Identifier: Apache-2.0
"""What the pictures of chains show: space by layer, the map, checkpoints, and the plan."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import chainmerge
from chainmerge.chain.errors import ForeignFormat
from chainmerge.errors import ChainmergeError
from chainmerge.qcow2.check import computed_refcounts
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import FileReadable
from chainmerge.storage.locks import LockMode, lock_image
from tests.support.images import KIB, MIB
from tests.support.qemu import create, dirty_ranges, mapping, qemu_img, qemu_io

if TYPE_CHECKING:
    from chainmerge import ChainPictures, DiskMap

DISK = 64 * MIB


def write(image: Path, *ranges: tuple[int, int]) -> None:
    """Write so many MiB from there on, (offset, length) each."""
    qemu_io(image, *(f"write -q -P 7 {offset}M {length}M" for offset, length in ranges))


def chain_of(directory: Path, *writes: list[tuple[int, int]]) -> list[Path]:
    """A chain in which each image has these ranges, in MiB."""
    images: list[Path] = []
    for number, ranges in enumerate(writes):
        path = directory / f"disk-{number}.qcow2"
        create(path, DISK) if not images else create(path, backing=images[-1])
        write(path, *ranges)
        images.append(path)
    return images


def space(pictures: ChainPictures) -> list[tuple[int, int]]:
    """Visible and hidden MiB of each image, from the root up."""
    return [(one.visible_bytes // MIB, one.hidden_bytes // MIB) for one in pictures.layers]


def test_data_is_seen_or_hidden(tmp_path: Path) -> None:
    images = chain_of(tmp_path, [(0, 16), (32, 8)], [(8, 16)], [(0, 4), (32, 4)])
    pictures = chainmerge.picture_chain(images[-1])
    assert [one.path for one in pictures.layers] == list(map(str, images))
    assert space(pictures) == [(4 + 4, 4 + 8 + 4), (16, 0), (8, 0)]
    assert pictures.plan is None
    assert pictures.problem is None


def used(image: Path) -> int:
    """Bytes of all clusters of a file that something refers to."""
    with FileReadable(image) as readable:
        references = computed_refcounts(Qcow2Image(readable))
    return int(np.count_nonzero(references.counts)) * references.cluster_size


def test_the_parts_of_an_image_are_all_that_its_file_has_in_use(tmp_path: Path) -> None:
    images = chain_of(tmp_path, [(0, 16)], [(8, 16), (40, 3)])
    for image in images:
        qemu_img("bitmap", "--add", image, "backup")
    # With a bitmap enabled, QEMU stores bits where it writes.
    write(images[-1], (50, 2))
    for one in chainmerge.picture_chain(images[-1]).layers:
        parts = one.visible_bytes + one.hidden_bytes + one.metadata_bytes + one.bitmap_bytes
        assert parts == used(Path(one.path))
        assert one.bitmap_bytes > 0
        assert one.occupied_bytes == Path(one.path).stat().st_blocks * 512


def test_a_merge_frees_what_is_hidden(tmp_path: Path) -> None:
    images = chain_of(tmp_path, [(0, 16), (32, 8)], [(8, 16)], [(0, 4), (32, 4)])
    (found,) = chainmerge.picture_chains([tmp_path]).pictures
    hidden = sum(one.hidden_bytes for one in found.layers)
    data = [one.visible_bytes for one in found.layers]
    chainmerge.merge(images[-1], images[0])
    after = chainmerge.picture_chain(images[0])
    assert space(after) == [(sum(data) // MIB, 0)]
    assert hidden == 16 * MIB


def uppermost(image: Path, drawn: DiskMap) -> list[int | None]:
    """Which layer has most of the data of each column, by `qemu-img map`."""
    counts: list[dict[int, int]] = [{} for _ in drawn.columns]
    for run in mapping(image):
        if not run["data"]:
            continue
        layer = len(drawn.images) - 1 - run["depth"]
        for at in range(run["start"], run["start"] + run["length"], 512):
            of_column = counts[at // drawn.column_bytes]
            of_column[layer] = of_column.get(layer, 0) + 512
    return [
        min((layer for layer in of if of[layer] == max(of.values())), default=None) for of in counts
    ]


@pytest.mark.parametrize("columns", [1, 7, 64, 2000])
def test_the_map_is_qemus(tmp_path: Path, columns: int) -> None:
    chooser = random.Random(columns)
    disk = 5 * MIB + 512
    images: list[Path] = []
    for number in range(5):
        path = tmp_path / f"{number}.qcow2"
        create(path, disk, cluster_size=4 * KIB) if not images else create(path, backing=images[-1])
        for _ in range(4):
            offset = chooser.randrange(0, 5 * MIB, 512)
            length = min(chooser.randrange(512, MIB, 512), disk - offset)
            kind = chooser.choice(("-P 5", "-P 6", "-z"))
            qemu_io(path, f"write -q {kind} {offset} {length}")
        images.append(path)
    drawn = chainmerge.disk_map(images[-1], columns=columns)
    assert len(drawn.columns) <= columns
    assert (len(drawn.columns) - 1) * drawn.column_bytes < drawn.virtual_size == disk
    assert [one.layer for one in drawn.columns] == uppermost(images[-1], drawn)
    said = mapping(images[-1])
    assert sum(one.data_bytes for one in drawn.columns) == sum(
        run["length"] for run in said if run["data"]
    )
    assert all(one.layer_bytes <= one.data_bytes for one in drawn.columns)
    zeros = sum(run["length"] for run in said if run["zero"] and run["present"])
    assert sum(one.zero_bytes for one in drawn.columns) == zeros


def test_the_map_of_a_root_that_is_raw_and_of_an_empty_disk(tmp_path: Path) -> None:
    raw = tmp_path / "root.img"
    raw.write_bytes(b"x" * MIB + bytes(3 * MIB))
    leaf = create(tmp_path / "leaf.qcow2", backing=raw, backing_format="raw")
    qemu_io(leaf, "write -q -P 1 2M 1M")
    drawn = chainmerge.disk_map(leaf, columns=4)
    assert [one.layer for one in drawn.columns] == [0, 0, 1, 0]
    assert chainmerge.disk_map(create(tmp_path / "empty.qcow2", 0)).columns == ()


def test_the_next_backup_is_the_union_of_all_bitmaps(tmp_path: Path) -> None:
    root, leaf = chain_of(tmp_path, [], [])
    for image, granularity in ((root, 64 * KIB), (leaf, 128 * KIB)):
        qemu_img("bitmap", "--add", "-g", str(granularity), image, "monday")
    write(root, (0, 2), (10, 1))
    write(leaf, (1, 2), (20, 3))
    qemu_img("bitmap", "--add", root, "stale")
    pictures = chainmerge.picture_chain(leaf)
    monday, stale = pictures.checkpoints
    assert [(cell.layer, cell.state) for cell in monday.cells] == [(0, "valid"), (1, "valid")]
    granules = {
        at
        for image in (root, leaf)
        for run in dirty_ranges(image, "monday")
        for at in range(run.start, run.start + run.length, 64 * KIB)
    }
    assert monday.next_backup_bytes == len(granules) * 64 * KIB == (3 + 1 + 3) * MIB
    assert (monday.usable, stale.usable, stale.next_backup_bytes) == (True, False, None)
    assert stale.reason == "absent from the active image"


def test_the_plan_is_drawn_in_for_what_one_leaf_alone_uses(tmp_path: Path) -> None:
    images = chain_of(tmp_path, [(0, 8)], [(0, 8)], [(0, 4)])
    create(tmp_path / "clone.qcow2", backing=images[0])
    found = {Path(one.image).name: one for one in chainmerge.picture_chains([tmp_path]).pictures}
    assert set(found) == {"clone.qcow2", "disk-2.qcow2"}
    decided = found["disk-2.qcow2"].plan
    assert decided is not None
    assert (decided.base, decided.top) == (str(images[1]), str(images[2]))
    assert found["clone.qcow2"].plan is None
    (named,) = chainmerge.picture_chains([images[-1]]).pictures
    assert named.plan is not None
    assert (named.plan.base, named.plan.delete) == (decided.base, decided.delete)


def test_the_most_gain_is_pictured_and_all_are_listed(tmp_path: Path) -> None:
    for name, hidden in (("much", 16), ("little", 2), ("some", 8)):
        (tmp_path / name).mkdir()
        chain_of(tmp_path / name, [(0, 16)], [(0, hidden)])
    places = [tmp_path / "little", tmp_path / "much", tmp_path / "some"]
    found = chainmerge.picture_chains(places, most=2)
    assert [Path(one.leaf).parent.name for one in found.chains] == ["much", "some", "little"]
    assert [Path(one.image).parent.name for one in found.pictures] == ["much", "some"]
    assert found.places == tuple(map(str, places))


def test_a_chain_that_cannot_be_read_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    sound = chain_of(tmp_path, [(0, 8)], [(0, 8)])
    lost = create(tmp_path / "lost.qcow2", DISK)
    orphan = create(tmp_path / "orphan.qcow2", backing=lost)
    lost.unlink()
    found = chainmerge.picture_chains([tmp_path])
    assert [one.image for one in found.pictures] == [str(sound[-1])]
    assert "lost.qcow2" in found.problems[0]
    assert len(found.chains) == 2
    assert str(orphan) in {one.image for one in found.findings}
    with pytest.raises(ChainmergeError):
        chainmerge.picture_chain(orphan)


def test_an_image_may_stand_on_one_of_another_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    root = create(tmp_path / "there" / "root.qcow2", DISK)
    leaf = create(tmp_path / "here" / "leaf.qcow2", backing=root)
    found = chainmerge.picture_chains([tmp_path / "here", tmp_path / "there"])
    assert [one.image for one in found.pictures] == [str(leaf)]
    assert found.problems == ()


def test_a_format_that_only_qemu_knows_is_refused(tmp_path: Path) -> None:
    root = create(tmp_path / "root.vmdk", DISK, fmt="vmdk")
    leaf = create(tmp_path / "leaf.qcow2", backing=root, backing_format="vmdk")
    with pytest.raises(ForeignFormat):
        chainmerge.picture_chain(leaf)


def test_images_in_use_are_pictured_too(tmp_path: Path) -> None:
    images = chain_of(tmp_path, [(0, 8)], [(4, 8)])
    with lock_image(images[-1], LockMode.WRITER, 0):
        (found,) = chainmerge.picture_chains([tmp_path]).pictures
    assert space(found) == [(4, 4), (8, 0)]
    assert found.plan is not None
    assert not found.plan.feasible
