# SPDX-License-Identifier: Apache-2.0
"""Chains on block devices, as LVM lays them out."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from chainmerge.chain.allowed_places import resolved
from chainmerge.chain.discovery import discover
from chainmerge.chain.errors import BackingFileOutside
from chainmerge.chain.model import ChainPolicy
from chainmerge.chain.reading import open_image
from chainmerge.chain.relatives import find_relatives
from tests.chain.overlays import overlay
from tests.chain.unchanged import refusal
from tests.support import qemu

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Attach = Callable[[str], Path]

MIB = 1 << 20
PLAIN = ChainPolicy()


@pytest.fixture
def volumes(loop_device: Attach, device_directory: Path) -> Path:
    """A directory of links to devices: base <- top, and base <- sibling."""
    for name in ("base", "top", "sibling"):
        (device_directory / name).symlink_to(loop_device(name))
    qemu.create(device_directory / "base", 2 * MIB)
    overlay(device_directory / "top", device_directory / "base")
    overlay(device_directory / "sibling", "base")
    return device_directory


def test_a_chain_on_volumes(volumes: Path, tmp_path: Path) -> None:
    chain = discover(volumes / "top", PLAIN)
    base = chain.base
    node = (volumes / "base").resolve()
    assert [image.path for image in chain.images] == [volumes / "base", volumes / "top"]
    assert base.real_path == node
    assert base.is_block_device
    assert base.identity == (0, node.stat().st_rdev)
    assert (base.file_size, base.virtual_size) == (4 * MIB, 2 * MIB)
    assert chain.index_of(node) == 0
    with open_image(base) as readable:
        assert readable.size == 4 * MIB


def test_another_node_of_the_device_is_the_same_image(volumes: Path, tmp_path: Path) -> None:
    device = (volumes / "base").stat().st_rdev
    os.mknod(tmp_path / "node", 0o600 | stat.S_IFBLK, device)
    assert discover(volumes / "top", PLAIN).index_of(tmp_path / "node") == 0


def test_users_on_volumes_are_found(volumes: Path) -> None:
    found = find_relatives(discover(volumes / "top", PLAIN), 0)
    assert [image.path for image in found.siblings] == [volumes / "sibling"]
    found = find_relatives(discover(volumes / "base", PLAIN), 0)
    assert {image.path for image in found.children} == {volumes / "sibling", volumes / "top"}


def test_a_volume_of_another_group_is_refused(
    volumes: Path, loop_device: Attach, tmp_path: Path
) -> None:
    """Their nodes lie all in /dev, so the directory of the node proves nothing."""
    other = loop_device("other")
    overlay(volumes / "top", other)
    error = refusal(BackingFileOutside, tmp_path, lambda: discover(volumes / "top", PLAIN))
    assert error.how == f"is {str(other)!r}"
    qemu.create(other, MIB)
    policy = ChainPolicy(allow_backing=(other,))
    assert discover(volumes / "top", policy).base.path == other


def test_links_from_image_directories_to_volumes(volumes: Path, tmp_path: Path) -> None:
    """A directory of links to the links of a volume group, as vdsm makes one for each disk."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("base", "top"):
        (images / name).symlink_to(volumes / name)
    assert resolved(images / "top") == volumes / "top"
    overlay(images / "top", "base")
    chain = discover(images / "top", PLAIN)
    assert [image.path for image in chain.images] == [images / "base", images / "top"]
    found = find_relatives(chain, 0)
    assert [image.path for image in found.siblings] == [volumes / "sibling"]


def test_a_file_on_a_volume_needs_a_word(volumes: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "base").symlink_to(volumes / "base")
    overlay(images / "top", "base")
    error = refusal(BackingFileOutside, images, lambda: discover(images / "top", PLAIN))
    assert error.suggestion == str(volumes)
    policy = ChainPolicy(allow_backing=(volumes,))
    assert discover(images / "top", policy).base.path == images / "base"


def test_a_link_straight_to_a_node_is_judged_by_the_node(volumes: Path, tmp_path: Path) -> None:
    node = (volumes / "base").resolve()
    (tmp_path / "link").symlink_to(node)
    overlay(tmp_path / "image", "link")
    error = refusal(BackingFileOutside, tmp_path, lambda: discover(tmp_path / "image", PLAIN))
    assert error.how == f"is a symbolic link to {str(node)!r}"


def test_nodes_in_dev_itself(loop_device: Attach) -> None:
    base, top = loop_device("base"), loop_device("top")
    qemu.create(base, MIB)
    overlay(top, base.name)
    chain = discover(top, PLAIN)
    assert [image.path for image in chain.images] == [base, top]
    assert find_relatives(chain, 0).siblings == ()
