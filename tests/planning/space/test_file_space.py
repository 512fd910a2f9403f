# SPDX-License-Identifier: Apache-2.0
"""Files in which space is missing: counted beforehand and reserved, or refused."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge.options import Access, DataChoice, EngineChoice, MergeOptions
from chainmerge.storage.volume_errors import FileSystemFull
from tests.support.loopdev import mounted_file_system
from tests.support.qemu import content, create, qemu_img, qemu_io, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
DISK = 128 * MIB
DATA = 24 * MIB
SIZES = {"ext4": 160 * MIB, "xfs": 320 * MIB, "btrfs": 320 * MIB}
NATIVE: EngineChoice = "native"
QEMU: EngineChoice = "qemu"


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    kind = request.param
    with mounted_file_system(tmp_path, kind, SIZES[kind]) as mount:
        yield mount


def _base(directory: Path, layout: str) -> Path:
    """An image of which no more than a little has space of its own."""
    base = directory / "base"
    match layout:
        case "raw":
            with base.open("wb") as file:
                file.truncate(DISK)
        case "raw-shared":
            base.write_bytes(b"b" * DISK)
            _share(base)
        case "preallocated":
            create(base, DISK, preallocation="metadata")
        case "shared":
            create(base, DISK)
            qemu_io(base, f"write -q -P 98 0 {DISK}")
            _share(base)
    return base


def _share(image: Path) -> None:
    """Have another file share all blocks of the image."""
    other = image.parent / "elsewhere"
    other.mkdir()
    run("cp", "--reflink=always", image, other / "copy")


def _overlay(base: Path, directory: Path) -> Path:
    """Data that lies on another file system, so that nothing of it can be shared."""
    top = directory / "top.qcow2"
    qemu_img(
        *("create", "-q", "-f", "qcow2", "-b", base),
        *("-F", "raw" if base.read_bytes()[:4] != b"QFI\xfb" else "qcow2", top),
    )
    qemu_io(top, f"write -q -P 7 {8 * MIB} {DATA}", "write -q -P 8 1M 4k")
    return top


def _leave_free(mount: Path, spare: int) -> None:
    filler = mount / "filler"
    filler.unlink(missing_ok=True)
    free = 0
    # XFS gives the space of a file that is gone back some time later.
    while free <= 0:
        os.sync()
        free = shutil.disk_usage(mount).free - spare
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free)
    os.sync()


def _allocated(image: Path) -> int:
    return image.stat().st_blocks * 512


def _never_in_the_middle(
    mount: Path, tmp_path: Path, layout: str, engine: EngineChoice, data: DataChoice
) -> None:
    base = _base(mount, layout)
    top = _overlay(base, tmp_path)
    expected, before = content(top), content(base, "raw")
    options = MergeOptions(engine=engine, data=data)
    access = Access(sole_user=True, allow_backing=(str(mount),))
    outcomes = []
    for spare in (4 * MIB, DATA - 4 * MIB, DATA - 64 * KIB, DATA + 40 * MIB):
        _leave_free(mount, spare)
        held = _allocated(base)
        plan = chainmerge.plan(top, access=access, options=options)
        try:
            chainmerge.merge(top, access=access, options=options)
        except FileSystemFull:
            assert not plan.feasible
            assert content(base, "raw") == before
            assert _allocated(base) <= held
            outcomes.append(False)
        else:
            assert plan.feasible
            outcomes.append(True)
            break
        assert content(top) == expected
    assert content(top) == expected
    assert outcomes[0] is False
    assert outcomes[-1] is True


@pytest.mark.parametrize("engine", [NATIVE, QEMU])
@pytest.mark.parametrize("layout", ["raw", "preallocated"])
def test_holes(full: Path, tmp_path: Path, layout: str, engine: EngineChoice) -> None:
    data: DataChoice = "in-place" if layout == "preallocated" else "auto"
    _never_in_the_middle(full, tmp_path, layout, engine, data)


@pytest.mark.parametrize("layout", ["raw-shared", "shared"])
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_shared_blocks(tmp_path: Path, kind: str, layout: str) -> None:
    """What is written over blocks that another file has, too, gets new ones."""
    with mounted_file_system(tmp_path, kind, SIZES[kind]) as mount:
        data: DataChoice = "in-place" if layout == "shared" else "auto"
        _never_in_the_middle(mount, tmp_path, layout, NATIVE, data)


def test_a_raw_disk_becomes_larger_than_its_file_system(tmp_path: Path) -> None:
    """Only data takes space there."""
    with mounted_file_system(tmp_path, "ext4", 64 * MIB) as mount:
        base = mount / "base"
        base.write_bytes(b"b" * MIB)
        top = create(tmp_path / "top.qcow2", backing=base, backing_format="raw")
        qemu_img("resize", "-q", top, str(DISK))
        qemu_io(top, f"write -q -P 7 {100 * MIB} 64k")
        expected = content(top)
        plan = chainmerge.plan(top, access=Access(sole_user=True, allow_backing=(str(mount),)))
        assert plan.space.allocates == 64 * KIB
        chainmerge.merge(top, access=Access(sole_user=True, allow_backing=(str(mount),)))
        assert content(base, "raw") == expected
        assert _allocated(base) < 2 * MIB


@pytest.mark.parametrize("preallocated", [False, True])
def test_zeros_take_no_space_in_a_raw_image(tmp_path: Path, preallocated: bool) -> None:
    base = tmp_path / "base"
    with base.open("wb") as file:
        file.write(b"b" * MIB)
        if preallocated:
            os.posix_fallocate(file.fileno(), 0, DISK)
        file.truncate(DISK)
    top = create(tmp_path / "top.qcow2", backing="base", backing_format="raw")
    qemu_io(top, f"write -q -z 256k {100 * MIB}", "write -q -z 120M 64k", "write -q -P 3 126M 64k")
    expected, held = content(top), _allocated(base)
    chainmerge.merge(top)
    assert content(base, "raw") == expected
    if preallocated:
        assert _allocated(base) >= held
    else:
        assert _allocated(base) <= MIB


def test_holes_of_an_external_data_file(tmp_path: Path) -> None:
    with mounted_file_system(tmp_path, "ext4", SIZES["ext4"]) as mount:
        data = mount / "data"
        base = create(tmp_path / "base", DISK, data_file=str(data), data_file_raw="on")
        top = _overlay(base, tmp_path)
        expected = content(top)
        access = Access(sole_user=True, allow_data_file=(str(data),))
        _leave_free(mount, DATA - 4 * MIB)
        held, before = _allocated(data), base.read_bytes()
        assert not chainmerge.plan(top, access=access).feasible
        with pytest.raises(FileSystemFull):
            chainmerge.merge(top, access=access)
        assert (_allocated(data), base.read_bytes()) == (held, before)
        _leave_free(mount, DATA + 4 * MIB)
        chainmerge.merge(top, access=access)
        assert content(base) == expected
