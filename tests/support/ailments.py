# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with an image, row by row as in docs/repair.md."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support import qemu
from tests.support.hostile import CLUSTER
from tests.support.surgery import (
    AUTOCLEAR,
    INCOMPATIBLE,
    REFCOUNT_CLUSTERS,
    REFCOUNT_OFFSET,
    mark_bitmap_in_use,
    put_bytes,
)
from tests.support.wounds import OVERLAPS, WOUNDS, Anatomy, inflict, long

if TYPE_CHECKING:
    from tests.support.wounds import Wound

KEPT: Final = {"both": ["auto"], "more": ["auto"]}
TOMBSTONES: Final[dict[str, list[str]]] = {"both": [], "more": []}
FIRST_LOST: Final = {"both": [], "more": ["auto"]}
DIRTY: Final = 1
CORRUPT: Final = 2
_COPIED: Final = 1 << 63


@dataclass(frozen=True)
class Ailment:
    """A kind of damage, and what a repair makes of it.

    ``role`` is the image of ``root <- base <- top`` that is damaged; ``kinds`` are the kinds of
    findings that must be there, ``bitmaps`` the flags by name that are left. ``changes_data``
    says that a guest wrote while the damage came about.
    """

    name: str
    inflict: Callable[[Path], None]
    kinds: frozenset[str]
    bitmaps: dict[str, list[str]] = field(default_factory=lambda: dict(KEPT))
    role: str = "base"
    changes_data: bool = False


def _wound(wound: Callable[[Anatomy], Wound]) -> Callable[[Path], None]:
    return lambda path: inflict(path, wound)


def _in_order(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def inflict_all(path: Path) -> None:
        for step in steps:
            step(path)

    return inflict_all


def _all_in_use(path: Path) -> None:
    for entry in Anatomy(path).bitmaps:
        mark_bitmap_in_use(path, entry.name)


def _killed_while_writing(path: Path) -> None:
    """A guest whose QEMU is killed, which leaves all bitmaps in-use."""
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("write -f -P 9 700k 64k\n")
        process.stdin.flush()
        for line in process.stdout:
            if "wrote" in line:
                break
        process.kill()


def _killed_with_lazy_refcounts(path: Path) -> None:
    qemu.qemu_img("amend", "-f", "qcow2", "-o", "lazy_refcounts=on", path)
    _killed_while_writing(path)
    assert INCOMPATIBLE.get(path) & DIRTY


def _mark(bit: int) -> Callable[[Path], None]:
    return lambda path: INCOMPATIBLE.put(path, INCOMPATIBLE.get(path) | bit)


def _leak(first: int, count: int) -> Callable[[Path], None]:
    """Count clusters behind the end, *first* after it, as used."""

    def leak(path: Path) -> None:
        end = -(-path.stat().st_size // CLUSTER)
        place = Anatomy(path).refcount_block + 2 * (end + first)
        put_bytes(path, place, struct.pack(">H", 1) * count)
        if first == 0:
            put_bytes(path, (end + count) * CLUSTER - 1, b"\0")

    return leak


def _refcounts(value: int, clusters: int) -> Callable[[Anatomy], Wound]:
    """The refcounts of the first clusters of guest data."""

    def wound(anatomy: Anatomy) -> Wound:
        cluster = anatomy.number(anatomy.data[0]) % (1 << 56) // CLUSTER
        return anatomy.refcount_block + 2 * cluster, struct.pack(">H", value) * clusters

    return wound


def _flag(*, copied: bool) -> Callable[[Path], None]:
    """COPIED flags of guest data: cleared, or set on what a snapshot shares."""

    def change(path: Path) -> None:
        if copied:
            qemu.qemu_img("snapshot", "-c", "shared", path)
        anatomy = Anatomy(path)
        places = range(anatomy.l2, anatomy.l2 + CLUSTER, 8)
        plain = [place for place in places if anatomy.number(place) % (1 << 62) >> 9]
        for place in [place for place in plain if not anatomy.number(place) >> 62 & 1][:3]:
            put_bytes(path, place, struct.pack(">Q", anatomy.number(place) ^ _COPIED))

    return change


def _surplus_reference(path: Path) -> None:
    """What an interrupted deletion of an internal snapshot leaves: refcount 2, not COPIED."""
    inflict(path, _refcounts(2, 1))
    anatomy = Anatomy(path)
    inflict(path, lambda a: long(a.data[0], anatomy.number(anatomy.data[0]) ^ _COPIED))


def _unknown_flags(path: Path) -> None:
    entry = Anatomy(path).bitmaps[0]
    put_bytes(path, entry.offset + 12, struct.pack(">I", entry.flags | 1 << 7))


def _everything(path: Path) -> None:
    _all_in_use(path)
    inflict(path, OVERLAPS["refcounts: all 0"])
    inflict(path, WOUNDS["bitmaps: directory too short"])
    INCOMPATIBLE.put(path, INCOMPATIBLE.get(path) | DIRTY | CORRUPT)


_BROKEN: Final = frozenset({"broken-bitmap"})
_DIRECTORY: Final = frozenset({"broken-bitmap-directory"})
_REFCOUNTS: Final = frozenset({"wrong-refcounts"})
_LEAKS: Final = frozenset({"leaked-clusters"})

AILMENTS: Final = (
    Ailment(
        "a bitmap is in-use",
        lambda path: mark_bitmap_in_use(path, "both"),
        _BROKEN,
        FIRST_LOST,
    ),
    Ailment("all bitmaps are in-use", _all_in_use, _BROKEN, {}, role="top"),
    Ailment(
        "QEMU was killed while it wrote to the image",
        _killed_while_writing,
        _BROKEN,
        {},
        role="top",
        changes_data=True,
    ),
    Ailment(
        "a program that does not know bitmaps wrote to the image",
        lambda path: AUTOCLEAR.put(path, 0),
        _BROKEN | _LEAKS,
        TOMBSTONES,
    ),
    *(
        Ailment(
            f"bitmap directory: {what}", _wound(WOUNDS[f"bitmaps: {wound}"]), _DIRECTORY, TOMBSTONES
        )
        for what, wound in (
            ("it is outside the file", "directory outside the file"),
            ("it is not where a cluster starts", "directory within a cluster"),
            ("it is at 0", "directory at 0"),
            ("it is where an L2 table is", "directory somewhere else"),
            ("it is longer than any", "directory too long"),
            ("it is too short for its entries", "directory too short"),
            ("it has more entries than the header says", "fewer than there are"),
            ("it has fewer entries than the header says", "more than there are"),
            ("it was overwritten", "directory of ones"),
        )
    ),
    Ailment(
        "bitmap directory: two entries have one name",
        _wound(WOUNDS["bitmap: two of one name"]),
        _DIRECTORY,
        TOMBSTONES,
    ),
    Ailment(
        "bitmap directory: an entry has extra data without end",
        _wound(WOUNDS["bitmap: extra data without end"]),
        _DIRECTORY,
        TOMBSTONES,
    ),
    *(
        Ailment(f"bitmap: {what}", _wound(WOUNDS[f"bitmap: {wound}"]), _BROKEN, FIRST_LOST)
        for what, wound in (
            ("its table is outside the file", "table outside the file"),
            ("its table is where the L1 table is", "table somewhere else"),
            ("its table has the wrong length", "table too long"),
            ("its bits are outside the file", "bits outside the file"),
            ("its table has reserved bits set", "all bits set, and somewhere"),
        )
    ),
    Ailment(
        "bitmap: its bits are where an L2 table is",
        _wound(OVERLAPS["bitmap: the L2 table is its bits"]),
        _BROKEN,
        FIRST_LOST,
    ),
    Ailment(
        "bitmap: two have the same bits",
        _wound(OVERLAPS["bitmap: two with the same bits"]),
        _BROKEN,
        TOMBSTONES,
    ),
    Ailment("bitmap: its flags are unknown", _unknown_flags, _BROKEN, FIRST_LOST),
    Ailment("clusters are leaked", _leak(0, 5), _LEAKS),
    Ailment("clusters behind the end of the file are marked used", _leak(3, 4), _LEAKS),
    Ailment("a cluster has a surplus reference", _surplus_reference, _LEAKS),
    Ailment("refcounts are too low", _wound(_refcounts(0, 4)), _REFCOUNTS),
    Ailment(
        "refcounts are lost: a block of zeros",
        _wound(OVERLAPS["refcounts: all 0"]),
        _REFCOUNTS,
    ),
    Ailment(
        "refcounts are garbage: a block of ones",
        _wound(OVERLAPS["refcounts: all 65535"]),
        _REFCOUNTS | _LEAKS,
    ),
    Ailment(
        "refcount table: a block is missing",
        _wound(lambda a: long(a.refcount_table, 0)),
        _REFCOUNTS,
    ),
    Ailment(
        "refcount table: a block is outside the file",
        _wound(WOUNDS["refcount table: block outside the file"]),
        _REFCOUNTS,
    ),
    Ailment(
        "refcount table: a block is where an L2 table is",
        _wound(OVERLAPS["refcount table: the L2 table is a block"]),
        _REFCOUNTS,
    ),
    Ailment(
        "refcount table: it is garbage",
        _wound(WOUNDS["refcount table: all ones"]),
        _REFCOUNTS,
    ),
    Ailment(
        "header: the refcount table is outside the file",
        lambda path: REFCOUNT_OFFSET.put(path, 1 << 40),
        _REFCOUNTS,
    ),
    Ailment(
        "header: the refcount table has no clusters",
        lambda path: REFCOUNT_CLUSTERS.put(path, 0),
        _REFCOUNTS,
    ),
    Ailment("COPIED flags are missing", _flag(copied=False), _REFCOUNTS),
    Ailment("COPIED flags are set on what a snapshot shares", _flag(copied=True), _REFCOUNTS),
    Ailment("the dirty bit is set, and nothing is wrong", _mark(DIRTY), frozenset({"dirty-bit"})),
    Ailment(
        "the dirty bit is set, and refcounts are stale",
        _killed_with_lazy_refcounts,
        frozenset({"dirty-bit"}) | _BROKEN,
        {},
        role="top",
        changes_data=True,
    ),
    Ailment("the image is marked corrupt", _mark(CORRUPT), frozenset({"corrupt-bit"})),
    Ailment(
        "the image is marked corrupt, and refcounts are too low",
        _in_order(_wound(_refcounts(0, 4)), _mark(CORRUPT)),
        frozenset({"corrupt-bit"}) | _REFCOUNTS,
    ),
    Ailment(
        "all of it: bitmaps, their directory, refcounts, dirty and corrupt",
        _everything,
        _DIRECTORY | _REFCOUNTS | {"dirty-bit", "corrupt-bit"},
        TOMBSTONES,
    ),
)

HOPELESS: Final[dict[str, Callable[[Path], None]]] = {
    "L1 table: an L2 table is outside the file": _wound(WOUNDS["L1: table outside the file"]),
    "L2 table: data is outside the file": _wound(WOUNDS["L2: data outside the file"]),
    "L2 table: it was overwritten": _wound(WOUNDS["L2: all ones"]),
    "L2 table: data is where the L2 table is": _wound(OVERLAPS["L2: the L2 table is data"]),
    "L2 table: data is where refcounts are": _wound(OVERLAPS["L2: the refcount block is data"]),
    "L2 table: data is where the bitmap directory is": _wound(
        OVERLAPS["L2: the bitmap directory is data"]
    ),
    "internal snapshots: their table is damaged": _wound(
        WOUNDS["snapshots: no table of snapshots"]
    ),
}
"""Damage to what the guest sees: shown, and left alone."""
