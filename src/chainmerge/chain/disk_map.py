# SPDX-License-Identifier: Apache-2.0
"""Who decides what of a chain's disk, counted by columns. Reads tables only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import I64Array
from chainmerge.arithmetic.rounding import divide_up, round_up
from chainmerge.chain.discovery import discover
from chainmerge.chain.opening import open_chain
from chainmerge.chain.target import metadata_policy_of
from chainmerge.chain.view import NO_LAYER
from chainmerge.documents.disk_map import MOST_COLUMNS, DiskMap, MapColumn
from chainmerge.options import Access
from chainmerge.qcow2.extents import Kind
from chainmerge.qcow2.header import SECTOR

if TYPE_CHECKING:
    from chainmerge.arithmetic.arrays import BoolArray
    from chainmerge.chain.model import Chain
    from chainmerge.chain.view import GuestView, Resolved

_ZEROS: Final = 1
"""Rows behind those of the layers: bytes that some layer has as zeros."""


class Deciders(Struct, frozen=True):
    """How much each layer decides of each column.

    Attributes:
        column_bytes: What a column stands for.
        data: Guest bytes, by layer and column.
        zeros: Guest bytes that read as zeros because a layer says so, by column.
    """

    column_bytes: int
    data: I64Array
    zeros: I64Array


def disk_map(
    image: str | Path, access: Access | None = None, columns: int = MOST_COLUMNS
) -> DiskMap:
    """Say which image of a chain decides which part of the disk that a guest of *image* sees.

    Nothing is locked.

    Args:
        image: the chain's upper end.
        access: how images may be reached.
        columns: of the map, at most.

    Raises:
        ChainmergeError: the chain cannot be found or read.
    """
    with open_chain(readable_chain(image, access or Access())) as opened:
        view = opened.view()
        return draw_map(view, count_deciders(view, columns))


def readable_chain(image: str | Path, access: Access) -> Chain:
    """Find a chain of which all images are of formats that are read here.

    Raises:
        ForeignFormat: one is not.
        ChainmergeError: it cannot be found.
    """
    chain = discover(Path(image), metadata_policy_of(access, image))
    for one in chain.images:
        _ = one.virtual_size  # which is not known of a foreign format
    return chain


def count_deciders(view: GuestView, most_columns: int) -> Deciders:
    """Count who decides what, in columns of equal size.

    Memory is that of a number for each layer and column, and what :meth:`GuestView.resolve` takes.

    Raises:
        FormatError: tables are damaged.
    """
    size = view.virtual_size
    column_bytes = max(SECTOR, round_up(divide_up(size, most_columns), SECTOR))
    counts = _Counts(len(view.layers) + _ZEROS, divide_up(size, column_bytes), column_bytes)
    for runs in view.resolve():
        counts.add(runs)
    total = counts.total()
    return Deciders(column_bytes, total[:-_ZEROS], total[-1])


def draw_map(view: GuestView, deciders: Deciders) -> DiskMap:
    """The map of a disk, from what was counted."""
    data = deciders.data.sum(axis=0)
    uppermost = deciders.data.argmax(axis=0)
    most = deciders.data.max(axis=0)
    return DiskMap(
        virtual_size=view.virtual_size,
        column_bytes=deciders.column_bytes,
        images=tuple(layer.name for layer in view.layers),
        columns=tuple(
            MapColumn(layer if of_layer else None, of_layer, of_all, zeros)
            for layer, of_layer, of_all, zeros in zip(
                uppermost.tolist(),
                most.tolist(),
                data.tolist(),
                deciders.zeros.tolist(),
                strict=True,
            )
        ),
    )


class _Counts:
    """Bytes by row and column, gathered from runs of any length."""

    def __init__(self, rows: int, columns: int, column_bytes: int) -> None:
        self._width = column_bytes
        self._parts = np.zeros((rows, columns), np.int64)
        # How many more columns are covered as a whole than in the column before.
        self._whole = np.zeros((rows, columns + 1), np.int64)

    def add(self, runs: Resolved) -> None:
        is_zero = (runs.kind == Kind.ZERO) | (runs.kind == Kind.ZERO_ALLOCATED)
        counted: BoolArray = (runs.layer != NO_LAYER) | is_zero
        row = np.where(is_zero, len(self._parts) - 1, runs.layer)[counted].astype(np.intp)
        start = runs.guest[counted].astype(np.int64)
        end = start + runs.length[counted].astype(np.int64)
        first, last = start // self._width, (end - 1) // self._width
        within = first == last
        np.add.at(self._parts, (row[within], first[within]), (end - start)[within])
        row, start, end = row[~within], start[~within], end[~within]
        first, last = first[~within], last[~within]
        np.add.at(self._parts, (row, first), (first + 1) * self._width - start)
        np.add.at(self._parts, (row, last), end - last * self._width)
        np.add.at(self._whole, (row, first + 1), 1)
        np.add.at(self._whole, (row, last), -1)

    def total(self) -> I64Array:
        whole: I64Array = np.cumsum(self._whole[:, :-1], axis=1)
        return self._parts + whole * self._width
