# SPDX-License-Identifier: Apache-2.0
"""Images that stand alone afterwards, under the name that they had."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.chain.errors import NoBackingFile
from chainmerge.options import MergeOptions
from tests.support.cli import chainmerge as run
from tests.support.qemu import assert_clean, bitmap_names, content, create, info, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def chain_in(directory: Path, name: str = "disk") -> list[Path]:
    """Four images, with a checkpoint in all of them; the last one is the leaf."""
    directory.mkdir(exist_ok=True)
    images = [create(directory / f"{name}-0.qcow2", 8 * MIB)]
    for index in range(1, 4):
        image = directory / f"{name}-{index}.qcow2"
        images.append(create(image, backing=images[-1].name))
    for index, image in enumerate(images):
        qemu_img("bitmap", "--add", image, "day")
        qemu_io(image, f"write -P {index + 1} {index}M 1M")
    return images


def stands_alone(image: Path) -> bool:
    return "backing-filename" not in info(image)


def test_a_leaf_stands_alone_and_what_was_below_stays(tmp_path: Path) -> None:
    images = chain_in(tmp_path)
    before = [image.read_bytes() for image in images[:-1]]
    shown = content(images[-1])
    report = chainmerge.flatten(images[-1])
    assert report.outcome == "merged"
    assert stands_alone(images[-1])
    assert content(images[-1]) == shown
    assert [image.read_bytes() for image in images[:-1]] == before
    assert list(bitmap_names(images[-1])) == ["day"]
    assert_clean(images[-1])
    again = chainmerge.flatten(images[-1])
    assert again.outcome == "already-merged"
    assert content(images[-1]) == shown


def test_what_was_below_goes_where_it_may(tmp_path: Path) -> None:
    images = chain_in(tmp_path)
    shown = content(images[-1])
    report = chainmerge.flatten(images[-1], options=MergeOptions(delete=True))
    assert set(report.deleted) == {str(image) for image in images[:-1]}
    assert content(images[-1]) == shown
    assert not any(image.exists() for image in images[:-1])
    assert chainmerge.flatten(images[-1], options=MergeOptions(delete=True)).deleted == ()


def test_an_image_that_stands_alone_is_left_as_it_is(tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", MIB)
    before = image.read_bytes()
    assert chainmerge.flatten(image).outcome == "already-merged"
    assert image.read_bytes() == before
    with pytest.raises(NoBackingFile):
        chainmerge.plan_flatten(image)


def test_several_disks_one_of_which_stands_alone(tmp_path: Path) -> None:
    first, second = chain_in(tmp_path, "vda"), chain_in(tmp_path, "vdb")
    alone = create(tmp_path / "vdc.qcow2", MIB)
    shown = [content(first[-1]), content(second[-1])]
    tops = [first[-1], alone, second[-1]]
    assert len(chainmerge.plan_flatten_disks(tops).disks) == 2
    report = chainmerge.flatten_disks(tops)
    assert [disk.outcome for disk in report.disks] == ["merged", "already-merged", "merged"]
    assert [content(first[-1]), content(second[-1])] == shown
    assert all(map(stands_alone, tops))
    again = chainmerge.flatten_disks(tops)
    assert {disk.outcome for disk in again.disks} == {"already-merged"}


def test_the_command_line(tmp_path: Path) -> None:
    images = chain_in(tmp_path)
    before = images[-1].read_bytes()
    planned = run("flatten", "--dry-run", images[-1])
    assert planned.status == 0
    assert images[-1].read_bytes() == before
    assert run("flatten", "--direction", "commit", images[-1]).status == 2
    done = run("flatten", images[-1], "--json")
    assert (done.status, done.json["outcome"]) == (0, "merged")
    assert stands_alone(images[-1])
    assert run("flatten", images[-1]).status == 0
