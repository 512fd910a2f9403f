# SPDX-License-Identifier: Apache-2.0
"""In which pieces QEMU's jobs copy. All sizes are in bytes."""

from __future__ import annotations

MIN_GRANULE = 4 << 10
MAX_GRANULE = 64 << 10


def may_detect_zeroes(cluster_size: int) -> bool:
    """Whether all writes to one cluster of *cluster_size* bytes are part of one request."""
    return cluster_size <= MAX_GRANULE
