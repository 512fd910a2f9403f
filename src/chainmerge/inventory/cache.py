# SPDX-License-Identifier: Apache-2.0
"""What is known of images that have not changed since the last scan.

It lies in tables of its own in the file of :mod:`chainmerge.records.history`. It is never needed:
what is damaged, locked or not writable is left alone or dropped, and images are read as if nothing
were known. A device has no times, so nothing is kept of one.

An image is known again by its device, inode, size, space and both times, to the nanosecond. One
that changed just before it was read could change once more within the same tick of the file
system's clock, so nothing is kept of that either.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import msgspec
from msgspec import Struct

from chainmerge.inventory.found import ImageContent
from chainmerge.inventory.summary import ChainFacts
from chainmerge.records.history import history_file, opened, set_aside

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from chainmerge.inventory.found import FoundImage, Stamp
    from chainmerge.options import Access

MOST_ROWS: Final = 200_000
"""Rows of a table that are kept: those that were used last."""
_SETTLED_NS: Final = 2 * 10**9
_AT_ONCE: Final = 4096
_WAIT_SECONDS: Final = 2.0
_DAY: Final = 86_400
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS scan_images_1 (key TEXT PRIMARY KEY, value BLOB, used INTEGER);
CREATE TABLE IF NOT EXISTS scan_chains_1 (key TEXT PRIMARY KEY, value BLOB, used INTEGER);
"""
_IMAGES: Final = "scan_images_1"
_CHAINS: Final = "scan_chains_1"

_Known = TypeVar("_Known", bound=Struct)


class Memory(Protocol):
    """What was known before, and is going to be."""

    def content(self, stamp: Stamp) -> ImageContent | None:
        """What is in an image; None if that is not known."""

    def keep_content(self, stamp: Stamp, content: ImageContent) -> None:
        """Know that from now on."""

    def facts(self, key: str) -> ChainFacts | None:
        """What is in a chain, by what :func:`key_of_chain` says; None if that is not known."""

    def keep_facts(self, key: str, line: Sequence[FoundImage], facts: ChainFacts) -> None:
        """Know that from now on; *line* has the images of the chain."""


class Forgetful:
    """Knows nothing, and keeps nothing."""

    def content(self, stamp: Stamp) -> ImageContent | None:
        """As in :class:`Memory`."""
        del stamp
        return None

    def keep_content(self, stamp: Stamp, content: ImageContent) -> None:
        """As in :class:`Memory`."""

    def facts(self, key: str) -> ChainFacts | None:
        """As in :class:`Memory`."""
        del key
        return None

    def keep_facts(self, key: str, line: Sequence[FoundImage], facts: ChainFacts) -> None:
        """As in :class:`Memory`."""


class StoredMemory:
    """Knows what is in a database, until that fails."""

    def __init__(self, database: sqlite3.Connection) -> None:
        """Read from a database with the tables in it, and write to it now and then."""
        self._database: sqlite3.Connection | None = database
        self._now_ns = time.time_ns()
        self._today = self._now_ns // 10**9 // _DAY
        self._pending: list[tuple[str, str, bytes | None]] = []
        self.is_damaged = False
        """Whether the database has turned out not to be one any more."""

    def content(self, stamp: Stamp) -> ImageContent | None:
        """As in :class:`Memory`."""
        if stamp.is_device:
            return None
        return self._known(_IMAGES, _key_of_image(stamp), ImageContent)

    def keep_content(self, stamp: Stamp, content: ImageContent) -> None:
        """As in :class:`Memory`."""
        if content.problem is None and self._is_settled(stamp):
            self._keep(_IMAGES, _key_of_image(stamp), content)

    def facts(self, key: str) -> ChainFacts | None:
        """As in :class:`Memory`."""
        return self._known(_CHAINS, key, ChainFacts) if key else None

    def keep_facts(self, key: str, line: Sequence[FoundImage], facts: ChainFacts) -> None:
        """As in :class:`Memory`."""
        settled = all(self._is_settled(image.stamp) for image in line)
        if key and settled and facts.problem is None:
            self._keep(_CHAINS, key, facts)

    def flush(self) -> None:
        """Write what is to be kept, if that is possible now; and forget what is too much."""
        pending, self._pending = self._pending, []
        if self._database is None or not pending:
            return
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                for table in (_IMAGES, _CHAINS):
                    self._write(self._database, table, pending)
        except sqlite3.OperationalError:
            # Another scan is writing, the disk is full, or this user may only read.
            return
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> None:
        self._database = None
        damage = isinstance(error, sqlite3.DatabaseError)
        self.is_damaged = damage and not isinstance(error, sqlite3.OperationalError)

    def _write(
        self,
        database: sqlite3.Connection,
        table: str,
        pending: Sequence[tuple[str, str, bytes | None]],
    ) -> None:
        rows = [row for row in pending if row[0] == table]
        database.executemany(
            f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)",  # noqa: S608
            [(key, value, self._today) for _, key, value in rows if value is not None],
        )
        database.executemany(
            f"UPDATE {table} SET used = ? WHERE key = ?",  # noqa: S608
            [(self._today, key) for _, key, value in rows if value is None],
        )
        (count,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608
        if count > MOST_ROWS:
            database.execute(
                f"DELETE FROM {table} WHERE key IN "  # noqa: S608
                f"(SELECT key FROM {table} ORDER BY used LIMIT ?)",
                (count - MOST_ROWS,),
            )

    def _is_settled(self, stamp: Stamp) -> bool:
        last = max(stamp.written_ns, stamp.changed_ns)
        return not stamp.is_device and last < self._now_ns - _SETTLED_NS

    def _known(self, table: str, key: str, kind: type[_Known]) -> _Known | None:
        if self._database is None:
            return None
        try:
            row = self._database.execute(
                f"SELECT value, used FROM {table} WHERE key = ?",  # noqa: S608
                (key,),
            ).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        if row is None:
            return None
        try:
            found = msgspec.json.decode(row[0], type=kind)
        except (msgspec.MsgspecError, TypeError, ValueError):
            return None
        if row[1] != self._today:
            self._note(table, key, None)
        return found

    def _keep(self, table: str, key: str, value: Struct) -> None:
        try:
            self._note(table, key, msgspec.json.encode(value))
        except UnicodeEncodeError:
            # A name that is not UTF-8; such an image is read every time.
            return

    def _note(self, table: str, key: str, value: bytes | None) -> None:
        self._pending.append((table, key, value))
        if len(self._pending) >= _AT_ONCE:
            self.flush()


@contextlib.contextmanager
def remembered(place: Path | None = None) -> Iterator[Memory]:
    """What is known of images, from a database that is made where there is none.

    Args:
        place: the database; by default that of this user.
    """
    file = place or history_file()
    database = opened(file, _SCHEMA, _WAIT_SECONDS)
    if database is None:
        yield Forgetful()
        return
    memory = StoredMemory(database)
    try:
        yield memory
    finally:
        memory.flush()
        database.close()
        if memory.is_damaged:
            with contextlib.suppress(sqlite3.Error, OSError):
                set_aside(file)


def _key_of_image(stamp: Stamp) -> str:
    device, inode = stamp.identity
    return f"{device}:{inode}:{stamp.size}:{stamp.occupied}:{stamp.written_ns}:{stamp.changed_ns}"


def key_of_chain(line: Sequence[FoundImage], first: int, access: Access) -> str:
    """What tells whether a chain is the one that it was; empty if nothing does.

    Args:
        line: its images, from the leaf down.
        first: which of them, from the root up, is the lowest that only this chain uses.
        access: how its images may be reached.
    """
    if any(image.stamp.is_device or image.content.problem is not None for image in line):
        return ""
    digest = hashlib.sha256()
    for image in line:
        path = os.fsencode(image.path)
        digest.update(b"%d:%s%s\n" % (len(path), path, _key_of_image(image.stamp).encode()))
    options = (first, sorted(access.allow_backing), sorted(access.formats.items()))
    digest.update(repr(options).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
