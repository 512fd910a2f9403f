# SPDX-License-Identifier: Apache-2.0
"""What merges and scans of this host have found and taken: one line each, the oldest go.

It lies here and not in ``inventory``, as merges write it and plans read it, which know nothing of
an inventory. ``history.sqlite`` is one file with tables of several owners: each makes its own by
:func:`opened`, and none needs those of the others.

The history is never needed. Nothing that concerns it is raised, and nobody waits for it longer than
:data:`WAIT_SECONDS`: a line that cannot be written is dropped. A kill leaves a line or none, as
SQLite does. A damaged file is set aside as ``history.sqlite.damaged`` and begun again with the
lines that can still be read from it, whichever table was damaged.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from chainmerge.documents.trends import Limited
from chainmerge.records.files import STATE_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WAIT_SECONDS: Final = 0.5
"""How long a writer is waited for, and how long SQLite may take for a line."""
_INSTRUCTIONS_BETWEEN: Final = 10_000
MOST_MERGES: Final = 10_000
MOST_SCANS: Final = 3_000
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS merges_1 (
    id INTEGER PRIMARY KEY, at INTEGER, storage TEXT, engine TEXT, verify TEXT, live INTEGER,
    outcome TEXT, direction TEXT, images INTEGER, merged INTEGER, bytes_copied INTEGER,
    bytes_shared INTEGER, clusters INTEGER, bytes_freed INTEGER, bandwidth INTEGER,
    seconds REAL, copy_seconds REAL);
CREATE INDEX IF NOT EXISTS merges_1_storage ON merges_1 (storage, id);
CREATE TABLE IF NOT EXISTS scans_1 (
    id INTEGER PRIMARY KEY, at INTEGER, places TEXT, seconds REAL, images INTEGER,
    chains INTEGER, longest INTEGER, occupied_bytes INTEGER, freed_bytes INTEGER,
    levels TEXT);
CREATE INDEX IF NOT EXISTS scans_1_places ON scans_1 (places, id);
"""
_MOST_ROWS: Final = {"merges_1": MOST_MERGES, "scans_1": MOST_SCANS}

# What no merge or scan of ours can have been; whoever reckons with it would get no number.
_Count: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Moment: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 36)]
_Duration: TypeAlias = Annotated[float, Meta(ge=0, le=1e9)]


class MergeLine(Struct, frozen=True):
    """A merge that came to its end, well or not.

    Attributes:
        at: When it ended, in seconds since 1970 (UTC).
        storage: Where its images lie; see :mod:`chainmerge.storage.storage_names`.
        engine: ``native`` or ``qemu``.
        verify: ``full`` or ``metadata``.
        live: Whether a running VM has merged.
        outcome: ``merged``; ``finished`` if an earlier run had begun it; or an error's code.
        direction: ``commit`` or ``pull``.
        images: Images of the chain before.
        merged: How many of them became one.
        bytes_copied: Guest bytes that were to be read and written, as planned.
        bytes_shared: Guest bytes that were to move without a copy.
        clusters: Clusters and tables that the result had to allocate.
        bytes_freed: What the file system was to get back.
        bandwidth: The limit for the copy in bytes a second; None for no limit.
        seconds: The time from its first lock to its report; None if it failed.
        copy_seconds: What of that the copy took.
    """

    at: _Moment
    storage: str
    engine: str
    verify: str
    live: bool
    outcome: str
    direction: str
    images: _Count
    merged: _Count
    bytes_copied: _Count
    bytes_shared: _Count
    clusters: _Count
    bytes_freed: _Count
    bandwidth: _Count | None
    seconds: _Duration | None
    copy_seconds: _Duration


class Level(Struct, frozen=True):
    """How far something that has a limit has come.

    Attributes:
        kind: What it is.
        name: The path of the chain's lowest image, the storage's name, or the device's path.
        value: Images, or bytes that are used.
        limit: Of the same: bytes that there are. 0 for a chain, whose limit is an option.
        path: That of an image on it, for messages.
    """

    kind: Limited
    name: str
    value: _Count
    limit: _Count
    path: str


class ScanLine(Struct, frozen=True):
    """What one scan has found.

    Attributes:
        at: When it began, in seconds since 1970 (UTC).
        places: The scope of the report, one place a line.
        seconds: How long it took.
        images: How many images there are.
        chains: How many chains there are.
        longest: Images of the longest chain.
        occupied_bytes: What all files take.
        freed_bytes: What merging all chains would free.
        levels: What has a limit: of many only what has come furthest.
    """

    at: _Moment
    places: str
    seconds: _Duration
    images: _Count
    chains: _Count
    longest: _Count
    occupied_bytes: _Count
    freed_bytes: _Count
    levels: tuple[Level, ...]


_Line = TypeVar("_Line", MergeLine, ScanLine)


def history_file() -> Path:
    """Where this user's history of merges and scans lies."""
    home = os.environ.get("XDG_STATE_HOME", "")
    if home.startswith("/"):
        return Path(home) / "chainmerge" / "history.sqlite"
    if os.geteuid() == 0:
        return STATE_DIRECTORY / "history.sqlite"
    return Path(os.path.expanduser("~")) / ".local/state/chainmerge/history.sqlite"  # noqa: PTH111


def add_merge(line: MergeLine) -> None:
    """Keep a line about a merge, if that can be done now."""
    _add("merges_1", line)


def add_scan(line: ScanLine) -> None:
    """Keep a line about a scan, if that can be done now."""
    _add("scans_1", line)


def merges_like(
    storage: str, engine: str, verify: str, *, live: bool, most: int = 200
) -> tuple[MergeLine, ...]:
    """The last merges on a storage that say how long another one takes, the oldest first.

    Those that failed, that went on with what an earlier run had begun, or that were held back by a
    bandwidth say nothing.
    """
    return _read(
        "merges_1",
        MergeLine,
        "storage = ? AND engine = ? AND verify = ? AND live = ? AND outcome = 'merged' "
        "AND bandwidth IS NULL",
        (storage, engine, verify, live),
        most,
    )


def scans_of(places: str, most: int = 500) -> tuple[ScanLine, ...]:
    """The last scans of the same places, the oldest first."""
    return _read("scans_1", ScanLine, "places = ?", (places,), most)


def opened(file: Path, tables: str, wait_seconds: float) -> sqlite3.Connection | None:
    """The database with some tables in it, begun again where it is damaged.

    Args:
        file: where it lies; the directory is made.
        tables: what makes the tables where there are none.
        wait_seconds: how long another writer is waited for.

    Returns: None if there can be none now.
    """
    with contextlib.suppress(sqlite3.Error, OSError, ValueError):
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            return _connected(file, tables, wait_seconds)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            set_aside(file)
            return _connected(file, tables, wait_seconds)
    return None


def set_aside(file: Path) -> None:
    """Begin a damaged database again, with the lines that can still be read from it.

    Raises:
        OSError: it cannot be renamed, or somebody else is doing the same.
        sqlite3.Error: no other one can be begun.
    """
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Who comes second would set aside what the first has begun.
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_sound(file):
            return
        damaged = file.with_name(f"{file.name}.damaged")
        # Beside another database it would be taken for that one's.
        file.with_name(f"{file.name}-journal").unlink(missing_ok=True)
        file.rename(damaged)
        with contextlib.closing(_connected(file, _TABLES, WAIT_SECONDS)) as database:
            _copy_lines(damaged, database)
    finally:
        os.close(directory)


def _is_sound(file: Path) -> bool:
    try:
        with contextlib.closing(_connected(file, _TABLES, WAIT_SECONDS)) as database:
            return bool(database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return False


def _copy_lines(damaged: Path, database: sqlite3.Connection) -> None:
    for table, kind in (("merges_1", MergeLine), ("scans_1", ScanLine)):
        columns = ", ".join(kind.__struct_fields__)
        # A page that cannot be read ends it: what stands before that is kept.
        with contextlib.suppress(sqlite3.Error):
            source = sqlite3.connect(f"file:{_quoted(damaged)}?mode=ro", uri=True)
            with contextlib.closing(source), database:
                database.execute("BEGIN IMMEDIATE")
                rows = source.execute(f"SELECT {columns} FROM {table} ORDER BY id")  # noqa: S608
                places = ", ".join("?" * len(kind.__struct_fields__))
                with contextlib.suppress(sqlite3.Error):
                    for row in rows:
                        database.execute(
                            f"INSERT INTO {table} ({columns}) VALUES ({places})",  # noqa: S608
                            row,
                        )


def _quoted(path: Path) -> str:
    return "".join(
        chr(byte) if (chr(byte).isalnum() and byte < 0x80) or byte == 0x2F else f"%{byte:02x}"
        for byte in os.fsencode(path)
    )


def _connected(file: Path, tables: str, wait_seconds: float) -> sqlite3.Connection:
    database = sqlite3.connect(file, timeout=wait_seconds, isolation_level=None)
    try:
        database.execute("PRAGMA synchronous = NORMAL")
        database.executescript(tables)
    except BaseException:
        database.close()
        raise
    return database


@contextlib.contextmanager
def _history() -> Iterator[sqlite3.Connection | None]:
    """The database, for a block of which no error of the database's gets out."""
    file = history_file()
    database = opened(file, _TABLES, WAIT_SECONDS)
    if database is not None:
        # Tables that others have made may have triggers or no index, and take as long as they like.
        end = time.monotonic() + WAIT_SECONDS * 2
        database.set_progress_handler(lambda: time.monotonic() > end, _INSTRUCTIONS_BETWEEN)
    try:
        yield database
    except (sqlite3.OperationalError, UnicodeEncodeError, OverflowError):
        # Another one is writing, the disk is full, this user may only read, a name is not UTF-8, or
        # what a hostile image says of itself is more than SQLite's numbers hold.
        pass
    except sqlite3.DatabaseError:
        with contextlib.suppress(sqlite3.Error, OSError):
            set_aside(file)
    finally:
        if database is not None:
            database.close()


def _add(table: str, line: MergeLine | ScanLine) -> None:
    with _history() as database:
        if database is None:
            return
        row = {name: _stored(getattr(line, name)) for name in line.__struct_fields__}
        columns, places = ", ".join(row), ", ".join("?" * len(row))
        with database:
            database.execute("BEGIN IMMEDIATE")
            database.execute(
                f"INSERT INTO {table} ({columns}) VALUES ({places})",  # noqa: S608
                tuple(row.values()),
            )
            database.execute(
                f"DELETE FROM {table} WHERE id <= (SELECT max(id) FROM {table}) - ?",  # noqa: S608
                (_MOST_ROWS[table],),
            )


def _stored(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, tuple) else value


def _read(
    table: str, kind: type[_Line], condition: str, values: Sequence[object], most: int
) -> tuple[_Line, ...]:
    columns = kind.__struct_fields__
    if not os.path.exists(history_file()):  # noqa: PTH110
        # Who only reads makes none. Path.exists raises where this user may not look.
        return ()
    with _history() as database:
        if database is None:
            return ()
        rows = database.execute(
            f"SELECT {', '.join(columns)} FROM {table} WHERE {condition} "  # noqa: S608
            "ORDER BY id DESC LIMIT ?",
            (*values, most),
        ).fetchall()
        return tuple(_lines(reversed(rows), kind))
    return ()


def _lines(rows: Iterator[Sequence[Any]], kind: type[_Line]) -> Iterator[_Line]:
    """What rows say; those that nobody of ours has written are passed over."""
    for row in rows:
        found = dict(zip(kind.__struct_fields__, row, strict=True))
        try:
            if "levels" in found:
                found["levels"] = msgspec.json.decode(found["levels"])
            yield msgspec.convert(found, kind, strict=False)
        except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
            continue
