# SPDX-License-Identifier: Apache-2.0
"""How the chains of some places have changed from one scan to the next."""

from __future__ import annotations

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
