# SPDX-License-Identifier: Apache-2.0
"""Which image of a chain decides which part of the guest's disk, in a number of columns."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

MOST_COLUMNS: Final = 1000
"""Columns of a map, at most, if nobody says how many."""


class MapColumn(Struct, frozen=True):
    """A column of the map: a stretch of the guest's disk, of which all is counted in bytes.

    Attributes:
        layer: Which layer decides most of its data, as an index from the root at 0; None if the
            guest reads nothing but zeros there.
        layer_bytes: How much that layer decides.
        data_bytes: How much all layers together decide as data.
        zero_bytes: What a layer has as zeros. The rest was never written.
    """

    layer: int | None
    layer_bytes: int
    data_bytes: int
    zero_bytes: int


class DiskMap(Struct, frozen=True):
    """The guest's disk from its start to its end, and who is uppermost where.

    Attributes:
        virtual_size: Size of the disk in bytes.
        column_bytes: What a column stands for; the last one ends with the disk.
        images: The paths of the layers, from the root up.
        columns: From the start of the disk; none for a disk without bytes.
    """

    virtual_size: int
    column_bytes: int
    images: tuple[str, ...]
    columns: tuple[MapColumn, ...]
