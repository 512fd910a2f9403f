# SPDX-License-Identifier: Apache-2.0
"""Where a scan looks, what it says of images in use, and what it writes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge import Access, ProgressEvent, ScanOptions, ScanReport, Severity, Stage
from chainmerge.errors import ExitCode
from chainmerge.inventory import places, scanning
from chainmerge.inventory import scan as scan_module
from chainmerge.inventory.errors import PlaceTooLarge, PlaceUnreadable, TablesNotWritten
from chainmerge.inventory.tables import TABLES_VERSION
from chainmerge.options import OptionUnusable
from tests.inventory.findings.building import age, chain
from tests.support import damage, loopdev, machine
from tests.support.cli import chainmerge as command
from tests.support.images import GIB, MIB
from tests.support.qemu import create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.fake_lvm import FakeLvm

NO_CACHE = ScanOptions(cache=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory of images that nothing else is in."""
    place = tmp_path / "images"
    place.mkdir()
    return place


def scanned(*paths: Path | str, **options: Any) -> ScanReport:
    return chainmerge.scan(paths, options=ScanOptions(cache=False, **options))


def names(report: ScanReport) -> list[str]:
    return [Path(image.path).name for image in report.images]


def codes(report: ScanReport) -> list[str]:
    return [finding.code for finding in report.findings]


# What is reported


def test_images_and_chains(home: Path) -> None:
    images = chain(home, "disk", 3)
    qemu_img("bitmap", "--add", "-g", "65536", images[2], "daily")
    qemu_img("snapshot", "-c", "before", images[2])
    create(home / "clone.qcow2", backing=images[1])
    report = scanned(home)
    found = {Path(image.path).name: image for image in report.images}
    assert list(found) == ["clone.qcow2", "disk0.qcow2", "disk1.qcow2", "disk2.qcow2"]
    assert {name: (one.depth, one.children) for name, one in found.items()} == {
        "clone.qcow2": (3, 0),
        "disk0.qcow2": (1, 1),
        "disk1.qcow2": (2, 2),
        "disk2.qcow2": (3, 0),
    }
    top = found["disk2.qcow2"]
    assert (top.parent, top.backing, top.format) == (str(images[1]), "disk1.qcow2", "qcow2")
    assert [(one.name, one.state, one.granularity) for one in top.bitmaps] == [
        ("daily", "valid", 65536)
    ]
    assert top.snapshots == 1
    assert top.users == ()
    assert top.written_at == int(images[2].stat().st_mtime)
    assert {Path(one.leaf).name for one in report.chains} == {"clone.qcow2", "disk2.qcow2"}
    assert report.occupied_bytes == sum(one.stat().st_blocks * 512 for one in home.iterdir())
    listed = chainmerge.list_chains(home)
    assert (report.chains, report.freed_bytes) == (listed.chains, listed.freed_bytes)


def test_bytes_of_bitmaps_are_those_of_the_file(home: Path) -> None:
    image = create(home / "disk.qcow2", 16 * MIB)
    qemu_img("bitmap", "--add", image, "daily")
    (without,) = scanned(home).images[0].bitmaps
    qemu_io(image, "write -P 1 0 64k")
    (written,) = scanned(home).images[0].bitmaps
    # A table of one cluster, and a cluster of bits once there are any.
    assert (without.stored_bytes, written.stored_bytes) == (65536, 131072)


@pytest.mark.parametrize("length", [2, 3, 5])
def test_a_merge_frees_what_a_scan_says(home: Path, length: int) -> None:
    images = chain(home, "disk", length)
    report = scanned(home, hidden=1)
    (finding,) = report.findings
    assert finding.evidence["hidden_bytes"] == (length - 1) * MIB == report.freed_bytes
    before = sum(one.stat().st_blocks * 512 for one in home.iterdir())
    chainmerge.merge(
        images[-1], images[0], options=chainmerge.MergeOptions(delete=True, keep_name=True)
    )
    freed = before - sum(one.stat().st_blocks * 512 for one in home.iterdir())
    # The tables of the images that are gone come on top.
    assert 0 <= freed - finding.evidence["hidden_bytes"] <= length * MIB // 2


def test_severities_of_a_long_chain(home: Path) -> None:
    chain(home, "disk", 4)
    lengths = {"length_info": 2, "length_warning": 3, "length_critical": 4, "length_limit": 5}
    expected = [
        ({"length_critical": 5}, Severity.WARNING),
        ({}, Severity.CRITICAL),
        ({"length_warning": 5, "length_critical": 5}, Severity.INFO),
        ({"length_critical": 9, "length_limit": 4}, Severity.CRITICAL),
    ]
    for changed, severity in expected:
        (finding,) = scanned(home, **(lengths | changed)).findings
        assert (finding.code, finding.severity) == ("long-chain", severity)
        assert finding.evidence == {"images": 4}


def test_an_image_in_between_may_have_been_merged_under(home: Path) -> None:
    """An idle overlay above a merge is no warning: the merge writes to the header below it."""
    images = chain(home, "disk", 4)
    chainmerge.merge(images[1], images[0], options=chainmerge.MergeOptions(delete=True))
    (finding,) = scanned(home).findings
    assert (finding.code, finding.severity) == ("base-written-later", Severity.INFO)
    assert finding.image == str(images[3])


def test_an_overlay_that_a_merge_left_behind_is_a_warning(home: Path) -> None:
    images = chain(home, "disk", 2)
    chainmerge.merge(images[1], images[0])
    (finding,) = scanned(home).findings
    assert (finding.code, finding.severity) == ("base-written-later", Severity.WARNING)


def test_a_merge_on_xfs_frees_what_a_scan_says(tmp_path: Path) -> None:
    if "xfs" not in machine.mountable_file_systems():
        pytest.skip("needs XFS")
    with loopdev.mounted_file_system(tmp_path, "xfs", 400 * MIB) as place:
        images = chain(place, "disk", 4)
        for image in images:
            # XFS reserves space behind the end of files that grow, which this gives back.
            os.truncate(image, image.stat().st_size)
        hidden = scanned(place).freed_bytes
        assert hidden == 3 * MIB
        before = loopdev.settled_free_bytes(place)
        options = chainmerge.MergeOptions(delete=True, keep_name=True)
        chainmerge.merge(images[-1], images[0], options=options)
        freed = loopdev.settled_free_bytes(place) - before
        assert 0 <= freed - hidden <= 2 * MIB


# Where it looks


def test_the_current_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain(home, "disk", 1)
    monkeypatch.chdir(home)
    report = chainmerge.scan(options=NO_CACHE)
    assert (names(report), report.places) == (["disk0.qcow2"], (str(home),))


def test_an_image_brings_those_below_it(home: Path) -> None:
    images = chain(home, "disk", 3)
    assert names(scanned(images[1])) == ["disk0.qcow2", "disk1.qcow2"]


def test_several_places_and_the_same_twice(home: Path) -> None:
    for name in ("a", "b"):
        (home / name).mkdir()
        chain(home / name, name, 2)
    report = scanned(home / "a", home / "b", home / "a" / "a0.qcow2")
    assert names(report) == ["a0.qcow2", "a1.qcow2", "b0.qcow2", "b1.qcow2"]
    assert len(report.chains) == 2
    assert names(scanned(home, home / "a")) == names(report)


def test_links_to_directories_are_not_followed(home: Path) -> None:
    (home / "below").mkdir()
    chain(home / "below", "disk", 1)
    (home / "below" / "loop").symlink_to(home)
    (home / "again").symlink_to(home / "below")
    assert names(scanned(home)) == ["disk0.qcow2"]
    assert names(scanned(home / "again")) == ["disk0.qcow2"]


def test_the_way_up_from_behind_a_link(home: Path, tmp_path: Path) -> None:
    """It leads to where the linked directory lies, and not back."""
    place = tmp_path / "elsewhere" / "overlays"
    place.mkdir(parents=True)
    create(place.parent / "base.qcow2", MIB)
    (home / "link").symlink_to(place)
    for name, backing in (("middle", "../base"), ("top", "middle")):
        named = ("-b", f"{backing}.qcow2", "-F", "qcow2", home / "link" / f"{name}.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", *named)
    top = home / "link" / "top.qcow2"
    access = Access(allow_backing=(str(place.parent),))
    report = chainmerge.scan((top,), access, NO_CACHE)
    assert sorted(names(report)) == ["base.qcow2", "middle.qcow2", "top.qcow2"]
    assert codes(report) == []


def test_what_cannot_be_looked_at_below_is_no_loop(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows that anything is lost, and `relink` would change what is right."""
    images = chain(home, "disk", 3)
    stamp_of = scanning.stamp_of

    def suspended(path: str) -> Any:
        return None if path == str(images[0]) else stamp_of(path)

    monkeypatch.setattr(scan_module, "stamp_of", suspended)
    assert "orphan" not in codes(scanned(images[2]))


def test_what_is_mounted_below(home: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    chain(home, "disk", 1)
    (home / "mounted").mkdir()
    with loopdev.mounted_tmpfs(home / "mounted", 64 * MIB) as place:
        chain(place, "other", 1)
        report = scanned(home)
        assert names(report) == ["disk0.qcow2"]
        assert any("--all-file-systems" in sentence for sentence in report.left_out)
        everything = scanned(home, one_file_system=False)
        assert (names(everything), everything.left_out) == (["disk0.qcow2", "other0.qcow2"], ())


def test_another_directory_is_followed_where_it_is_allowed(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    base = chain(place, "base", 1)[0]
    create(home / "over.qcow2", backing=base)
    assert codes(scanned(home)) == ["backing-file-outside"]
    report = chainmerge.scan([home], Access(allow_backing=(str(place),)), NO_CACHE)
    assert (names(report), codes(report)) == (["base0.qcow2", "over.qcow2"], [])
    assert report.chains[0].images == 2
    # What is only stood on is no leaf.
    create(place / "alone.qcow2", backing=base)
    report = chainmerge.scan([home], Access(allow_backing=(str(place),)), NO_CACHE)
    assert [Path(one.leaf).name for one in report.chains] == ["over.qcow2"]


def test_places_that_are_none(home: Path) -> None:
    for place in (home / "missing", "a\0b", ""):
        with pytest.raises((PlaceUnreadable, OptionUnusable)):
            chainmerge.scan([place])
    ran = command("scan", home / "missing")
    assert (ran.status, "No such file" in ran.err) == (ExitCode.REFUSED, True)


def test_a_place_can_be_too_large(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (home / f"{number}").mkdir()
        (home / f"{number}" / "file").touch()
    monkeypatch.setattr(places, "MAX_FILES_OF_A_SCAN", 3)
    with pytest.raises(PlaceTooLarge, match="3 files"):
        scanned(home)
    monkeypatch.setattr(places, "MAX_FILES_OF_A_SCAN", 4)
    assert scanned(home).images == ()
    monkeypatch.setattr(places, "MAX_DIRECTORIES_OF_A_SCAN", 4)
    with pytest.raises(PlaceTooLarge, match="4 directories"):
        scanned(home)


def test_volumes_of_a_group(home: Path, tmp_path: Path, fake_lvm: FakeLvm) -> None:
    store = tmp_path / "store"
    store.mkdir()
    fake_lvm.add_group("vg-1", 10, [])
    for image in chain(store, "lv", 2):
        os.truncate(image, 4 * MIB)
        fake_lvm.add_volume("vg-1", image.stem, image)
    idle = store / "idle"
    idle.touch()
    os.truncate(idle, 4 * MIB)
    fake_lvm.add_volume("vg-1", "idle", idle)
    fake_lvm.activate_as("idle", "")
    report = scanned("vg-1")
    assert (report.places, names(report)) == (("vg-1",), ["lv0.qcow2", "lv1.qcow2"])
    assert report.left_out == (f"{idle} is not active",)
    with pytest.raises(PlaceUnreadable):
        scanned("vg-2")


# Images that somebody has open


@contextlib.contextmanager
def held_open(image: Path) -> Iterator[None]:
    with image.open("rb") as file:
        process = subprocess.Popen(["sleep", "600"], stdin=file)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_what_a_guest_writes_to_may_be_stale(home: Path) -> None:
    base, top = chain(home, "disk", 2)
    qemu_img("bitmap", "--add", top, "daily")
    damage.mark_in_use(top, "daily")
    damage.leak_clusters(top, 3)
    qemu_io(base, "write -P 9 0 64k")
    assert codes(scanned(home, check=True)) == [
        "base-written-later", "broken-bitmap", "leaked-clusters",
    ]  # fmt: skip
    with held_open(top):
        report = scanned(home, check=True)
    assert [image.may_be_stale for image in report.images] == [False, True]
    assert codes(report) == []


def test_images_that_domains_use(home: Path) -> None:
    base, top = chain(home, "disk", 2)
    other = chain(home, "other", 1)[0]
    disk = chainmerge.DefinedDisk("vm", "vda", str(top), True)
    lost = chainmerge.DefinedDisk("vm", "vdb", str(home / "lost.qcow2"), True)
    report = chainmerge.scan([home], options=NO_CACHE, domains=(disk, lost))
    assert [(one.code, one.image) for one in report.findings] == [("unused-image", str(other))]
    assert report.left_out == (f"{lost.path}, disk vdb of domain vm, is not there",)
    with held_open(other):
        assert chainmerge.scan([home], options=NO_CACHE, domains=(disk,)).findings == ()
    alone = chainmerge.scan(options=NO_CACHE, domains=(disk,))
    assert names(alone) == [base.name, top.name]
    for odd in ("vm", ["vm"], ("vm",)):
        with pytest.raises(OptionUnusable):
            chainmerge.scan([home], domains=odd)  # type: ignore[arg-type]


@pytest.mark.parametrize("percent", [10, 60])
def test_a_volume_that_will_run_full(home: Path, tmp_path: Path, percent: int) -> None:
    if not machine.has_loop_devices():
        pytest.skip("needs loop devices")
    with loopdev.loop_device(tmp_path / "volume", 16 * MIB) as device:
        create(device, GIB)
        assert scanned(device, free_warning=percent).findings == ()
        qemu_io(device, "write -P 1 0 8M")
        report = scanned(device, free_warning=percent)
        found = [(one.code, one.image) for one in report.findings]
        assert found == ([("device-filling", str(device))] if percent == 60 else [])
        assert report.images[0].file_size == 16 * MIB
        assert report.images[0].occupied_bytes is None
    assert home.exists()


def test_the_marks_of_age_are_those_of_the_base(home: Path) -> None:
    base, _ = chain(home, "disk", 2)
    age(base, 40)
    (finding,) = scanned(home).findings
    assert finding.evidence == {"days": 40}
    assert scanned(home, old_days=41).findings == ()


def test_what_this_user_may_not_read_is_not_lost(home: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    (home / "closed").mkdir()
    base = chain(home / "closed", "base", 1)[0]
    create(home / "a.qcow2", backing=base)
    low, _ = chain(home, "disk", 2)
    for parent in (home, *home.parents):
        parent.chmod(parent.stat().st_mode | 0o55)
    (home / "closed").chmod(0o700)
    low.chmod(0o600)
    script = (
        "import os, sys; from chainmerge import ScanOptions, scan;"
        "os.setgid(65534); os.setuid(65534);"
        "report = scan(sys.argv[1:], options=ScanOptions(cache=False));"
        "print([(one.severity.value, one.code) for one in report.findings], report.left_out)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, home], capture_output=True, text=True, check=True
    )
    found = [("warning", "access-denied"), ("warning", "cannot-open")]
    assert ran.stdout.startswith(f"{found} ('{home}/closed cannot be listed: "), ran.stdout


# Hostile images


def test_a_hostile_header_is_a_finding(home: Path) -> None:
    for number in range(3):
        (home / f"{number}.qcow2").write_bytes(b"QFI\xfb" + bytes([number]) * 200)
    os.mkfifo(home / "pipe.qcow2")
    (home / "nowhere.qcow2").symlink_to(home / "missing")
    report = scanned(home)
    assert names(report) == ["0.qcow2", "1.qcow2", "2.qcow2"]
    assert [finding.severity for finding in report.findings] == [Severity.CRITICAL] * 3


def test_bitmaps_are_looked_at_up_to_a_limit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = chain(home, "disk", 1)[0]
    for number in range(3):
        qemu_img("bitmap", "--add", image, f"{number}")
    assert len(scanned(home).images[0].bitmaps) == 3
    monkeypatch.setattr(scanning, "MOST_BITMAPS_OF_A_SCAN", 2)
    report = scanned(home)
    assert report.images[0].bitmaps == ()
    assert report.left_out == (f"{image} has 3 bitmaps, which were not looked at",)


def test_names_that_are_no_text(home: Path) -> None:
    odd = home / os.fsdecode(b"a\xff\x1b[31m.qcow2")
    create(home / "x.qcow2", 16 * MIB).rename(odd)
    create(home / "over.qcow2", 16 * MIB)
    qemu_img("rebase", "-u", "-b", odd.name, "-F", "qcow2", home / "over.qcow2")
    ran = command("scan", "--no-cache", "--sqlite", home / "tables", home)
    assert ran.status == ExitCode.DONE, ran.err
    assert all(line.isprintable() for line in ran.out.splitlines())
    assert command("scan", "--no-cache", "--json", "-q", home).json["images"]


# The command


def test_progress(home: Path) -> None:
    chain(home, "disk", 3)
    seen: list[ProgressEvent] = []
    chainmerge.scan([home], options=NO_CACHE, on_progress=seen.append)
    assert [event.stage for event in seen if event.done == event.total] == [
        Stage.IMAGES, Stage.CHAINS,
    ]  # fmt: skip
    assert seen[0] == ProgressEvent(Stage.FIND, done=3)
    ran = command("scan", "--no-cache", home)
    assert "reading images: 3 of 3 images (100 %)\n" in ran.err


def test_the_table(home: Path) -> None:
    chain(home, "a", 2)
    chain(home, "b", 4)
    chain(home, "lost", 2)[0].unlink()
    ran = command("scan", "--no-cache", "--hidden", "1M", home)
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"7 images in 3 chains in {home}: ")
    assert lines[1] == "3 findings: 1 critical, 2 for information"
    assert [line.split()[0] for line in lines[4:7]] == ["b3.qcow2", "a1.qcow2", "lost1.qcow2"]
    assert lines.index("Critical") < lines.index("Info")
    assert command("scan", home / "a0.qcow2", "--no-cache").out.splitlines()[1] == (
        "nothing found that is wrong"
    )


def test_an_empty_place(home: Path) -> None:
    assert command("scan", home).out == f"no qcow2 images in {home}\n"


@pytest.mark.parametrize(
    ("limit", "status"),
    [((), 0), (("--fail-on", "critical"), 0), (("--fail-on", "warning"), ExitCode.UNFINISHED)],
)
def test_the_exit_status(home: Path, limit: tuple[str, ...], status: int) -> None:
    chain(home, "disk", 3)
    ran = command("scan", "--no-cache", "-q", "--length-warning", "3", *limit, home)
    assert ran.status == status
    # Nobody watches: what is as it should be is not told.
    assert ("long-chain" in ran.out) == bool(status)


def test_tables_of_sqlite(home: Path, tmp_path: Path) -> None:
    chain(home, "disk", 3)
    qemu_img("bitmap", "--add", home / "disk2.qcow2", "daily")
    file = tmp_path / "scan.sqlite"
    file.write_text("something else")
    ran = command("scan", "--no-cache", "--sqlite", file, "--hidden", "1M", home)
    assert ran.status == ExitCode.DONE
    assert sorted(one.name for one in tmp_path.iterdir()) == ["images", "scan.sqlite"]
    with contextlib.closing(sqlite3.connect(file)) as tables:
        (version,) = tables.execute("PRAGMA user_version").fetchone()
        assert version == TABLES_VERSION
        assert tables.execute("SELECT path, depth FROM images ORDER BY path").fetchall() == [
            (str(home / f"disk{number}.qcow2"), number + 1) for number in range(3)
        ]
        assert tables.execute("SELECT leaf, images, freed_bytes FROM chains").fetchall() == [
            (str(home / "disk2.qcow2"), 3, 2 * MIB)
        ]
        assert tables.execute("SELECT code, severity FROM findings").fetchall() == [
            ("hidden-bytes", "info")
        ]
        assert tables.execute("SELECT image, name, state FROM bitmaps").fetchall() == [
            (str(home / "disk2.qcow2"), "daily", "valid")
        ]


def test_tables_that_cannot_be_written(home: Path, tmp_path: Path) -> None:
    report = scanned(home)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (tmp_path, tmp_path / "missing" / "x", pipe, Path("/dev/null")):
        with pytest.raises(TablesNotWritten):
            chainmerge.save_scan(report, place)
    assert pipe.is_fifo()
    with pytest.raises(OptionUnusable):
        chainmerge.save_scan("report", tmp_path / "x")  # type: ignore[arg-type]
