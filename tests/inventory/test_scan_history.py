# SPDX-License-Identifier: Apache-2.0
"""Each scan leaves a line, from which the next ones say where things lead."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import Access, DefinedDisk, Limited, ScanOptions, TrendPoint
from chainmerge.records.history import Level, ScanLine, add_scan, scans_of
from chainmerge.storage.storage_names import storage_name
from tests.inventory.findings.building import chain
from tests.support import loopdev, machine
from tests.support.cli import chainmerge as run
from tests.support.images import MIB
from tests.support.qemu import create

if TYPE_CHECKING:
    from pathlib import Path


DAY = 86_400


def levels_of(line: ScanLine, kind: Limited) -> list[Level]:
    return [level for level in line.levels if level.kind == kind]


def grown(place: Path, name: str, images: int) -> None:
    """Have the chain on *name* grow by an image a day, up to *images* yesterday."""
    now = int(time.time())
    for day in range(8, 0, -1):
        add_scan(
            ScanLine(
                at=now - day * DAY,
                places=str(place),
                seconds=1.0,
                images=images,
                chains=1,
                longest=images - day,
                occupied_bytes=MIB,
                freed_bytes=0,
                levels=(Level(Limited.CHAIN, name, images - day + 1, 0, f"{place}/old"),),
            )
        )


def test_what_a_scan_leaves(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 3)
    create(tmp_path / "clone.qcow2", backing=images[0])
    before = int(time.time())
    report = chainmerge.scan([tmp_path])
    (line,) = scans_of(str(tmp_path))
    assert before <= line.at == report.scanned_at
    assert (line.images, line.chains, line.longest) == (4, 2, 3)
    assert (line.occupied_bytes, line.freed_bytes) == (report.occupied_bytes, report.freed_bytes)
    assert line.seconds > 0
    assert levels_of(line, Limited.CHAIN) == [
        Level(Limited.CHAIN, str(images[0]), 3, 0, str(images[2]))
    ]
    (room,) = levels_of(line, Limited.FILE_SYSTEM)
    assert room.name == storage_name(tmp_path)
    assert 0 < room.value < room.limit


def test_an_image_on_a_device(tmp_path: Path) -> None:
    if not machine.has_loop_devices():
        pytest.skip("needs loop devices")
    with loopdev.loop_device(tmp_path / "volume", 8 * MIB) as device:
        create(device, 16 * MIB)
        report = chainmerge.scan([device])
        (line,) = scans_of(report.places[0])
    (level,) = levels_of(line, Limited.DEVICE)
    assert (level.name, level.limit) == (str(device), 8 * MIB)
    assert 0 < level.value < MIB


def test_when_a_chain_reaches_its_limit(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 9)
    grown(tmp_path, str(images[0]), 8)
    options = ScanOptions(length_limit=20)
    (found,) = chainmerge.scan([tmp_path], options=options).forecasts
    assert (found.kind, found.name, found.image) == ("chain", str(images[0]), str(images[8]))
    assert (found.value, found.limit, found.scans) == (9, 20, 9)
    assert found.reached_at == pytest.approx(time.time() + 11 * DAY, abs=DAY)
    ran = run("scan", tmp_path, "--length-limit", "30")
    day = time.strftime("%Y-%m-%d", time.localtime(time.time() + 21 * DAY))
    assert "If it goes on like this" in ran.out
    assert "disk8.qcow2 has 9 of 30 images, and reaches that limit about" in ran.out
    assert day[:7] in ran.out


def test_without_the_history_nothing_is_foretold(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 9)
    grown(tmp_path, str(images[0]), 8)
    assert chainmerge.scan([tmp_path], options=ScanOptions(history=False)).forecasts == ()
    assert len(scans_of(str(tmp_path))) == 8


def test_trends_of_a_report(tmp_path: Path) -> None:
    images = chain(tmp_path, "disk", 3)
    grown(tmp_path, str(images[0]), 8)
    found = chainmerge.picture_chains([tmp_path])
    assert len(found.trends) == 9
    assert found.trends[0] == TrendPoint(found.trends[0].at, 0, MIB, 0)
    assert (found.trends[-1].at, found.trends[-1].longest) == (found.made_at, 3)
    page = tmp_path / "page.html"
    assert run("report", "-q", tmp_path, "-o", page).status == 0
    assert page.read_text().count("Trend: ") == 3
    without = chainmerge.picture_chains([tmp_path], options=ScanOptions(history=False))
    assert (without.trends, without.forecasts) == ((), ())


def test_what_snapshots_rename_is_one_scope(tmp_path: Path) -> None:
    first, second = chain(tmp_path, "disk", 2)
    for active in (first, second):
        disks = (DefinedDisk("vm", "vda", str(active), running=False),)
        report = chainmerge.scan(domains=disks)
        assert (report.scope, report.places) == (("libvirt",), (str(active),))
    assert len(scans_of("libvirt")) == 2
    assert chainmerge.scan([tmp_path], domains=disks).scope == (str(tmp_path), "libvirt")
    assert chainmerge.scan([second], domains=disks).scope == (str(second), "libvirt")
    assert chainmerge.scan([second]).scope == (str(second),)


def test_what_is_scanned_elsewhere_is_another_history(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        chain(tmp_path / name, "disk", 2)
        chainmerge.scan([tmp_path / name], Access())
    assert len(scans_of(str(tmp_path / "a"))) == 1
    assert scans_of(str(tmp_path)) == ()
