# SPDX-License-Identifier: Apache-2.0
"""Merges that between them meet everything that decides where the native engine writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.options import Placement
from chainmerge.qcow2.bitmaps import BitmapFlag
from chainmerge.qcow2.bits import BitSet
from tests.support.images import (
    KIB,
    MIB,
    Discard,
    Geometry,
    ImagePlan,
    Operation,
    Write,
    WriteCompressed,
    WriteZeroes,
)
from tests.support.native_merge import NativeMerge, bitmap_set, leaking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COW = Placement.COW
IN_PLACE = Placement.IN_PLACE
AUTO = BitmapFlag.AUTO
DISABLED = BitmapFlag(0)

SMALL = Geometry(512)
PLAIN = Geometry(4 * KIB)
LARGE = Geometry(64 * KIB)
EXTENDED = Geometry(16 * KIB, extended_l2=True)
OLD = Geometry(4 * KIB, compat="0.10")


def write(start: float, length: float, seed: int) -> Operation:
    """Of KiB, as all of these."""
    return Write(int(start * KIB), int(length * KIB), seed)


def zero(start: float, length: float, *, unmap: bool = False) -> Operation:
    return WriteZeroes(int(start * KIB), int(length * KIB), unmap)


def discard(start: float, length: float) -> Operation:
    return Discard(int(start * KIB), int(length * KIB))


def packed(start: float, length: float, seed: int) -> Operation:
    return WriteCompressed(int(start * KIB), int(length * KIB), seed)


def plan(geometry: Geometry | None, size: float, *operations: Operation) -> ImagePlan:
    return ImagePlan(geometry, int(size * KIB), operations)


def scattered(first_seed: int, every: float, length: float, end: float) -> list[Operation]:
    """Writes all over the disk."""
    return [
        write(number * every, length, first_seed + number % 3) for number in range(int(end / every))
    ]


def tombstones(old: Sequence[StoredBitmap], size: int) -> list[StoredBitmap]:
    return [StoredBitmap(b.name, BitSet.empty(size, b.granularity), DISABLED) for b in old]


def united(old: Sequence[StoredBitmap], seed: int, size: int) -> list[StoredBitmap]:
    """The same checkpoints with more bits."""
    more = bitmap_set(seed, len(old) + 1, size)[1:]
    return [
        StoredBitmap(a.name, a.bits.union(b.bits), a.flags) for a, b in zip(old, more, strict=True)
    ]


def long_names(count: int, size: int) -> list[StoredBitmap]:
    """A directory entry of 1 KiB each, and next to nothing besides."""
    return [
        StoredBitmap(f"{number} ".ljust(1000, "x"), BitSet.empty(size, MIB), AUTO)
        for number in range(count)
    ]


def _every_second_leaked(content: bytes) -> bytes:
    return leaking(content, 2)


def _every_leaked(content: bytes) -> bytes:
    return leaking(content, 1)


# A base with data, zeros of both kinds, holes and compressed clusters, and an overlay that meets
# each of them with each of its own; the units are KiB, on clusters of 4 KiB or less.
_MIXED_BASE: Final = (
    packed(256, 64, 9),
    write(0, 96, 1),
    write(160, 33, 2),
    zero(40, 24),
    zero(72, 8, unmap=True),
    write(400, 8, 3),
)
_MIXED_TOP: Final = (
    packed(128, 16, 8),
    packed(264, 4, 7),
    write(8, 10, 4),
    write(44.5, 3, 5),
    zero(20, 8),
    zero(160, 12, unmap=True),
    write(274, 20, 6),
    zero(288, 12),
    write(330, 5, 5),
    discard(84, 8),
    write(400, 8, 6),
)

_SET_A: Final = bitmap_set(1, 3, 512 * KIB)
_SET_ON_MIB: Final = bitmap_set(2, 3, MIB)

# Every second cluster of what was written is free, and no two next to each other.
_HOLES: Final = [discard(number, 0.5) for number in range(16, 96)]

SCENARIOS: Final[Mapping[str, NativeMerge]] = {
    "small clusters": NativeMerge([plan(SMALL, 512, *_MIXED_BASE), plan(SMALL, 512, *_MIXED_TOP)]),
    "small clusters in place": NativeMerge(
        [plan(SMALL, 512, *_MIXED_BASE), plan(SMALL, 512, *_MIXED_TOP)], placement=IN_PLACE
    ),
    "4 KiB": NativeMerge([plan(PLAIN, 512, *_MIXED_BASE), plan(PLAIN, 512, *_MIXED_TOP)]),
    "4 KiB in place": NativeMerge(
        [plan(PLAIN, 512, *_MIXED_BASE), plan(PLAIN, 512, *_MIXED_TOP)], placement=IN_PLACE
    ),
    "64 KiB": NativeMerge(
        [
            plan(LARGE, 1024, write(0, 256, 1), zero(300, 128), packed(512, 64, 9)),
            plan(LARGE, 1024, write(100, 100, 2), zero(400, 64), write(520, 8, 3)),
        ]
    ),
    "64 KiB in place": NativeMerge(
        [
            plan(LARGE, 1024, write(0, 256, 1), zero(300, 128), packed(512, 64, 9)),
            plan(LARGE, 1024, write(100, 100, 2), zero(400, 64), write(520, 8, 3)),
        ],
        placement=IN_PLACE,
    ),
    "nothing but data, all of it in place": NativeMerge(
        [plan(PLAIN, 256, write(0, 128, 1)), plan(PLAIN, 256, *scattered(2, 16, 8, 128))],
        placement=IN_PLACE,
    ),
    "smaller clusters above": NativeMerge(
        [plan(LARGE, 1024, write(0, 300, 1)), plan(SMALL, 1024, *scattered(2, 60, 3.5, 600))]
    ),
    "smaller clusters above, in place": NativeMerge(
        [plan(LARGE, 1024, write(0, 300, 1)), plan(SMALL, 1024, *scattered(2, 60, 3.5, 600))],
        placement=IN_PLACE,
    ),
    "larger clusters above": NativeMerge(
        [plan(SMALL, 512, *_MIXED_BASE), plan(LARGE, 512, write(70, 40, 2), zero(256, 64))]
    ),
    "larger clusters above, in place": NativeMerge(
        [plan(SMALL, 512, *_MIXED_BASE), plan(LARGE, 512, write(70, 40, 2), zero(256, 64))],
        placement=IN_PLACE,
    ),
    "extended over extended": NativeMerge(
        [
            plan(EXTENDED, 512, *_MIXED_BASE[1:]),
            plan(EXTENDED, 512, *_MIXED_TOP[2:], write(420, 0.5, 3)),
        ]
    ),
    "extended over extended, in place": NativeMerge(
        [
            plan(EXTENDED, 512, *_MIXED_BASE[1:]),
            plan(EXTENDED, 512, *_MIXED_TOP[2:], write(420, 0.5, 3)),
        ],
        placement=IN_PLACE,
    ),
    "extended below plain": NativeMerge(
        [
            plan(EXTENDED, 512, packed(256, 64, 9), *_MIXED_BASE[1:]),
            plan(PLAIN, 512, *_MIXED_TOP),
        ]
    ),
    "extended below plain, in place": NativeMerge(
        [
            plan(EXTENDED, 512, packed(256, 64, 9), *_MIXED_BASE[1:]),
            plan(SMALL, 512, *_MIXED_TOP),
        ],
        placement=IN_PLACE,
    ),
    "extended above plain": NativeMerge(
        [plan(PLAIN, 512, *_MIXED_BASE), plan(EXTENDED, 512, *_MIXED_TOP[2:])]
    ),
    "extended above plain, in place": NativeMerge(
        [plan(LARGE, 512, *_MIXED_BASE[1:]), plan(EXTENDED, 512, *_MIXED_TOP[2:])],
        placement=IN_PLACE,
    ),
    "zlib over zstd": NativeMerge(
        [
            plan(Geometry(4 * KIB, compression="zstd"), 512, packed(0, 128, 1), write(200, 20, 2)),
            plan(PLAIN, 512, packed(64, 32, 3), packed(200, 8, 4), write(100, 3, 5)),
        ]
    ),
    "zstd over zlib, in place": NativeMerge(
        [
            plan(PLAIN, 512, packed(0, 128, 1), write(200, 20, 2)),
            plan(
                Geometry(8 * KIB, compression="zstd"),
                512,
                packed(64, 32, 3),
                packed(200, 8, 4),
                write(100, 3, 5),
            ),
        ],
        placement=IN_PLACE,
    ),
    "zeros and discards only": NativeMerge(
        [
            plan(PLAIN, 256, write(0, 200, 1)),
            plan(PLAIN, 256, zero(0, 50), discard(100, 32), zero(150, 8, unmap=True)),
        ]
    ),
    "a larger disk": NativeMerge(
        [plan(PLAIN, 301.5, write(250, 51.5, 1)), plan(PLAIN, 700, write(600, 60, 2))]
    ),
    "a larger disk, in place, nothing written": NativeMerge(
        [plan(SMALL, 200.5, write(150, 50.5, 1)), plan(SMALL, 400)], placement=IN_PLACE
    ),
    "a larger disk above a longer backing file": NativeMerge(
        [
            plan(PLAIN, 600, write(0, 600, 1)),
            plan(SMALL, 100.5, write(40, 10, 2)),
            plan(SMALL, 500, write(450, 20, 3)),
        ],
        base=1,
    ),
    "a larger disk above a longer backing file, extended": NativeMerge(
        [
            plan(None, 600, write(0, 600, 1)),
            plan(EXTENDED, 100.5, write(40, 10, 2)),
            plan(PLAIN, 500, write(450, 20, 3)),
        ],
        base=1,
        placement=IN_PLACE,
    ),
    "a smaller top": NativeMerge(
        [plan(PLAIN, 512, *_MIXED_BASE), plan(SMALL, 299.5, *_MIXED_TOP[2:6])]
    ),
    "an L1 table of several clusters grows": NativeMerge(
        [
            plan(SMALL, 3 * 1024, write(2500, 40, 1)),
            plan(PLAIN, 5 * 1024, write(2520, 40, 2), write(4800, 30, 3)),
        ],
        placement=IN_PLACE,
    ),
    "an L1 table of several clusters": NativeMerge(
        [
            plan(SMALL, 3 * 1024, write(2500, 40, 1)),
            plan(SMALL, 3 * 1024, write(2520, 40, 2), write(2900, 10, 3)),
        ]
    ),
    "an L1 table grows to several clusters, with bitmaps": NativeMerge(
        [plan(SMALL, 1024, write(0, 20, 1)), plan(SMALL, 4 * 1024, write(4000, 20, 3))],
        old=_SET_ON_MIB,
    ),
    "refcounts of 1 bit": NativeMerge(
        [
            plan(Geometry(512, refcount_bits=1), 512, *_MIXED_BASE[1:]),
            plan(SMALL, 512, *_MIXED_TOP),
        ],
        old=_SET_A,
        new=united(_SET_A, 5, 512 * KIB),
    ),
    "refcounts of 8 bits, in place": NativeMerge(
        [
            plan(Geometry(4 * KIB, refcount_bits=8), 512, *_MIXED_BASE),
            plan(SMALL, 512, *_MIXED_TOP),
        ],
        placement=IN_PLACE,
    ),
    "refcounts of 64 bits": NativeMerge(
        [
            plan(Geometry(512, refcount_bits=64), 512, *_MIXED_BASE),
            plan(PLAIN, 512, *_MIXED_TOP),
        ],
        old=_SET_A,
        new=united(_SET_A, 6, 512 * KIB),
    ),
    "a longer refcount table": NativeMerge(
        [
            plan(Geometry(512, refcount_bits=64), 2048, write(0, 1830, 1)),
            plan(LARGE, 2048, write(64, 64, 2), write(1900, 64, 3)),
        ],
        old=bitmap_set(3, 2, 2 * MIB),
    ),
    "pieces longer than a refcount block": NativeMerge(
        [
            plan(Geometry(512, refcount_bits=64), 128, write(0, 20, 1)),
            plan(SMALL, 128, write(15, 20, 2)),
        ],
        new=long_names(70, 128 * KIB),
    ),
    "blocks that describe themselves": NativeMerge(
        [plan(SMALL, 512, write(0, 60, 1)), plan(SMALL, 512, write(40, 200, 2))]
    ),
    "blocks described by blocks that there are": NativeMerge(
        [
            plan(SMALL, 512, write(0, 111, 1), *_HOLES),
            plan(SMALL, 512, write(101, 2, 2)),
        ],
        new=long_names(20, 512 * KIB),
    ),
    "a snapshot in base": NativeMerge(
        [
            plan(PLAIN, 512, *_MIXED_BASE, write(10, 20, 7)),
            plan(PLAIN, 512, *_MIXED_TOP),
        ],
        snapshot_after=5,
    ),
    "a snapshot in base, in place": NativeMerge(
        [
            plan(SMALL, 512, *_MIXED_BASE, write(10, 20, 7)),
            plan(PLAIN, 700, *_MIXED_TOP),
        ],
        snapshot_after=6,
        placement=IN_PLACE,
    ),
    "a snapshot in an extended base, in place": NativeMerge(
        [
            plan(EXTENDED, 512, *_MIXED_BASE[1:], write(10, 2, 7)),
            plan(SMALL, 512, *_MIXED_TOP),
        ],
        snapshot_after=5,
        placement=IN_PLACE,
    ),
    "version 2": NativeMerge(
        [plan(OLD, 512, *_MIXED_BASE[:3]), plan(PLAIN, 512, *_MIXED_TOP)],
    ),
    "version 2 with a backing file, in place, a larger disk": NativeMerge(
        [
            plan(PLAIN, 300, write(0, 300, 9)),
            plan(OLD, 301.5, packed(256, 32, 4), write(10, 20, 1)),
            plan(SMALL, 600, *_MIXED_TOP),
        ],
        base=1,
        placement=IN_PLACE,
    ),
    "four images": NativeMerge(
        [
            plan(PLAIN, 512, *_MIXED_BASE),
            plan(SMALL, 512, write(30, 5, 4), zero(90, 20)),
            plan(LARGE, 512, write(10, 5, 5), packed(320, 64, 6)),
            plan(EXTENDED, 512, *_MIXED_TOP[2:]),
        ],
    ),
    "four images, in place": NativeMerge(
        [
            plan(PLAIN, 512, *_MIXED_BASE),
            plan(SMALL, 300, write(30, 5, 4), zero(90, 20)),
            plan(PLAIN, 700, write(10, 5, 5), packed(320, 64, 6)),
            plan(SMALL, 512, *_MIXED_TOP[2:]),
        ],
        placement=IN_PLACE,
    ),
    "three images above a raw one": NativeMerge(
        [
            plan(None, 512, write(0, 512, 9)),
            plan(LARGE, 512, write(64, 96, 1), zero(200, 64)),
            plan(PLAIN, 512, *_MIXED_TOP),
            plan(SMALL, 512, write(0, 3, 5), zero(70, 1.5), discard(260, 2)),
        ],
        base=1,
    ),
    "a backing file of base's own, in place": NativeMerge(
        [
            plan(PLAIN, 512, write(0, 512, 9)),
            plan(EXTENDED, 512, write(64, 96, 1), zero(200, 64)),
            plan(SMALL, 512, *_MIXED_TOP),
        ],
        base=1,
        placement=IN_PLACE,
    ),
    "bitmaps united": NativeMerge(
        [plan(SMALL, 512, write(0, 30, 1)), plan(PLAIN, 512, write(28, 8, 2))],
        old=_SET_A,
        new=united(_SET_A, 4, 512 * KIB),
    ),
    "bitmaps kept, and one carried over": NativeMerge(
        [plan(PLAIN, 512, write(0, 30, 1)), plan(PLAIN, 512, write(28, 8, 2))],
        old=_SET_A,
        new=[*_SET_A, *bitmap_set(7, 1, 512 * KIB, 512)],
    ),
    "bitmaps pruned, in place": NativeMerge(
        [plan(SMALL, 512, write(0, 30, 1)), plan(SMALL, 512, write(8, 8, 2))],
        old=bitmap_set(8, 6, 512 * KIB, 512),
        new=[],
        placement=IN_PLACE,
    ),
    "bitmaps become tombstones": NativeMerge(
        [plan(SMALL, 512, write(0, 30, 1)), plan(SMALL, 512, write(28, 8, 2))],
        old=_SET_A,
        new=tombstones(_SET_A, 512 * KIB),
    ),
    "bitmaps carried over to a base without": NativeMerge(
        [plan(LARGE, 512, write(0, 70, 1)), plan(LARGE, 512, write(60, 8, 2))],
        new=bitmap_set(9, 4, 512 * KIB, 512),
    ),
    "bitmaps grow with the disk, in place": NativeMerge(
        [plan(SMALL, 512, write(0, 30, 1)), plan(SMALL, 1200, write(1100, 8, 2))],
        old=bitmap_set(10, 4, 512 * KIB, 512),
        placement=IN_PLACE,
    ),
    "metadata preallocated": NativeMerge(
        [plan(PLAIN, 512, write(0, 30, 1)), plan(PLAIN, 512, *_MIXED_TOP)],
        base_options={"preallocation": "metadata"},
    ),
    "all preallocated, in place": NativeMerge(
        [plan(SMALL, 256, write(0, 30, 1)), plan(PLAIN, 256, write(20, 30, 2), zero(200, 16))],
        base_options={"preallocation": "falloc"},
        placement=IN_PLACE,
    ),
    "leaks reclaimed first": NativeMerge(
        [plan(SMALL, 512, *_MIXED_BASE), plan(SMALL, 512, *_MIXED_TOP)],
        old=_SET_A,
        spoil=_every_second_leaked,
    ),
    "leaks reclaimed first, in place": NativeMerge(
        [
            plan(Geometry(4 * KIB, refcount_bits=64), 512, *_MIXED_BASE),
            plan(SMALL, 512, *_MIXED_TOP),
        ],
        spoil=_every_leaked,
        placement=IN_PLACE,
    ),
}
