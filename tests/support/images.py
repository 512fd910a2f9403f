# SPDX-License-Identifier: Apache-2.0
"""Random qcow2 images and chains: what to build (strategies), and building it with QEMU's tools."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from chainmerge.chain.layers import layer_of_qcow2, layer_of_raw
from chainmerge.chain.view import GuestView
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import FileReadable
from tests.support import qemu

if TYPE_CHECKING:
    from pathlib import Path

SECTOR = 512
KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

# A disk of a random image has at most so many clusters, and at most so many bytes: enough for
# several L2 tables where clusters are small, and quick to convert where they are large.
MAX_CLUSTERS = 300
MAX_DISK = 6 * MIB


@dataclass(frozen=True)
class Geometry:
    """How an image is laid out."""

    cluster_size: int = 64 * KIB
    extended_l2: bool = False
    refcount_bits: int = 16
    compat: str = "1.1"
    compression: str = "zlib"

    @property
    def options(self) -> dict[str, str | int]:
        """Keyword arguments for :func:`tests.support.qemu.create`."""
        options: dict[str, str | int] = {"cluster_size": self.cluster_size, "compat": self.compat}
        if self.compat == "1.1":
            options |= {
                "refcount_bits": self.refcount_bits,
                "extended_l2": "on" if self.extended_l2 else "off",
                "compression_type": self.compression,
            }
        return options

    @property
    def max_disk(self) -> int:
        """The largest disk that is worth giving to a random image of this geometry."""
        return min(MAX_CLUSTERS * self.cluster_size, max(MAX_DISK, 2 * self.cluster_size))


@st.composite
def geometries(
    draw: st.DrawFn,
    min_cluster_size: int = 512,
    max_cluster_size: int = 2 * MIB,
    compats: tuple[str, ...] = ("1.1", "0.10"),
) -> Geometry:
    """Every geometry that qemu-img can create, within the given cluster sizes."""
    bits = st.integers(min_cluster_size.bit_length() - 1, max_cluster_size.bit_length() - 1)
    cluster_size = 1 << draw(bits)
    # Version 2 has one layout only; most images are of version 3.
    compat = compats[0] if draw(st.integers(0, 4)) else compats[-1]
    if compat == "0.10":
        return Geometry(cluster_size, compat=compat)
    return Geometry(
        cluster_size,
        extended_l2=cluster_size >= 16 * KIB and draw(st.booleans()),
        refcount_bits=1 << draw(st.integers(0, 6)),
        compression=draw(st.sampled_from(("zlib", "zstd"))),
    )


@dataclass(frozen=True)
class Write:
    """Write data that tells its place: a repeated pattern of odd length."""

    offset: int
    length: int
    seed: int = 1


@dataclass(frozen=True)
class WriteZeroes:
    """Write zeros; with *unmap* QEMU may free the clusters."""

    offset: int
    length: int
    unmap: bool = False


@dataclass(frozen=True)
class Discard:
    """Discard; what the guest reads there afterwards is QEMU's affair."""

    offset: int
    length: int


@dataclass(frozen=True)
class WriteCompressed:
    """Write whole clusters compressed. QEMU refuses it where a cluster has data of its own."""

    offset: int
    length: int
    seed: int = 1


Operation = Write | WriteZeroes | Discard | WriteCompressed

PATTERN_LENGTH = 2053
SEEDS = range(1, 6)


def pattern(seed: int) -> bytes:
    """The bytes that a write with *seed* repeats: without zeros, and easy to compress."""
    letters = [seed * 16 + letter for letter in range(4)]
    return bytes(random.Random(seed).choices(letters, k=PATTERN_LENGTH))


def apply_writes(
    image: Path, operations: Sequence[Operation], fmt: str = "qcow2", options: tuple[str, ...] = ()
) -> None:
    """Do all *operations* on an image, in order, in one qemu-io process."""
    if not operations:
        return
    commands = [_command(operation, image.parent) for operation in operations]
    qemu.qemu_io(image, *commands, fmt=fmt, options=options)


def _command(operation: Operation, directory: Path) -> str:
    place = f"{operation.offset} {operation.length}"
    match operation:
        case Write(seed=seed):
            return f"write -q -s {_pattern_file(directory, seed)} {place}"
        case WriteCompressed(seed=seed):
            return f"write -q -c -s {_pattern_file(directory, seed)} {place}"
        case WriteZeroes(unmap=unmap):
            return f"write -q -z {'-u ' if unmap else ''}{place}"
        case Discard():
            return f"discard -q {place}"


def _pattern_file(directory: Path, seed: int) -> Path:
    path = directory / f"pattern-{seed}"
    if not path.exists():
        path.write_bytes(pattern(seed))
    return path


@st.composite
def ranges(draw: st.DrawFn, disk_size: int, alignment: int = SECTOR) -> tuple[int, int]:
    """Offset and length of a non-empty range within a disk, the offset aligned.

    Many ranges start and end at a multiple of something larger, where clusters meet.
    """
    coarse = draw(st.sampled_from((alignment, 4 * KIB, 64 * KIB, 128 * KIB)))
    unit = max(alignment, coarse) if coarse < disk_size else alignment
    units = -(-disk_size // unit)
    first = draw(st.integers(0, units - 1))
    count = draw(st.integers(1, min(units - first, max(1, units // 4))))
    offset = first * unit
    return offset, min(count * unit, disk_size - offset)


@st.composite
def operations(
    draw: st.DrawFn, geometry: Geometry, disk_size: int, max_size: int = 8
) -> list[Operation]:
    """Writes of every kind for a fresh image; the compressed ones come first, see there."""
    compressed: list[Operation] = []
    written_up_to = 0
    pieces = draw(st.lists(ranges(disk_size, geometry.cluster_size), max_size=3))
    for seed, (offset, length) in enumerate(sorted(pieces), start=1):
        # What does not shrink is stored as plain data, which QEMU does not compress over.
        if offset >= written_up_to:
            compressed.append(WriteCompressed(offset, length, seed))
            written_up_to = offset + length
    others: list[Operation] = []
    for number in range(draw(st.integers(0, max_size))):
        offset, length = draw(ranges(disk_size))
        choice = draw(st.integers(0, 5))
        if choice <= 2:
            others.append(Write(offset, length, SEEDS[number % len(SEEDS)]))
        elif choice <= 4:
            others.append(WriteZeroes(offset, length, unmap=choice == 4))
        else:
            others.append(Discard(offset, length))
    return compressed + others


LUKS_ATTEMPTS = 50
LUKS_SECRET = ("--object", "secret,id=key,data=secret")


def create_encrypted(
    image: Path, size: int, *, secret: Sequence[str] = LUKS_SECRET, backing: Path | None = None
) -> Path:
    """Create an image with LUKS encryption, its key in the secret of that name."""
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    below = ("-u", "-b", str(backing), "-F", "qcow2") if backing is not None else ()
    create = ("qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", options, *below)
    # QEMU 7.2 measures how fast it can hash by the kernel's clock ticks, and gives up where
    # that took less than one.
    for _ in range(LUKS_ATTEMPTS - 1):
        if qemu.run(*create, image, str(size), expect=(0, 1)).returncode == 0:
            return image
    qemu.run(*create, image, str(size))
    return image


@dataclass(frozen=True)
class ImagePlan:
    """What to build one image of a chain like. A geometry of None means raw."""

    geometry: Geometry | None
    disk_size: int
    operations: Sequence[Operation] = ()


@st.composite
def image_plans(
    draw: st.DrawFn, geometry: Geometry | None = None, disk_size: int | None = None
) -> ImagePlan:
    """A qcow2 image with random content, of random geometry and size where not given."""
    geometry = draw(geometries()) if geometry is None else geometry
    if disk_size is None:
        disk_size = draw(st.integers(1, geometry.max_disk // SECTOR)) * SECTOR
    return ImagePlan(geometry, disk_size, draw(operations(geometry, disk_size)))


@st.composite
def chain_plans(draw: st.DrawFn, min_images: int = 2, max_images: int = 5) -> list[ImagePlan]:
    """A chain from the root up: any geometries, mostly the same size, the root sometimes raw."""
    count = draw(st.integers(min_images, max_images))
    disk_size = draw(st.integers(1, MAX_DISK // 4 // SECTOR)) * SECTOR
    plans = []
    for index in range(count):
        if draw(st.integers(0, 2)) == 0:
            disk_size = draw(st.integers(1, MAX_DISK // 4 // SECTOR)) * SECTOR
        if index == 0 and draw(st.integers(0, 3)) == 0:
            written = draw(operations(Geometry(), disk_size))
            plain = [each for each in written if not isinstance(each, WriteCompressed)]
            plans.append(ImagePlan(None, disk_size, plain))
        else:
            plans.append(draw(image_plans(disk_size=disk_size)))
    return plans


def build_chain(directory: Path, plans: list[ImagePlan]) -> list[Path]:
    """Create and fill the images of a chain; return their paths, from the root up."""
    paths: list[Path] = []
    for index, plan in enumerate(plans):
        raw = plan.geometry is None
        path = directory / f"{index}.{'raw' if raw else 'qcow2'}"
        fmt = "raw" if raw else "qcow2"
        qemu.create(
            path,
            plan.disk_size,
            backing=paths[-1].name if paths else None,
            backing_format="raw" if paths and plans[index - 1].geometry is None else "qcow2",
            fmt=fmt,
            **(plan.geometry.options if plan.geometry is not None else {}),
        )
        apply_writes(path, plan.operations, fmt=fmt)
        paths.append(path)
    return paths


class OpenImage(FileReadable):
    """A file that counts what was read, for tests of what was not."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.bytes_read = 0

    def read(self, offset: int, length: int) -> bytes:
        self.bytes_read += length
        return super().read(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.bytes_read += len(buffer)
        super().read_into(offset, buffer)

    def __del__(self) -> None:
        self.close()


def open_qcow2(path: Path) -> Qcow2Image:
    """Open an image with our own parser."""
    return Qcow2Image(OpenImage(path))


def view_of(paths: list[Path]) -> GuestView:
    """Our own view of a chain that :func:`build_chain` built (or the lower part of one)."""
    layers = []
    for path in paths:
        if path.suffix == ".raw":
            layers.append(layer_of_raw(OpenImage(path)))
        else:
            image = open_qcow2(path)
            layers.append(layer_of_qcow2(image, image.readable))
    return GuestView(tuple(layers))
