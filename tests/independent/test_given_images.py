# SPDX-License-Identifier: Apache-2.0
"""Every operation on images that real guests and other programs have written, judged by QEMU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import pytest
from msgspec import Struct

from tests.support import given, qemu
from tests.support.cli import Ran, chainmerge
from tests.support.images import KIB
from tests.support.readers import assert_readers_agree

SECTOR: Final = 512
ENGINES: Final = {
    "native": ("--engine", "native"),
    "native, metadata": ("--engine", "native", "--verify", "metadata"),
    "native, in place": ("--engine", "native", "--data", "in-place"),
    "qemu": ("--engine", "qemu"),
    "qemu, metadata": ("--engine", "qemu", "--verify", "metadata"),
}


class Given(Struct, frozen=True):
    """A copy of one image, alone in a directory with what it needs."""

    chain: list[Path]

    @property
    def image(self) -> Path:
        return self.chain[-1]

    @property
    def data_file(self) -> Path | None:
        found = self.image.with_suffix(".data")
        return found if found.exists() else None

    @property
    def access(self) -> tuple[str | Path, ...]:
        """What an operator has to allow for this image."""
        return () if self.data_file is None else ("--allow-data-file", self.data_file)

    def is_refused_by(self, engine: str) -> bool:
        """Whether this one of ENGINES cannot write to the image: that is in the plan."""
        return self.data_file is not None and engine.startswith("native")

    def run(self, *command: str | Path, status: int = 0) -> Ran:
        ran = chainmerge(*command, *self.access, "--json")
        assert ran.status == status, ran.out + ran.err
        return ran

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.image.parent.iterdir()}

    def overlay(self) -> Path:
        """What a guest does next: an overlay with the checkpoints of the image, written to."""
        overlay = qemu.create(self.image.with_name("overlay.qcow2"), backing=self.image.name)
        size = qemu.info(self.image)["virtual-size"]
        for name in qemu.bitmap_names(self.image):
            qemu.qemu_img("bitmap", "--add", overlay, name)
        step = max(size // 8 // SECTOR * SECTOR, SECTOR)
        length = min(step // 2 // SECTOR * SECTOR or SECTOR, 100 * KIB)
        qemu.qemu_io(
            overlay,
            f"write -P 201 0 {length}",
            f"write -P 202 {min(step, size - length)} {length}",
            f"write -z {min(3 * step, size - length)} {length}",
            f"write -P 203 {size - SECTOR} {SECTOR}",
        )
        return overlay


@pytest.fixture(params=given.names())
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Given:
    return Given(given.copy_chain(request.param, tmp_path))


def dirty_kib(image: Path) -> dict[str, set[int]]:
    """Which KiB of the disk each bitmap has dirty."""
    return {
        name: {
            kib
            for run in qemu.dirty_ranges(image, name)
            for kib in range(run.start // KIB, -(-(run.start + run.length) // KIB))
        }
        for name in qemu.bitmap_names(image)
    }


def test_looking_changes_nothing(disk: Given) -> None:
    before = disk.files()
    shown = disk.run("info", disk.image).json
    assert [each["path"] for each in shown["images"] if each["in_chain"]]
    checked, judged = disk.run("check", disk.image).json, qemu.check(disk.image)
    assert judged["corruptions"] == 0
    assert checked["leaks"] == judged["leaks"]
    assert disk.run("repair", "--dry-run", disk.image).json["findings"] == []
    listed = disk.run("bitmaps", "list", disk.image).json
    assert sorted(each["name"] for each in listed["rows"]) == sorted(
        name for path in disk.chain if path.suffix == ".qcow2" for name in qemu.bitmap_names(path)
    )
    assert chainmerge("list", disk.image.parent, "--json").status == 0
    assert disk.files() == before


def test_a_data_file_is_read_only_if_it_is_allowed(disk: Given) -> None:
    ran = chainmerge("check", disk.image, "--json")
    if disk.data_file is None:
        assert ran.status == 0
    else:
        assert (ran.status, ran.json["code"]) == (3, "data-file-refused")


def test_a_plan_and_the_measure_of_it_change_nothing(disk: Given) -> None:
    overlay = disk.overlay()
    before = disk.files()
    for engine, options in ENGINES.items():
        refused = disk.is_refused_by(engine)
        planned = disk.run("plan", *options, overlay, status=3 if refused else 0).json
        assert planned["feasible"] != refused
        measured = disk.run("measure", *options, overlay).json
        assert measured["required"] >= measured["optimal"] > 0
    assert disk.files() == before


@pytest.mark.parametrize("engine", ENGINES)
def test_an_overlay_is_merged(disk: Given, engine: str) -> None:
    overlay = disk.overlay()
    shown = qemu.content(overlay)
    old, new = dirty_kib(disk.image), dirty_kib(overlay)
    if disk.is_refused_by(engine):
        before = disk.files()
        refusal = disk.run("merge", *ENGINES[engine], overlay, status=3).json
        assert refusal["code"] == "native-engine-unavailable"
        assert disk.files() == before
        return
    required = disk.run("measure", *ENGINES[engine], overlay).json["required"]
    disk.run("merge", *ENGINES[engine], overlay)
    assert qemu.content(disk.image) == shown
    assert qemu.content(overlay) == shown
    if disk.data_file is None:
        assert_readers_agree(disk.image, shown)
    else:
        assert disk.data_file.read_bytes() == shown
    assert dirty_kib(disk.image) == {name: bits | new[name] for name, bits in old.items()}
    assert disk.image.stat().st_size <= required
    qemu.assert_clean(disk.image)


@pytest.mark.parametrize("engine", ["native", "qemu"])
def test_each_image_of_the_chain_is_merged_into_what_is_below(disk: Given, engine: str) -> None:
    """As they came: down to the root, one after the other."""
    shown = qemu.content(disk.image)
    for below in reversed(disk.chain[:-1]):
        disk.run("merge", "--engine", engine, "--base", below, disk.image)
        fmt = below.suffix[1:]
        assert qemu.content(below, fmt) == shown
        if fmt == "qcow2":
            qemu.assert_clean(below)


def test_an_overlay_is_merged_and_deleted(disk: Given) -> None:
    overlay = disk.overlay()
    shown = qemu.content(overlay)
    disk.run("merge", "--keep-name", "--delete", overlay)
    assert qemu.content(overlay) == shown
    assert not disk.image.exists()
    qemu.assert_clean(overlay)


def test_an_overlay_pulls(disk: Given) -> None:
    overlay = disk.overlay()
    shown, below = qemu.content(overlay), qemu.content(disk.image)
    bits = dirty_kib(overlay)
    disk.run("merge", "--direction", "pull", overlay)
    assert qemu.content(overlay) == shown
    assert qemu.content(disk.image) == below
    assert set(dirty_kib(overlay)) == set(bits)
    qemu.assert_clean(overlay)


def test_an_overlay_is_flattened(disk: Given) -> None:
    overlay = disk.overlay()
    shown = qemu.content(overlay)
    disk.run("flatten", overlay)
    alone = overlay.parent / "alone" / overlay.name
    alone.parent.mkdir()
    shutil.move(overlay, alone)
    assert qemu.content(alone) == shown
    qemu.assert_clean(alone)


def test_the_image_itself_is_flattened(disk: Given) -> None:
    shown = qemu.content(disk.image)
    disk.run("flatten", disk.image)
    assert "backing-filename" not in qemu.info(disk.image)
    assert qemu.content(disk.image) == shown
    qemu.assert_clean(disk.image)


def test_bitmaps_come_and_go(disk: Given) -> None:
    shown, old = qemu.content(disk.image), dirty_kib(disk.image)
    disk.run("bitmaps", "add", disk.image, "of-ours")
    assert dirty_kib(disk.image) == {**old, "of-ours": set()}
    overlay = disk.overlay()
    for name in old:
        qemu.qemu_img("bitmap", "--remove", overlay, name)
    disk.run("bitmaps", "prune", overlay)
    assert set(dirty_kib(disk.image)) == {"of-ours"}
    overlay.unlink()
    disk.run("bitmaps", "remove", disk.image, "of-ours")
    assert dirty_kib(disk.image) == {}
    assert qemu.content(disk.image) == shown
    qemu.assert_clean(disk.image)
