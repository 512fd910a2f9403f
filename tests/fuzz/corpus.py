# SPDX-License-Identifier: Apache-2.0
"""Chains of real images, of all geometries, from which cases are made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support import qemu
from tests.support.images import (
    KIB,
    MIB,
    Geometry,
    Operation,
    Write,
    WriteCompressed,
    WriteZeroes,
    apply_writes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

ROLES: Final = ("root", "base", "top")


@dataclass(frozen=True)
class Breed:
    """What the three images of a chain are like; None is a raw one."""

    name: str
    disk: int
    root: Geometry | None
    base: Geometry | None
    top: Geometry
    snapshot: bool = False

    @property
    def geometries(self) -> tuple[Geometry | None, ...]:
        return self.root, self.base, self.top


_PLAIN: Final = Geometry(4 * KIB)
_LARGE: Final = Geometry(64 * KIB)
_HUGE: Final = Geometry(2 * MIB)
_TINY: Final = Geometry(512)
_EXTENDED: Final = Geometry(16 * KIB, extended_l2=True)
_OLD: Final = Geometry(4 * KIB, compat="0.10")

BREEDS: Final[Sequence[Breed]] = (
    Breed("plain", 1 * MIB, _PLAIN, _PLAIN, _PLAIN),
    Breed("tiny clusters", 256 * KIB, _TINY, _TINY, _TINY),
    Breed("large clusters", 2 * MIB, _LARGE, _LARGE, _LARGE),
    Breed("huge clusters", 6 * MIB, _PLAIN, _HUGE, _LARGE),
    Breed("extended L2", 1 * MIB, _EXTENDED, _EXTENDED, _EXTENDED),
    Breed("extended over plain", 1 * MIB, _PLAIN, _PLAIN, _EXTENDED),
    Breed("tiny over extended", 512 * KIB, _LARGE, _EXTENDED, _TINY),
    Breed("version 2", 512 * KIB, _OLD, _OLD, _OLD, snapshot=True),
    Breed("a snapshot", 1 * MIB, _PLAIN, _PLAIN, _PLAIN, snapshot=True),
    Breed("a snapshot, extended L2", 1 * MIB, None, _EXTENDED, _PLAIN, snapshot=True),
    Breed("refcounts of 1 bit", 512 * KIB, _PLAIN, Geometry(512, refcount_bits=1), _TINY),
    Breed("refcounts of 64 bits", 512 * KIB, _TINY, Geometry(512, refcount_bits=64), _PLAIN),
    Breed("refcounts of 4 bits, zstd", 1 * MIB, _PLAIN, Geometry(4 * KIB, False, 4, "1.1", "zstd"),
          Geometry(8 * KIB, compression="zstd")),
    Breed("raw root", 1 * MIB, None, _PLAIN, _LARGE),
    Breed("raw base", 1 * MIB, _PLAIN, None, _PLAIN),
)  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """The images of a breed on disk. A raw base has nothing below it, whatever *root* holds."""

    directory: Path
    breed: Breed

    def image(self, role: str) -> Path:
        return self.directory / role

    @property
    def roles(self) -> tuple[str, ...]:
        """The images that there are."""
        return ROLES if self.breed.base is not None else ROLES[1:]

    @property
    def qcow2_roles(self) -> tuple[str, ...]:
        by_role = dict(zip(ROLES, self.breed.geometries, strict=True))
        return tuple(role for role in self.roles if by_role[role] is not None)


def memory() -> str | None:
    """A directory that is kept in memory, if there is one."""
    place = "/dev/shm"
    return place if os.access(place, os.W_OK) else None


def build(directory: Path, breed: Breed) -> Chain:
    """Create the chain: data, zeros, compressed clusters and bitmaps in each image."""
    directory.mkdir(parents=True)
    chain = Chain(directory, breed)
    below: tuple[str, Geometry | None] | None = None
    for number, role in enumerate(ROLES):
        if role not in chain.roles:
            continue
        geometry = breed.geometries[number]
        _build_image(chain.image(role), breed, number, geometry, below)
        below = role, geometry
    for leftover in directory.glob("pattern-*"):
        leftover.unlink()
    return chain


def _build_image(
    path: Path,
    breed: Breed,
    number: int,
    geometry: Geometry | None,
    below: tuple[str, Geometry | None] | None,
) -> None:
    fmt = "raw" if geometry is None else "qcow2"
    qemu.create(
        path,
        breed.disk,
        backing=below[0] if below else None,
        backing_format="raw" if below and below[1] is None else "qcow2",
        fmt=fmt,
        **({} if geometry is None else geometry.options),
    )
    if geometry is not None and geometry.compat == "1.1":
        for name, granularity in (("both", "512"), ("more", "65536")):
            qemu.qemu_img("bitmap", "--add", "-g", granularity, path, name)
        if number < 2:
            qemu.qemu_img("bitmap", "--add", path, "stale")
    operations = _writes(breed.disk, number, geometry)
    apply_writes(path, operations[:2], fmt=fmt)
    if breed.snapshot and number == 1:
        qemu.qemu_img("snapshot", "-c", "before", path)
    apply_writes(path, operations[2:], fmt=fmt)


def _writes(disk: int, number: int, geometry: Geometry | None) -> list[Operation]:
    """Something that only this image has, and something that the next one hides."""
    unit = max(4 * KIB, disk // 64 // (4 * KIB) * (4 * KIB))
    start = number * 8 * unit
    writes: list[Operation] = [
        Write(start + 4 * unit, 6 * unit, number + 1),
        WriteZeroes((40 + 2 * number) * unit, 4 * unit),
        Write((50 + number) * unit, unit + 512, number + 2),
    ]
    cluster = geometry.cluster_size if geometry else 0
    if geometry is not None and cluster <= 4 * unit:
        place = start // cluster * cluster
        writes.insert(0, WriteCompressed(place, max(cluster, 2 * unit // cluster * cluster), 5))
    return writes
