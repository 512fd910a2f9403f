# SPDX-License-Identifier: Apache-2.0
"""A few cases of the fuzzer, and the oracles themselves."""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING

import pytest

from chainmerge.storage.files import FileReadable
from tests.conftest import SOAK
from tests.fuzz import confined
from tests.fuzz.anatomy import anatomy_of
from tests.fuzz.case import Stable, case_of, findings_of, rudeness
from tests.fuzz.confined import run_confined
from tests.fuzz.corpus import BREEDS, ROLES, Breed
from tests.support import surgery
from tests.support.images import Geometry
from tests.support.qemu import content

if TYPE_CHECKING:
    from pathlib import Path

FOUND = (
    # A bitmap's table, or a snapshot's L1 table, behind the end of the file was read all the same.
    "101-166",
    "101-574",
    "104-313",
    # The place of a backing file was judged after it was opened.
    "1-36",
    "1-58",
    # L2 tables behind the end of a file were followed to look for a commit of somebody else.
    "104-506",
    # What large clusters had copied up was taken for a commit of somebody else.
    "7202611-99",
    # Leaks were reclaimed in an image whose header turned out to have no room.
    "7202612-5089",
    # The place of a table without entries was not looked at as QEMU does.
    "7202613-2349",
)
"""Cases that once found something."""


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Stable:
    return Stable(tmp_path_factory.mktemp("stable"))


@pytest.mark.parametrize("seed", FOUND)
def test_what_was_found_once(stable: Stable, seed: str) -> None:
    assert [str(finding) for finding in findings_of(seed, stable)] == []


@pytest.mark.parametrize("seed", range(400 if SOAK else 8))
def test_cases(stable: Stable, seed: int) -> None:
    assert [str(finding) for finding in findings_of(f"test-{seed}", stable)] == []


def test_a_case_is_the_same_each_time(stable: Stable) -> None:
    assert case_of("again", stable) == case_of("again", stable)


@pytest.mark.parametrize("breed", BREEDS if SOAK else BREEDS[1::6], ids=lambda breed: breed.name)
def test_every_kind_of_target_is_there(stable: Stable, breed: Breed) -> None:
    """What is mutated is where all the metadata is."""
    chain = stable.chain(breed)
    for role in chain.qcow2_roles:
        kinds = anatomy_of(chain.image(role).read_bytes()).targets.keys()
        assert {"header", "L1", "L2", "refcount table", "refcount block"} <= kinds
        if breed.geometries[ROLES.index(role)] != Geometry(4096, compat="0.10"):
            assert {"extension", "bitmap directory", "bitmap table", "bitmap data"} <= kinds
    assert len(content(chain.image("top"))) == breed.disk


def test_a_bitmap_directory_as_large_as_a_disk(stable: Stable, tmp_path: Path) -> None:
    """All of its clusters were listed, to see whether the guest's tables lead there."""
    image = tmp_path / "top"
    image.write_bytes(stable.chain(BREEDS[1]).image("root").read_bytes())
    extension = surgery.extension_at(image, surgery.BITMAPS_EXTENSION)
    surgery.put_bytes(image, extension + 8, (4 << 40).to_bytes(8))
    for command in ("check", "repair"):
        (ended,) = run_confined(tmp_path, [(command, str(image))]).ended
        assert not list(rudeness(ended))


# That the oracles can see


def _doing(action: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "chainmerge", action)


def test_memory_without_bound_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _doing(lambda *_: mmap.mmap(-1, 2 << 30), monkeypatch)
    outcome = run_confined(tmp_path, [("anything",)])
    assert any("Cannot allocate memory" in offence for offence in outcome.offences)


def test_time_without_bound_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(*_: str) -> None:
        while time.process_time():
            pass

    monkeypatch.setattr(confined, "CPU_SECONDS", 1)
    _doing(forever, monkeypatch)
    (ended,) = run_confined(tmp_path, [("anything",)]).ended
    assert ended.status is None


def test_other_files_that_are_opened_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    _doing(lambda *_: os.open(tmp_path / "inside/../outside", os.O_RDONLY), monkeypatch)
    outcome = run_confined(tmp_path / "inside", [("anything",)])
    assert any("outside" in offence for offence in outcome.offences)


def test_reads_behind_the_end_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image").write_bytes(b"short")

    def reading(*_: str) -> None:
        with FileReadable(tmp_path / "image") as readable:
            readable.read(1 << 40, 8)

    _doing(reading, monkeypatch)
    outcome = run_confined(tmp_path, [("anything",)])
    assert any(f"8 bytes read at {1 << 40}" in offence for offence in outcome.offences)
