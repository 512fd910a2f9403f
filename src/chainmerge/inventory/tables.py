# SPDX-License-Identifier: Apache-2.0
"""A scan as tables of SQLite, for whoever wants to ask questions of it.

``user_version`` is the version of the tables, which are described in ``docs/scan.md``. The file is
written beside its place and renamed, so who reads it sees a whole scan: the old one, or the new.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
from typing import TYPE_CHECKING, Final

from chainmerge.documents.scan import ScanReport
from chainmerge.documents.text import printable
from chainmerge.inventory.errors import TablesNotWritten
from chainmerge.options import require_instance, require_path
from chainmerge.storage.errors import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TABLES_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE scan (
    version INTEGER NOT NULL,
    scanned_at INTEGER NOT NULL,
    occupied_bytes INTEGER NOT NULL,
    freed_bytes INTEGER NOT NULL
);
CREATE TABLE images (
    path TEXT PRIMARY KEY,
    format TEXT NOT NULL,
    virtual_size INTEGER,
    file_size INTEGER NOT NULL,
    occupied_bytes INTEGER,
    written_at INTEGER,
    backing TEXT,
    parent TEXT,
    children INTEGER NOT NULL,
    depth INTEGER,
    snapshots INTEGER NOT NULL,
    may_be_stale INTEGER NOT NULL,
    problem TEXT
);
CREATE TABLE bitmaps (
    image TEXT NOT NULL,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    granularity INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL,
    tombstone INTEGER NOT NULL
);
CREATE TABLE chains (
    leaf TEXT PRIMARY KEY,
    images INTEGER,
    virtual_size INTEGER,
    occupied_bytes INTEGER,
    base TEXT,
    freed_bytes INTEGER,
    bytes_to_copy INTEGER,
    unfinished INTEGER NOT NULL,
    problem TEXT
);
CREATE TABLE findings (
    code TEXT NOT NULL,
    severity TEXT NOT NULL,
    image TEXT NOT NULL,
    sentence TEXT NOT NULL,
    evidence TEXT NOT NULL,
    command TEXT
);
"""
_IMAGE_COLUMNS: Final = (
    "path", "format", "virtual_size", "file_size", "occupied_bytes", "written_at", "backing",
    "parent", "children", "depth", "snapshots", "may_be_stale", "problem",
)  # fmt: skip
_BITMAP_COLUMNS: Final = ("name", "state", "granularity", "stored_bytes", "tombstone")
_CHAIN_COLUMNS: Final = (
    "leaf", "images", "virtual_size", "occupied_bytes", "base", "freed_bytes", "bytes_to_copy",
    "unfinished", "problem",
)  # fmt: skip
_FINDING_COLUMNS: Final = ("code", "severity", "image", "sentence", "evidence", "command")


def save_scan(report: ScanReport, file: str | Path) -> None:
    """Write a scan as tables, in place of what was there.

    Args:
        report: the scan.
        file: where to; a regular file, or nothing yet. What is a link is replaced itself.

    Raises:
        TablesNotWritten: what was there is as it was.
    """
    require_instance("report", report, ScanReport)
    require_path("file", file)
    target = os.fspath(file)
    directory, name = os.path.split(target)
    draft = os.path.join(directory, f".{name}.chainmerge-new")  # noqa: PTH118
    try:
        if os.path.lexists(target) and not stat.S_ISREG(os.lstat(target).st_mode):
            raise TablesNotWritten(target, "there is something that is not a regular file")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)  # noqa: PTH108
        _write(draft, report)
        os.replace(draft, target)  # noqa: PTH105
    except (OSError, sqlite3.Error, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            os.unlink(draft)  # noqa: PTH108
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise TablesNotWritten(target, reason) from error


def _write(draft: str, report: ScanReport) -> None:
    with contextlib.closing(sqlite3.connect(draft)) as tables, tables:
        tables.executescript(_SCHEMA)
        tables.execute(f"PRAGMA user_version = {TABLES_VERSION}")
        for table, columns, rows in _rows(report):
            marks = ", ".join("?" * len(columns))
            tables.executemany(
                f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})",  # noqa: S608
                rows,
            )


def _rows(report: ScanReport) -> Iterator[tuple[str, tuple[str, ...], Iterator[list[object]]]]:
    of_scan = ("version", "scanned_at", "occupied_bytes", "freed_bytes")
    yield "scan", of_scan, iter([_values(report, of_scan)])
    yield "images", _IMAGE_COLUMNS, (_values(one, _IMAGE_COLUMNS) for one in report.images)
    yield (
        "bitmaps",
        ("image", *_BITMAP_COLUMNS),
        (
            [printable(image.path), *_values(bitmap, _BITMAP_COLUMNS)]
            for image in report.images
            for bitmap in image.bitmaps
        ),
    )
    yield "chains", _CHAIN_COLUMNS, (_values(one, _CHAIN_COLUMNS) for one in report.chains)
    yield "findings", _FINDING_COLUMNS, (_values(one, _FINDING_COLUMNS) for one in report.findings)


def _values(record: object, columns: tuple[str, ...]) -> list[object]:
    return [_plain(getattr(record, column)) for column in columns]


def _plain(value: object) -> object:
    """What SQLite takes: names that are not UTF-8 become visible."""
    if isinstance(value, str):
        return printable(str(value))
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    # Sizes that hostile headers claim are below 2**63, as SQLite's integers are.
    return value
