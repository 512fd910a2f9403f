# SPDX-License-Identifier: Apache-2.0
"""What ``info`` says of each image: once, under one path, what it takes, when it was written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.chain.information import plain_path
from chainmerge.report.text import moment, short_size
from tests.support.cli import chainmerge as command
from tests.support.images import MIB
from tests.support.qemu import create, qemu_io

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def clones(tmp_path: Path) -> Path:
    """A base in a directory, and two overlays in others that reach it by ``..``."""
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
    create(tmp_path / "base" / "base.qcow2", MIB)
    for name in ("one", "two"):
        create(tmp_path / name / "top.qcow2", backing="../base/base.qcow2")
    return tmp_path


def test_each_image_once_under_one_path(clones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clones / "one")
    access = chainmerge.Access(
        allow_backing=(str(clones / "base"),), search=(str(clones / "two"), f"{clones}/one/../two")
    )
    report = chainmerge.inspect("../one/top.qcow2", access)
    base, top = str(clones / "base" / "base.qcow2"), str(clones / "one" / "top.qcow2")
    assert report.image == top
    assert [(one.path, one.parent) for one in report.images] == [
        (base, None),
        (top, base),
        (str(clones / "two" / "top.qcow2"), base),
    ]


def test_one_tree(clones: Path) -> None:
    ran = command("info", clones / "one" / "top.qcow2", "--allow-backing", clones / "base")
    images = [line for line in ran.out.splitlines() if line.startswith(("◉", "●", "├─●"))]
    assert len(images) == 3
    assert sum(line.startswith("◉") for line in images) == 1


def test_a_path_over_a_link_is_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far" / "below")
    image = create(tmp_path / "far" / "image.qcow2", MIB)
    # By its name that would be beside the link.
    assert plain_path(tmp_path / "near" / ".." / "image.qcow2") == str(image)
    link = tmp_path / "link.qcow2"
    link.symlink_to(image)
    assert plain_path(link) == str(link)


def test_what_it_takes_and_when_it_was_written(tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", 64 * MIB)
    qemu_io(image, "write -P 1 0 8M")
    status = image.stat()
    os.utime(image, (status.st_atime, status.st_mtime - 3 * 86400 - 60))
    report = chainmerge.inspect(image)
    (found,) = report.images
    assert found.occupied_bytes == status.st_blocks * 512
    assert found.written_at == int(status.st_mtime - 3 * 86400 - 60)
    out = command("info", image).out
    assert f"takes {short_size(status.st_blocks * 512)}, " in out
    assert f"written {moment(found.written_at)}, not open in any process" in out
