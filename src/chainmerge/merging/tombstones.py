# SPDX-License-Identifier: Apache-2.0
"""Tombstones that only top needed, once top is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.stored import bitmap_results
from chainmerge.engines.metadata.bitmap_set import KeptBitmap
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.errors import ChainmergeError
from chainmerge.qcow2.bitmaps import read_directory
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import WritablePort

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path


def drop_tombstones(result: Path, names: Collection[str]) -> Iterator[str]:
    """Remove the tombstones of these names; if that fails they stay, which is harmless.

    Yields a warning then.
    """
    if not names:
        return
    try:
        with WritablePort(result) as port:
            image = Qcow2Image(port)
            tombstones = {one.name for one in bitmap_results(image) if one.tombstone}
            spent = tombstones.intersection(names)
            if spent:
                entries = read_directory(image)
                replace_bitmaps(
                    port, [KeptBitmap(entry) for entry in entries if entry.name not in spent]
                )
    except ChainmergeError as error:
        yield f"tombstones that nothing needs any more were left: {error.sentence}"
