# SPDX-License-Identifier: Apache-2.0
"""Merges of images that stand on one that only QEMU reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

import chainmerge
from chainmerge.chain.foreign.content import ForeignContent
from chainmerge.options import Access, MergeOptions
from chainmerge.planning.errors import BaseForeign
from tests.support.cli import chainmerge as command
from tests.support.foreign import (
    DISK,
    FEW_KINDS,
    KIB,
    KINDS,
    MIB,
    Kind,
    foreign_image,
    virtual_size,
)
from tests.support.qemu import assert_clean, content, create, dirty_ranges, info, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

# Clusters of what is merged into are larger: some need what is below.
UNEVEN: Final = {"lower": 64 * KIB, "upper": 4 * KIB}
EVEN: Final = {"lower": 64 * KIB, "upper": 64 * KIB}


def stand(root: Path, kind: Kind, clusters: dict[str, int], size: int = DISK) -> list[Path]:
    """Two images on a root, each with a checkpoint and data of its own."""
    below, fmt = root, kind.format
    images = []
    for name, cluster_size in clusters.items():
        image = root.with_name(f"{name}.qcow2")
        create(image, size, backing=below, backing_format=fmt, cluster_size=cluster_size)
        qemu_img("bitmap", "--add", image, "day")
        below, fmt = image, "qcow2"
        images.append(image)
    lower, upper = images
    qemu_io(lower, "write -q -P 0x44 512k 128k", "write -q -P 0x45 3M 64k")
    qemu_io(
        upper,
        "write -q -P 0x55 4k 4k",
        "write -q -P 0x56 768k 64k",
        "write -q -P 0x57 7340k 8k",
        "write -q -z 7M 64k",
    )
    return images


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images for which QEMU was started."""
    names: list[str] = []
    serve = ForeignContent._serve

    def noted(self: ForeignContent) -> object:
        names.append(self.name)
        return serve(self)

    monkeypatch.setattr(ForeignContent, "_serve", noted)
    return names


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_images_above_are_merged(tmp_path: Path, kind: Kind) -> None:
    root = foreign_image(tmp_path, kind)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    size = virtual_size(root, kind.format)
    lower, upper = stand(root, kind, UNEVEN, size)
    before = content(upper)
    report = chainmerge.merge(upper, lower)
    assert report.outcome == "merged"
    assert content(lower) == before
    assert_clean(lower)
    assert info(lower)["backing-filename-format"] == kind.format
    assert {one.start for one in dirty_ranges(lower, "day")} >= {512 * KIB, 3 * MIB}
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_qemu_reads_what_a_cluster_needs_and_nothing_else(
    tmp_path: Path, kind: Kind, started: list[str]
) -> None:
    root = foreign_image(tmp_path, kind)
    lower, upper = stand(root, kind, EVEN)
    before = content(upper)
    chainmerge.plan(upper, lower)
    chainmerge.merge(upper, lower)
    assert content(lower) == before
    assert started == []

    lower, upper = stand(root, kind, UNEVEN)
    before = content(upper)
    chainmerge.plan(upper, lower)
    assert started == []
    chainmerge.merge(upper, lower)
    assert content(lower) == before
    assert set(started) == {str(root)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_its_data_is_pulled_up(tmp_path: Path, kind: Kind) -> None:
    root = foreign_image(tmp_path, kind)
    lower, upper = stand(root, kind, UNEVEN, virtual_size(root, kind.format))
    before = content(upper)
    plan = chainmerge.plan_flatten(upper)
    assert plan.feasible
    chainmerge.flatten(upper)
    assert "backing-filename" not in info(upper)
    assert content(upper) == before
    assert_clean(upper)
    assert info(lower)["backing-filename-format"] == kind.format


def test_it_goes_where_it_may(tmp_path: Path) -> None:
    root = foreign_image(tmp_path, Kind("vdi"))
    lower, upper = stand(root, Kind("vdi"), UNEVEN)
    before = content(upper)
    report = chainmerge.flatten(upper, options=MergeOptions(delete=True))
    assert set(report.deleted) == {str(root), str(lower)}
    assert content(upper) == before
    assert not root.exists()


def test_zeros_are_not_pulled_up_as_data(tmp_path: Path) -> None:
    for kind in FEW_KINDS:
        root = foreign_image(tmp_path, kind, kind.name)
        leaf = create(tmp_path / f"{kind.name}.qcow2", backing=root, backing_format=kind.format)
        # QEMU's vhdx driver does not tell of any.
        options = MergeOptions(detect_zeroes=kind.format == "vhdx")
        chainmerge.flatten(leaf, options=options)
        assert content(leaf) == content(root, kind.format)
        assert leaf.stat().st_blocks * 512 < DISK - MIB, kind


@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_a_pull_onto_it(tmp_path: Path, kind: Kind) -> None:
    root = foreign_image(tmp_path, kind)
    lower, upper = stand(root, kind, UNEVEN)
    before = content(upper)
    chainmerge.merge(upper, lower, options=MergeOptions(direction="pull"))
    assert content(upper) == before
    found = info(upper)
    assert found["backing-filename-format"] == kind.format
    assert found["backing-filename"].endswith(root.name)


@pytest.mark.parametrize("size", [DISK // 2, DISK - 12 * KIB, 2 * DISK])
def test_disks_of_other_sizes_than_its_own(tmp_path: Path, size: int) -> None:
    kind = FEW_KINDS[0]
    for way in ("commit", "pull"):
        directory = tmp_path / way
        directory.mkdir()
        root = foreign_image(directory, kind)
        lower, upper = stand(root, kind, UNEVEN, 2 * DISK)
        for image in (lower, upper):
            shrink = ["--shrink"] if size < 2 * DISK else []
            qemu_img("resize", "-q", *shrink, image, str(size))
        before = content(upper)
        chainmerge.merge(upper, lower, options=MergeOptions(direction=way))
        assert content(lower if way == "commit" else upper) == before


@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_nothing_is_merged_into_it(tmp_path: Path, kind: Kind) -> None:
    root = foreign_image(tmp_path, kind)
    lower, _ = stand(root, kind, EVEN)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for top in ("upper.qcow2", "lower.qcow2"):
        result = command("merge", "--base", root, tmp_path / top)
        assert result.status == 3
        assert f"is a {kind.format} image" in " ".join(result.err.split())
    with pytest.raises(BaseForeign):
        chainmerge.merge(lower, root, options=MergeOptions(engine="qemu"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_by_qemus_engine(tmp_path: Path) -> None:
    for kind in FEW_KINDS:
        directory = tmp_path / kind.name
        directory.mkdir()
        root = foreign_image(directory, kind)
        lower, upper = stand(root, kind, UNEVEN)
        before = content(upper)
        chainmerge.merge(upper, lower, options=MergeOptions(engine="qemu"))
        assert content(lower) == before


def test_an_external_data_file_above_it(tmp_path: Path) -> None:
    root = foreign_image(tmp_path, KINDS[0])
    lower = tmp_path / "lower.qcow2"
    data = tmp_path / "lower.data"
    create(lower, DISK, backing=root, backing_format="vmdk", data_file=str(data))
    qemu_io(lower, "write -q -P 0x44 512k 128k")
    upper = create(tmp_path / "upper.qcow2", backing=lower)
    qemu_io(upper, "write -q -P 0x55 4k 4k")
    before = content(upper)
    chainmerge.merge(upper, lower, Access(allow_data_file=(str(data),)))
    assert content(lower) == before


@pytest.mark.parametrize("kind", FEW_KINDS, ids=lambda kind: kind.name)
def test_what_only_looks_shows_it(tmp_path: Path, kind: Kind) -> None:
    root = foreign_image(tmp_path, kind)
    lower, upper = stand(root, kind, EVEN)
    found = chainmerge.inspect(upper).images
    assert (found[0].format, found[0].virtual_size) == (kind.format, DISK)
    assert found[0].allocated_bytes is None
    (chain,) = chainmerge.list_chains(tmp_path).chains
    assert (chain.leaf, chain.images, chain.problem) == (str(upper), 3, None)
    assert chain.base == str(lower)
    assert chainmerge.check_image(upper).corruptions == 0
    for name in ("info", "check", "measure", "plan"):
        assert command(name, upper).status == 0
    for name in ("list", "status"):
        assert command(name, tmp_path).status == 0


def test_a_root_that_cannot_be_read_refuses_the_merge_alone(tmp_path: Path) -> None:
    root = foreign_image(tmp_path, Kind("vdi"))
    lower, upper = stand(root, Kind("vdi"), EVEN)
    with root.open("r+b") as file:
        file.seek(0x40)
        file.write(b"nope")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = command("merge", "--base", lower, upper)
    assert result.status == 3
    assert "the vdi image" in " ".join(result.err.split())
    assert "its size is not known" in " ".join(command("info", upper).out.split())
    assert command("check", upper).status == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
