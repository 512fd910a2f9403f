# SPDX-License-Identifier: Apache-2.0
"""How the chains of some places have changed from one scan to the next, and where that leads."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct


class TrendPoint(Struct, frozen=True):
    """What one scan has found.

    Attributes:
        at: When it began, in seconds since 1970 (UTC).
        longest: Images of the longest chain.
        occupied_bytes: What all files take.
        freed_bytes: What merging all chains would free.
    """

    at: int
    longest: int
    occupied_bytes: int
    freed_bytes: int


class Limited(StrEnum):
    """What has a limit."""

    CHAIN = "chain"
    FILE_SYSTEM = "file-system"
    DEVICE = "device"


class Forecast(Struct, frozen=True):
    """When something reaches its limit, if it goes on as it did from scan to scan.

    Attributes:
        kind: ``chain``, ``file-system`` or ``device``.
        name: The path of the chain's lowest image, the file system by its kind and UUID or source,
            or the device's path.
        image: The path of an image that it is about: of a chain the uppermost one.
        value: Images of the chain, or bytes in use, by the last scan.
        limit: The images that a chain may have, or the bytes that there are.
        reached_at: When it reaches the limit, in seconds since 1970 (UTC).
        scans: How many scans it is drawn from.
    """

    kind: Limited
    name: str
    image: str
    value: int
    limit: int
    reached_at: int
    scans: int
