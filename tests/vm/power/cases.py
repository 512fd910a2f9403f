# SPDX-License-Identifier: Apache-2.0
"""The merges whose power cuts are looked at: built and recorded in the machine, judged outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
DISK: Final = 8 * MIB

LVM: Final = "lvm"
EXT4: Final = "ext4"
XFS: Final = "xfs"

_NO_OPTIONS: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True)
class Image:
    """One image of a chain.

    Attributes:
        name: of the volume or file that it lies on, and by which the image above names it.
        volume: bytes of its volume.
        writes: commands for qemu-io, while it is the active image.
        bitmaps: that it is created with.
        stale: bitmaps that it has besides, and no other image.
        disk: bytes of the guest's disk.
        options: to create it with; None for a raw image.
        snapshot: whether it gets an internal snapshot before it is written to once more.
    """

    name: str
    volume: int
    writes: Sequence[str]
    bitmaps: Sequence[str] = ()
    stale: Sequence[str] = ()
    disk: int = DISK
    options: Mapping[str, str] | None = field(default_factory=lambda: _NO_OPTIONS)
    snapshot: bool = False


@dataclass(frozen=True)
class PowerCase:
    """A chain and the command whose writes are recorded.

    Attributes:
        images: from the root up; the last one is the one that the guest uses.
        command: of chainmerge; ``{top}`` and so on stand for the images' paths.
        result: the image that is written.
        dirty: for each bitmap that the result must have in the end, the ranges (in bytes) that
            were written while it was there.
        storage: what the images lie on.
        ballast: whether the rest of the volume group is taken.
        final_name: what the result is called in the end.
        gone: images that are not there in the end.
        keeps_old: whether the result alone shows either its old or its new content, always.
    """

    images: Sequence[Image]
    command: Sequence[str]
    result: str
    dirty: Mapping[str, Sequence[tuple[int, int]]]
    storage: str = LVM
    ballast: bool = False
    final_name: str | None = None
    gone: Sequence[str] = ()
    keeps_old: bool = False

    @property
    def leaf(self) -> Image:
        return self.images[-1]

    def image(self, name: str) -> Image:
        return next(image for image in self.images if image.name == name)


def _merge(top: str, *options: str) -> tuple[str, ...]:
    return ("merge", *options, top)


_BASE_WRITES = ("write -P 1 0 2M", "write -P 2 5M 512k")
_TOP_WRITES = ("write -P 3 1M 1M", "write -P 4 4M 256k", "write -z 5M 128k")
_CHILD_WRITES = ("write -P 5 7M 64k",)
_IN_BASE = ((0, 2 * MIB), (5 * MIB, 512 * KIB))
_IN_TOP = ((MIB, MIB), (4 * MIB, 256 * KIB), (5 * MIB, 128 * KIB))
_STALE = tuple(f"stale-{number}" for number in range(4))
_SMALL = {"cluster_size": "512"}
_PLAIN = {"cluster_size": "4096"}


def _chain(
    volume: int = 6 * MIB,
    options: Mapping[str, str] | None = None,
    stale: Sequence[str] = (),
) -> tuple[Image, ...]:
    chosen = options or {}
    return (
        Image("base", volume, _BASE_WRITES, ("both",), stale, options=chosen),
        Image("top", 4 * MIB, _TOP_WRITES, ("both", "new"), options=chosen),
        Image("child", 2 * MIB, _CHILD_WRITES, ("both", "new"), options=chosen),
    )


_DIRTY = {"both": (*_IN_BASE, *_IN_TOP), "new": _IN_TOP}

CASES: Final[Mapping[str, PowerCase]] = {
    "commit": PowerCase(
        _chain(), _merge("{top}", "--data", "cow"), "base", _DIRTY, keeps_old=True
    ),
    "commit in place": PowerCase(_chain(), _merge("{top}", "--data", "in-place"), "base", _DIRTY),
    "commit, clusters of 512 bytes": PowerCase(
        _chain(options=_SMALL), _merge("{top}", "--data", "cow"), "base", _DIRTY, keeps_old=True
    ),
    "commit in place, clusters of 4 KiB": PowerCase(
        _chain(options=_PLAIN, stale=_STALE),
        _merge("{top}", "--data", "in-place"),
        "base",
        _DIRTY,
    ),
    "commit into a volume that is extended": PowerCase(
        _chain(volume=4608 * KIB, stale=_STALE),
        _merge("{top}", "--data", "cow"),
        "base",
        _DIRTY,
        keeps_old=True,
    ),
    "commit into a full volume group, stale bitmaps first": PowerCase(
        (
            Image("base", 3584 * KIB, ("write -P 1 0 1536k",), ("both",), _STALE),
            Image("top", 2 * MIB, ("write -P 3 2M 768k",), ("both",)),
        ),
        _merge("{top}"),
        "base",
        {"both": ((0, 1536 * KIB), (2 * MIB, 768 * KIB))},
        ballast=True,
    ),
    "commit of a larger disk": PowerCase(
        (
            Image("base", 6 * MIB, _BASE_WRITES, ("both",)),
            Image("top", 4 * MIB, ("write -P 6 9M 1M",), ("both",), disk=12 * MIB),
        ),
        _merge("{top}"),
        "base",
        {"both": (*_IN_BASE, (9 * MIB, MIB))},
        keeps_old=True,
    ),
    "a range of four images": PowerCase(
        (
            Image("base", 6 * MIB, _BASE_WRITES, ("both",), _STALE),
            Image("first", 2 * MIB, ("write -P 7 2M 512k",), ("both",)),
            Image("second", 2 * MIB, ("write -P 8 2304k 512k", "write -z 1M 64k"), ("both",)),
            Image("top", 4 * MIB, _TOP_WRITES, ("both", "new")),
            Image("child", 2 * MIB, _CHILD_WRITES, ("both", "new")),
        ),
        _merge("{top}", "--base", "{base}", "--data", "cow"),
        "base",
        {"both": (*_IN_BASE, *_IN_TOP, (2 * MIB, 768 * KIB)), "new": _IN_TOP},
        keeps_old=True,
    ),
    "pull": PowerCase(
        _chain(), _merge("{top}", "--direction", "pull"), "top", _DIRTY, keeps_old=True
    ),
    "pull above a root, into a volume that is extended": PowerCase(
        (
            Image("root", 4 * MIB, ("write -P 9 0 3M",)),
            Image("base", 4 * MIB, _BASE_WRITES, ("both",)),
            Image("top", 2 * MIB, _TOP_WRITES, ("both", "new"), _STALE, options=_PLAIN),
        ),
        _merge("{top}", "--direction", "pull"),
        "top",
        {**_DIRTY, **dict.fromkeys(_STALE, _IN_TOP)},
        keeps_old=True,
    ),
    "zeros found, compressed clusters": PowerCase(
        (
            Image("base", 6 * MIB, ("write -c -P 1 0 1M", *_BASE_WRITES[1:]), ("both",)),
            Image("top", 4 * MIB, ("write -c -P 3 512k 1M", "write -P 0 5M 512k"), ("both",)),
        ),
        _merge("{top}", "--detect-zeroes"),
        "base",
        {"both": ((0, MIB), (5 * MIB, 512 * KIB), (512 * KIB, MIB))},
    ),
    "subclusters, with an internal snapshot in base": PowerCase(
        (
            Image(
                "base",
                6 * MIB,
                _BASE_WRITES,
                ("both",),
                options={"extended_l2": "on", "cluster_size": "64k"},
                snapshot=True,
            ),
            Image("top", 4 * MIB, ("write -P 3 1030k 50k", *_TOP_WRITES[1:]), ("both",)),
        ),
        _merge("{top}", "--data", "in-place"),
        "base",
        {"both": (*_IN_BASE, (1030 * KIB, 50 * KIB), *_IN_TOP[1:])},
    ),
    "reduced and discarded afterwards": PowerCase(
        (
            Image("base", 8 * MIB, _BASE_WRITES, ("both",), _STALE),
            Image("top", 4 * MIB, _TOP_WRITES, ("both",)),
        ),
        _merge("{top}", "--shrink", "--leave", "0", "--discard", "--data", "in-place"),
        "base",
        {"both": (*_IN_BASE, *_IN_TOP)},
    ),
    "merged volumes removed": PowerCase(
        _chain(stale=_STALE)[:2],
        _merge("{top}", "--delete"),
        "base",
        _DIRTY,
        gone=("top",),
    ),
    "base takes top's name on volumes": PowerCase(
        (
            Image("base", 6 * MIB, _BASE_WRITES, ("both",), _STALE),
            Image("first", 2 * MIB, ("write -P 7 2M 512k",), ("both",)),
            Image("top", 4 * MIB, _TOP_WRITES, ("both", "new")),
        ),
        _merge(
            "{top}", "--base", "{base}", "--keep-name", "--delete", "--direction", "commit"
        ),
        "base",
        {"both": (*_IN_BASE, *_IN_TOP, (2 * MIB, 512 * KIB)), "new": _IN_TOP},
        final_name="top",
        gone=("base", "first"),
    ),
    "a raw base": PowerCase(
        (
            Image("base", DISK, ("write -P 1 0 2M",), options=None),
            Image("top", 4 * MIB, _TOP_WRITES),
        ),
        _merge("{top}"),
        "base",
        {},
    ),
    "bitmaps pruned": PowerCase(
        _chain(stale=_STALE),
        ("bitmaps", "prune", "{top}"),
        "base",
        {"both": _IN_BASE},
        keeps_old=True,
    ),
    "files on ext4, merged images deleted": PowerCase(
        _chain(stale=_STALE)[:2],
        _merge("{top}", "--delete"),
        "base",
        _DIRTY,
        storage=EXT4,
        gone=("top",),
    ),
    "files on ext4, a range, base takes top's name": PowerCase(
        (
            Image("base", 0, _BASE_WRITES, ("both",), _STALE),
            Image("first", 0, ("write -P 7 2M 512k",), ("both",)),
            Image("top", 0, _TOP_WRITES, ("both", "new")),
            Image("child", 0, _CHILD_WRITES, ("both", "new")),
        ),
        _merge(
            "{top}", "--base", "{base}", "--keep-name", "--delete", "--direction", "commit"
        ),
        "base",
        {"both": (*_IN_BASE, *_IN_TOP, (2 * MIB, 512 * KIB)), "new": _IN_TOP},
        storage=EXT4,
        final_name="top",
        gone=("base", "first"),
    ),
    "files on ext4, pulled": PowerCase(
        _chain(), _merge("{top}", "--direction", "pull", "--delete"), "top", _DIRTY,
        storage=EXT4, gone=("base",),
    ),
    "files on XFS, extents shared": PowerCase(
        _chain(stale=_STALE), _merge("{top}", "--delete"), "base", _DIRTY,
        storage=XFS, gone=("top",),
    ),
}  # fmt: skip
