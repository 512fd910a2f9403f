# SPDX-License-Identifier: Apache-2.0
"""What is known from the last scan: used where it is still true, and never needed."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chainmerge
from chainmerge import Access, ScanOptions, ScanReport
from chainmerge.inventory import cache
from chainmerge.records.history import history_file, scans_of
from tests.inventory.findings.building import chain
from tests.support import loopdev, machine
from tests.support.images import MIB
from tests.support.qemu import create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLES = ("scan_images_1", "scan_chains_1")


@pytest.fixture(autouse=True)
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it lies; what was written a moment ago counts as settled."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(cache, "_SETTLED_NS", -(10**9))
    return tmp_path / "state" / "chainmerge" / "history.sqlite"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    place.mkdir()
    return place


@contextlib.contextmanager
def opened(history: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(history)) as database, database:
        yield database


def rows(history: Path) -> list[int]:
    with opened(history) as database:
        return [database.execute(f"SELECT count(*) FROM {one}").fetchone()[0] for one in TABLES]


def scanned(*places: Path, access: Access | None = None) -> ScanReport:
    return chainmerge.scan(places, access)


def with_other_values(history: Path) -> None:
    """Have what is known be something that nobody would read from the images."""
    with opened(history) as database:
        for table, field in zip(TABLES, ("snapshots", "bytes_to_copy"), strict=True):
            for key, value in database.execute(f"SELECT key, value FROM {table}").fetchall():
                changed = json.dumps(json.loads(value) | {field: 77}).encode()
                database.execute(f"UPDATE {table} SET value = ? WHERE key = ?", (changed, key))


def marks(report: ScanReport) -> tuple[list[int], list[int | None]]:
    """Which images and chains come from what was known, after :func:`with_other_values`."""
    return [one.snapshots for one in report.images], [one.bytes_to_copy for one in report.chains]


def test_what_has_not_changed_is_not_read(home: Path, history: Path) -> None:
    chain(home, "disk", 3)
    first = scanned(home)
    assert rows(history) == [3, 1]
    second = scanned(home)
    assert (second.images, second.chains) == (first.images, first.chains)
    with_other_values(history)
    assert marks(scanned(home)) == ([77, 77, 77], [77])
    assert chainmerge.scan([home], options=ScanOptions(cache=False)).chains == first.chains


def test_what_has_changed_is_read(home: Path, history: Path) -> None:
    images = chain(home, "disk", 3)
    scanned(home)
    with_other_values(history)
    qemu_img("snapshot", "-c", "one", images[1])
    assert marks(scanned(home)) == ([77, 1, 77], [2 * MIB])


def test_a_time_that_was_set_back_deceives_nobody(home: Path, history: Path) -> None:
    image = chain(home, "disk", 1)[0]
    scanned(home)
    with_other_values(history)
    status = image.stat()
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(b"x")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert marks(scanned(home))[0] == [0]


def test_a_new_branch_is_another_chain(home: Path, history: Path) -> None:
    images = chain(home, "disk", 3)
    assert scanned(home).chains[0].base == str(images[0])
    with_other_values(history)
    create(home / "clone.qcow2", backing=images[1])
    report = scanned(home)
    assert {one.base for one in report.chains} == {None}
    assert marks(report)[1] == [0, 0]


def test_what_is_allowed_counts(home: Path, tmp_path: Path, history: Path) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    create(home / "over.qcow2", backing=chain(place, "base", 1)[0])
    allowed = Access(allow_backing=(str(place),))
    assert scanned(home, access=allowed).chains[0].images == 2
    # What lies elsewhere is reached from above, and its header read every time.
    assert rows(history) == [1, 1]
    assert scanned(home).chains[0].images is None


def test_what_was_written_a_moment_ago_is_not_kept(
    home: Path, history: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(home, "disk", 2)
    monkeypatch.setattr(cache, "_SETTLED_NS", 3600 * 10**9)
    scanned(home)
    assert rows(history) == [0, 0]


def test_a_device_is_always_read(home: Path, tmp_path: Path, history: Path) -> None:
    if not machine.has_loop_devices():
        pytest.skip("needs loop devices")
    with loopdev.loop_device(tmp_path / "volume", 8 * MIB) as device:
        create(device, 16 * MIB)
        create(home / "over.qcow2", backing=device)
        for snapshots in (0, 1):
            report = scanned(device, home)
            assert [one.snapshots for one in report.images] == [snapshots, 0]
            assert rows(history) == [1, 0]
            qemu_img("snapshot", "-c", f"{snapshots}", device)


def test_damage_is_read_again(home: Path, history: Path) -> None:
    image = chain(home, "disk", 1)[0]
    image.write_bytes(b"QFI\xfb" + bytes(500))
    assert scanned(home).findings == scanned(home).findings != ()
    assert rows(history) == [0, 0]


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + bytes(5000), b""])
def test_a_damaged_file_is_dropped(home: Path, history: Path, content: bytes) -> None:
    chain(home, "disk", 2)
    history.parent.mkdir(parents=True)
    history.write_bytes(content)
    assert len(scanned(home).chains) == 1
    assert rows(history) == [2, 1]


def test_a_damaged_table_is_begun_again_and_the_history_kept(home: Path, history: Path) -> None:
    for name in "abcdefgh":
        chain(home, name, 2)
    scanned(home)
    (line,) = scans_of(str(home))
    with opened(history) as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
        pages = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE tbl_name = 'scan_images_1'"
        ).fetchall()
    with history.open("r+b") as file:
        for (page,) in pages:
            file.seek((page - 1) * size)
            file.write(b"\xee" * size)
    assert len(scanned(home).chains) == 8
    assert scans_of(str(home))[0] == line
    scanned(home)
    assert rows(history) == [16, 8]


def test_damaged_rows_are_read_over(home: Path, history: Path) -> None:
    chain(home, "disk", 2)
    before = scanned(home)
    for value in (b"{", b"[]", b'{"format": 7}', "text", None, 5):
        with opened(history) as database:
            for table in TABLES:
                database.execute(f"UPDATE {table} SET value = ?", (value,))
        assert scanned(home).chains == before.chains


def test_tables_of_another_shape(home: Path, history: Path) -> None:
    chain(home, "disk", 2)
    history.parent.mkdir(parents=True)
    with opened(history) as database:
        database.execute("CREATE TABLE scan_images_1 (something TEXT)")
    assert len(scanned(home).images) == 2


def test_there_may_be_no_place_for_it(home: Path, history: Path) -> None:
    chain(home, "disk", 2)
    history.mkdir(parents=True)
    assert len(scanned(home).chains) == 1
    history.rmdir()
    history.parent.rmdir()
    history.parent.write_text("a file")
    assert len(scanned(home).chains) == 1


def test_another_writer(home: Path, history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_WAIT_SECONDS", 0.05)
    chain(home, "disk", 2)
    scanned(home)
    with contextlib.closing(sqlite3.connect(history, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert len(scanned(home).chains) == 1
    qemu_io(home / "disk1.qcow2", "write -P 9 0 64k")
    with contextlib.closing(sqlite3.connect(history, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert len(scanned(home).chains) == 1
        assert rows(history) == [2, 1]
    scanned(home)
    assert rows(history) == [3, 2]


def test_two_scans_at_once(tmp_path: Path, history: Path) -> None:
    homes = [tmp_path / f"images{number}" for number in range(4)]
    for home in homes:
        home.mkdir()
        chain(home, "disk", 2)
    threads = [threading.Thread(target=scanned, args=(home,)) for home in homes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows(history) == [8, 4]


def test_it_does_not_grow_for_ever(
    home: Path, history: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_ROWS", 3)
    for name in ("a", "b", "c", "d"):
        chain(home, name, 2)
    assert len(scanned(home).images) == 8
    assert rows(history) == [3, 3]


def test_names_that_are_no_text_are_not_kept(home: Path, history: Path) -> None:
    odd = os.fsdecode(b"\xff.qcow2")
    create(home / "x.qcow2", MIB).rename(home / odd)
    create(home / "over.qcow2", MIB)
    qemu_img("rebase", "-u", "-b", odd, "-F", "qcow2", home / "over.qcow2")
    assert scanned(home).chains == scanned(home).chains
    assert rows(history) == [1, 0]


@pytest.mark.parametrize(
    ("said", "place"),
    [("/x", "/x/chainmerge/history.sqlite"), ("x", ""), ("", "")],
)
def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, said: str, place: str) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", said)
    own = Path.home() / ".local/state/chainmerge/history.sqlite"
    default = Path("/var/lib/chainmerge/history.sqlite") if not os.geteuid() else own
    assert history_file() == (Path(place) if place else default)
