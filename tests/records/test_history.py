# SPDX-License-Identifier: Apache-2.0
"""The history is kept through kills, damage and other writers, and is never in anybody's way."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sqlite3
import time
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from chainmerge.documents.trends import Limited
from chainmerge.records import history
from chainmerge.records.history import (
    Level,
    MergeLine,
    ScanLine,
    add_merge,
    add_scan,
    history_file,
    merges_like,
    scans_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MERGE = MergeLine(
    at=7,
    storage="ext4 UUID=1",
    engine="native",
    verify="full",
    live=False,
    outcome="merged",
    direction="commit",
    images=3,
    merged=2,
    bytes_copied=1 << 40,
    bytes_shared=0,
    clusters=5,
    bytes_freed=3,
    bandwidth=None,
    seconds=2.5,
    copy_seconds=1.5,
)
SCAN = ScanLine(
    at=7,
    places="/images",
    seconds=0.5,
    images=5,
    chains=2,
    longest=3,
    occupied_bytes=1 << 40,
    freed_bytes=6,
    levels=(Level(Limited.CHAIN, "/images/root", 3, 0, "/images/leaf"),),
)


def merges() -> tuple[MergeLine, ...]:
    return merges_like(MERGE.storage, MERGE.engine, MERGE.verify, live=False)


@contextlib.contextmanager
def opened() -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(history_file(), isolation_level=None)) as database:
        yield database


def test_what_is_kept_is_there() -> None:
    for seconds in (2.5, 3.5):
        add_merge(replace(MERGE, seconds=seconds))
        add_scan(replace(SCAN, seconds=seconds))
    assert merges() == (MERGE, replace(MERGE, seconds=3.5))
    assert scans_of("/images") == (replace(SCAN, seconds=2.5), replace(SCAN, seconds=3.5))
    assert len(merges_like(MERGE.storage, "native", "full", live=False, most=1)) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"storage": "ext4 UUID=2"},
        {"engine": "qemu"},
        {"verify": "metadata"},
        {"live": True},
        {"outcome": "finished"},
        {"outcome": "commit-failed", "seconds": None},
        {"bandwidth": 1000},
    ],
)
def test_only_merges_that_tell_of_others_are_read(other: dict[str, object]) -> None:
    add_merge(replace(MERGE, **other))
    assert merges() == ()
    add_merge(MERGE)
    assert merges() == (MERGE,)
    with opened() as database:
        assert database.execute("SELECT count(*) FROM merges_1").fetchone() == (2,)


def test_other_places_are_other_scans() -> None:
    add_scan(SCAN)
    assert scans_of("/image") == ()


def test_nothing_was_kept_yet() -> None:
    assert (merges(), scans_of("/images")) == ((), ())
    assert not history_file().parent.exists()


def test_it_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_MOST_ROWS", {"merges_1": 3, "scans_1": 2})
    for at in range(6):
        add_merge(replace(MERGE, at=at))
        add_scan(replace(SCAN, at=at))
    assert [line.at for line in merges()] == [3, 4, 5]
    assert [line.at for line in scans_of("/images")] == [4, 5]


def test_names_that_are_no_text_are_not_kept() -> None:
    odd = os.fsdecode(b"/\xff")
    add_scan(replace(SCAN, places=odd))
    add_scan(replace(SCAN, levels=(Level(Limited.CHAIN, odd, 3, 0, odd),)))
    assert (scans_of(odd), scans_of("/images")) == ((), ())


def test_numbers_that_are_too_large_are_not_kept() -> None:
    add_merge(replace(MERGE, bytes_copied=1 << 64))
    add_scan(replace(SCAN, occupied_bytes=1 << 64))
    assert (merges(), scans_of("/images")) == ((), ())


def test_nobody_waits_for_another_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "WAIT_SECONDS", 0.05)
    add_merge(MERGE)
    with opened() as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        add_merge(MERGE)
        assert merges() == ()
        assert time.monotonic() - began < 2
    assert merges() == (MERGE,)


def test_the_wait_is_short() -> None:
    assert history.WAIT_SECONDS <= 0.5


def _write(count: int) -> None:
    for _ in range(count):
        add_merge(MERGE)


def test_two_writers() -> None:
    writers = [multiprocessing.Process(target=_write, args=(20,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    # A line is dropped where the machine is too busy; here that would be odd.
    assert len(merges()) > 50


def test_a_kill_leaves_a_line_or_none() -> None:
    add_merge(MERGE)
    for pause in (0.0, 0.002, 0.005, 0.01, 0.02, 0.03):
        writer = multiprocessing.Process(target=_write, args=(10_000,))
        writer.start()
        time.sleep(0.02 + pause)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        before = len(merges())
        add_merge(MERGE)
        assert len(merges()) == before + 1 or before == 200
    with opened() as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + bytes(5000), b""])
def test_a_damaged_file_is_begun_again(content: bytes) -> None:
    file = history_file()
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert merges() == ()
    add_merge(MERGE)
    assert merges() == (MERGE,)
    damaged = file.with_name("history.sqlite.damaged")
    assert damaged.exists() == bool(content)
    assert not content or damaged.read_bytes() == content


def _pages_of(table: str) -> list[int]:
    with opened() as database:
        (page,) = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)
        ).fetchone()
    return [page]


def _damage(table: str) -> None:
    with opened() as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
    with history_file().open("r+b") as file:
        for page in _pages_of(table):
            file.seek((page - 1) * size)
            file.write(b"\xee" * size)


def test_damage_of_other_tables_costs_no_line() -> None:
    with opened_with_cache():
        pass
    for at in range(30):
        add_merge(replace(MERGE, at=at))
    add_scan(SCAN)
    _damage("scan_images_1")
    assert len(merges()) == 30
    _damage("scans_1")
    assert scans_of("/images") == ()
    # It was begun again, with what could be read.
    assert history_file().with_name("history.sqlite.damaged").exists()
    assert len(merges()) == 30
    add_scan(SCAN)
    assert scans_of("/images") == (SCAN,)


@contextlib.contextmanager
def opened_with_cache() -> Iterator[None]:
    tables = "CREATE TABLE IF NOT EXISTS scan_images_1 (key TEXT PRIMARY KEY, value BLOB)"
    database = history.opened(history_file(), tables, 1.0)
    assert database is not None
    with contextlib.closing(database):
        database.executemany(
            "INSERT INTO scan_images_1 VALUES (?, ?)", [(str(key), b"x" * 50) for key in range(300)]
        )
        yield


def test_a_damaged_table_of_merges_is_begun_again() -> None:
    add_merge(MERGE)
    add_scan(SCAN)
    _damage("merges_1")
    add_merge(MERGE)
    assert merges() == ()
    assert scans_of("/images") == (SCAN,)
    add_merge(MERGE)
    assert merges() == (MERGE,)


def test_rows_of_others_are_passed_over() -> None:
    add_scan(SCAN)
    with opened() as database:
        for levels in ("{", "7", None, '[{"kind": 1}]'):
            database.execute(
                "INSERT INTO scans_1 (at, places, seconds, images, chains, longest, "
                "occupied_bytes, freed_bytes, levels) VALUES (1, '/images', 1, 1, 1, 1, 1, 1, ?)",
                (levels,),
            )
    assert scans_of("/images") == (SCAN,)


@pytest.mark.parametrize(
    "row",
    [
        {"bytes_copied": -5},
        {"clusters": -1},
        {"seconds": math.inf},
        {"seconds": -1.0},
        {"seconds": 1e300},
        {"copy_seconds": math.inf},
        {"at": 1 << 62},
    ],
)
def test_merges_that_cannot_have_been_are_passed_over(row: dict[str, Any]) -> None:
    add_merge(replace(MERGE, **row))
    with opened() as database:
        assert database.execute("SELECT count(*) FROM merges_1").fetchone() == (1,)
    assert merges() == ()
    add_merge(MERGE)
    assert merges() == (MERGE,)


@pytest.mark.parametrize(
    "levels",
    [
        '[{"kind": "planet", "name": "n", "value": 1, "limit": 2, "path": "p"}]',
        '[{"kind": "device", "name": "n", "value": -1, "limit": 2, "path": "p"}]',
        f'[{{"kind": "device", "name": "n", "value": 1, "limit": {10**30}, "path": "p"}}]',
        "[" * 100_000,
    ],
)
def test_scans_that_cannot_have_been_are_passed_over(levels: str) -> None:
    add_scan(SCAN)
    with opened() as database:
        database.execute("UPDATE scans_1 SET levels = ?", (levels,))
    add_scan(SCAN)
    assert scans_of("/images") == (SCAN,)


def test_nobody_waits_for_what_others_have_in_their_tables() -> None:
    add_merge(MERGE)
    numbers = "WITH RECURSIVE n(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n)"
    with opened() as database:
        database.execute("CREATE TABLE others (x)")
        database.execute(
            "CREATE TRIGGER slow AFTER INSERT ON merges_1 BEGIN "
            f"INSERT INTO others SELECT ({numbers} SELECT max(x) FROM n); END"
        )
    began = time.monotonic()
    add_merge(MERGE)
    assert time.monotonic() - began < 10
    assert merges() == (MERGE,)


def test_a_table_of_another_shape() -> None:
    history_file().parent.mkdir(parents=True)
    with opened() as database:
        database.execute("CREATE TABLE merges_1 (something TEXT, storage TEXT)")
    add_merge(MERGE)
    assert merges() == ()


def test_there_may_be_no_place_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history_file().mkdir(parents=True)
    add_merge(MERGE)
    assert merges() == ()
    place = tmp_path / "a file"
    place.write_text("")
    for home in (place, place / "below", "/proc/1"):
        monkeypatch.setenv("XDG_STATE_HOME", str(home))
        add_merge(MERGE)
        assert merges() == ()


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    add_merge(MERGE)
    with opened() as database:
        (pages,) = database.execute("PRAGMA page_count").fetchone()
    connected = history._connected

    def limited(file: Path, tables: str, wait_seconds: float) -> sqlite3.Connection:
        database = connected(file, tables, wait_seconds)
        database.execute(f"PRAGMA max_page_count = {pages}")
        return database

    monkeypatch.setattr(history, "_connected", limited)
    for _ in range(200):
        add_merge(MERGE)
    assert 1 <= len(merges()) < 200
