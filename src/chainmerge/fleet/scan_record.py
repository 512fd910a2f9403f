# SPDX-License-Identifier: Apache-2.0
"""The record of a job that only looks: JSON, read as strictly as that of one that merges."""

from __future__ import annotations

import hashlib
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from chainmerge.fleet.record import HostName, RecordUnusable, Submission

SCAN_ACTION: Final = "scan"
_PRIORITY: Final = 1000
"""It is short, and plans are made of what it finds."""


class ScanRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """A host is to say what chains it has. Where it looks, its own configuration says."""

    v: Literal[1]
    host: HostName
    action: Literal["scan"]
    submitted: Submission

    @property
    def keys(self) -> tuple[str, ...]:
        """Not those of merges: it changes nothing, and is not to wait until one has ended."""
        return (scan_key(self.host),)

    @property
    def priority(self) -> int:
        """The highest goes first."""
        return _PRIORITY

    @property
    def domain(self) -> None:
        """It follows none."""
        return

    @property
    def windows(self) -> tuple[str, ...]:
        """It may start at any time."""
        return ()

    @property
    def window_end(self) -> str:
        """So nothing ends."""
        return "go-on"

    @property
    def label(self) -> str:
        """No two scans of a host wait at the same time."""
        return scan_label(self.host)


def scan_label(host: str) -> str:
    """What all scans of a host have in common, as other records have it."""
    return hashlib.sha256(scan_key(host).encode()).hexdigest()[:32]


def scan_key(host: str) -> str:
    """The key of which a host has as many as it may scan at the same time."""
    return f"scan/{host}"


def scan_record_in(arguments: Any) -> ScanRecord | None:
    """Return the record of a row that is a scan; None if the row is anything else.

    Raises:
        RecordUnusable: it says that it is one, and is not.
    """
    record = arguments.get("record") if isinstance(arguments, dict) else None
    if not isinstance(record, dict) or record.get("action") != SCAN_ACTION:
        return None
    if arguments.keys() != {"record"}:
        raise RecordUnusable("the row does not consist of a record")
    try:
        return msgspec.convert(record, ScanRecord)
    except msgspec.ValidationError as error:
        raise RecordUnusable(str(error)) from error
