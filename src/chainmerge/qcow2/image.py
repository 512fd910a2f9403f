# SPDX-License-Identifier: Apache-2.0
"""An open qcow2 image: its header and its active L1 table."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from chainmerge.qcow2.header import Header, parse_header

if TYPE_CHECKING:
    from chainmerge.arithmetic.arrays import U64Array
    from chainmerge.qcow2.readable import Readable


class Qcow2Image:
    """The parts of an image that every reader of it needs.

    Opening judges the header and where the tables are, not the entries of the
    tables: a damaged image can be opened and checked, and is refused where its
    damage is met.
    """

    def __init__(self, readable: Readable, header: Header | None = None) -> None:
        """Read and validate the header, unless it is known already.

        Args:
            readable: the image's file.
            header: what has been read from it, if nobody can have changed it since.

        Raises:
            FormatError: the header is not one that QEMU would open.
        """
        self._readable = readable
        self._header = parse_header(readable) if header is None else header

    @property
    def readable(self) -> Readable:
        """The file itself."""
        return self._readable

    @property
    def name(self) -> str:
        """What messages call the image."""
        return self._readable.name

    @property
    def header(self) -> Header:
        """The parsed header."""
        return self._header

    @cached_property
    def l1(self) -> U64Array:
        """The active L1 table, ``>u8[header.l1_size]``, at most 32 MiB; entries as stored.

        Kept from the first use on: not for use with all images of a chain.
        """
        return self._l1_part(0, self._header.l1_size)

    def read_l1(self, first: int, end: int) -> U64Array:
        """Entries *first* to *end* of the active L1 table, as numbers; nothing is kept."""
        return self._l1_part(first, min(end, self._header.l1_size)).astype(np.uint64)

    def _l1_part(self, first: int, end: int) -> U64Array:
        offset = self._header.l1_table_offset + first * 8
        return np.frombuffer(self._readable.read(offset, (end - first) * 8), dtype=">u8")
