# SPDX-License-Identifier: Apache-2.0
"""Whole clusters gathered into large contiguous writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from chainmerge.arithmetic.rounding import round_up
from chainmerge.qcow2.runs import Clusters, runs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.arithmetic.arrays import U8Array
    from chainmerge.engines.metadata.refcount_blocks import Write

_MAX_WRITE_BYTES = 8 << 20

Piece: TypeAlias = "tuple[Clusters, U8Array]"
"""Ascending clusters, and what they shall hold: uint8[clusters, cluster size]."""


def gathered(pieces: Iterator[Piece], cluster_size: int) -> Iterator[Write]:
    """Join what is contiguous, across pieces, into writes of at most 8 MiB (or one cluster)."""
    limit = max(1, _MAX_WRITE_BYTES // cluster_size)
    start, held = 0, 0
    parts: list[bytes] = []
    for first, rows in _contiguous(pieces, limit):
        if parts and (first != start + held or held + len(rows) > limit):
            yield start * cluster_size, b"".join(parts)
            parts = []
        if not parts:
            start, held = first, 0
        parts.append(rows.tobytes())
        held += len(rows)
    if parts:
        yield start * cluster_size, b"".join(parts)


def whole_clusters(data: bytes, cluster_size: int) -> U8Array:
    """*data*, padded with zeros to whole clusters: uint8[clusters, cluster size]."""
    padded = data.ljust(round_up(len(data), cluster_size), b"\0")
    return np.frombuffer(padded, dtype=np.uint8).reshape(-1, cluster_size)


def _contiguous(pieces: Iterator[Piece], limit: int) -> Iterator[tuple[int, U8Array]]:
    """The pieces cut where their clusters are not contiguous, and at *limit* clusters."""
    for clusters, rows in pieces:
        runs = runs_of(clusters)
        at = 0
        for start, length in zip(runs.start.tolist(), runs.length.tolist(), strict=True):
            for done in range(0, length, limit):
                part = rows[at + done : at + min(done + limit, length)]
                yield start + done, part
            at += length
