# SPDX-License-Identifier: Apache-2.0
"""Images of nothing but refcounts, and demands for clusters in them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from chainmerge.engines.metadata.allocation import Demand
from chainmerge.engines.metadata.refcount_blocks import pack_refcounts

CLUSTER = 512
TABLE_ENTRIES = CLUSTER // 8
# More than any of the demands below takes.
_ROOM_BEHIND = 2048


@dataclass(frozen=True)
class Usage:
    """Which clusters are in use, refcount block by block; None for a block that is absent."""

    refcount_order: int
    blocks: list[list[bool] | None]

    @property
    def entries(self) -> int:
        return CLUSTER * 8 >> self.refcount_order

    @property
    def used(self) -> set[int]:
        return {
            index * self.entries + entry
            for index, block in enumerate(self.blocks)
            for entry, used in enumerate(block or [])
            if used
        }

    @property
    def present(self) -> set[int]:
        return {index for index, block in enumerate(self.blocks) if block is not None}


def image_of(usage: Usage) -> bytes:
    """An image that has a header, refcounts and a small L1 table, and nothing that they count.

    Its tables stand behind everything that its refcounts describe, with room between.
    """
    blocks = [None if block is None else [int(used) for used in block] for block in usage.blocks]
    end = TABLE_ENTRIES * usage.entries + _ROOM_BEHIND
    return image_with_refcounts(usage.refcount_order, blocks, tables_at=end)


def image_with_refcounts(
    refcount_order: int, blocks: list[list[int] | None], *, tables_at: int, table_clusters: int = 1
) -> bytes:
    """An image with these refcounts, block by block, whatever it is that they count.

    Its L1 table stands in cluster *tables_at*, its refcount table and blocks behind that.
    """
    header = bytearray(CLUSTER)
    table_at = tables_at + 1
    struct.pack_into(
        ">4sIQIIQIIQQIIQ", header, 0,
        b"QFI\xfb", 3, 0, 0, 9, 512, 0, 1, tables_at * CLUSTER, table_at * CLUSTER,
        table_clusters, 0, 0,
    )  # fmt: skip
    struct.pack_into(">QQQII", header, 72, 0, 0, 0, refcount_order, 104)
    table = np.zeros(table_clusters * TABLE_ENTRIES, dtype=">u8")
    stored = b""
    for index, block in enumerate(blocks):
        if block is not None:
            table[index] = (table_at + table_clusters) * CLUSTER + len(stored)
            stored += pack_refcounts(np.array(block, dtype=np.uint64), refcount_order)
    return bytes(header).ljust(table_at * CLUSTER, b"\0") + table.tobytes() + stored


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    order = draw(st.sampled_from((6, 5, 4)))
    entries = CLUSTER * 8 >> order
    blocks: list[list[bool] | None] = []
    full_up = draw(st.sampled_from((0, 0, 0, 62, 64)))
    blocks += [[True] * entries] * full_up
    for _ in range(draw(st.integers(0, min(6, TABLE_ENTRIES - full_up)))):
        kind = draw(st.sampled_from(("absent", "full", "random", "holes")))
        if kind == "absent":
            blocks.append(None)
        elif kind == "full":
            blocks.append([True] * entries)
        elif kind == "random":
            random = draw(st.randoms(use_true_random=False))
            blocks.append([random.random() < 0.7 for _ in range(entries)])
        else:
            hole = draw(st.integers(0, entries - 1))
            length = draw(st.integers(1, 20))
            blocks.append([not hole <= entry < hole + length for entry in range(entries)])
    return Usage(order, blocks)


demands = st.builds(
    Demand,
    scattered=st.integers(0, 300),
    contiguous=st.lists(st.integers(2, 150), max_size=6).map(tuple),
)
