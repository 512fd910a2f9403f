# SPDX-License-Identifier: Apache-2.0
"""Removing many large bitmaps: one command of ours, one each of qemu-img's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.harness import CHAINMERGE, Comparison, Contender, run_rounds
from benchmarks.images import KIB, TIB, fresh_copy, program_loader
from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.engines.metadata.replacement import replace_bitmaps
from chainmerge.qcow2.bitmaps import BitmapFlag
from chainmerge.qcow2.bits import BitSet, packed_size
from chainmerge.storage.files import WritablePort
from tests.support.qemu import bitmap_names, create

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.harness import Settings

_PEER: Final = "qemu-img bitmap --remove, 32 times"
_DISK: Final = 1 * TIB
# 20 bitmaps of 8 MiB and 12 of 16 MiB.
_GRANULARITIES: Final = (16 * KIB,) * 20 + (8 * KIB,) * 12


def prune_of_stale_bitmaps(settings: Settings) -> Iterable[Comparison]:
    """32 bitmaps of a 1 TiB disk, 352 MiB of bits in all, no cluster of them left out."""
    template = create(settings.scratch / "template.qcow2", _DISK)
    bitmaps = [_bitmap(number, granularity) for number, granularity in enumerate(_GRANULARITIES)]
    settings.note("building bitmaps")
    with WritablePort(template) as port:
        replace_bitmaps(port, bitmaps)
    images = settings.scratch / "images"
    images.mkdir()
    base = images / "base.qcow2"
    fresh_copy(template, base)
    top = create(images / "top.qcow2", backing=base)

    def prepare() -> None:
        fresh_copy(template, base)

    def check() -> None:
        assert not bitmap_names(base)

    prune = (*CHAINMERGE, "bitmaps", "prune", str(top))
    removals = tuple(
        ("qemu-img", "bitmap", "--remove", str(base), bitmap.name) for bitmap in bitmaps
    )
    outcomes = run_rounds(
        settings,
        (
            Contender("chainmerge", (prune,), prepare, check=check),
            Contender(_PEER, removals, prepare, check=check),
        ),
        load_programs=program_loader(settings),
    )
    yield Comparison(
        "prune 32 bitmaps of a 1 TiB disk, 352 MiB", outcomes["chainmerge"], _PEER, outcomes[_PEER]
    )


def _bitmap(number: int, granularity: int) -> StoredBitmap:
    # Random bytes: no cluster of them is all zeros or all ones, which would not be stored.
    packed = np.random.default_rng(number).bytes(packed_size(_DISK, granularity))
    bits = BitSet.from_packed(packed, _DISK, granularity)
    return StoredBitmap(f"stale-{number}", bits, BitmapFlag.AUTO)
