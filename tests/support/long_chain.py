# SPDX-License-Identifier: Apache-2.0
"""Chains of hundreds of images, without a QEMU process for each of them.

QEMU creates the root and the first overlay. All other images are copies of that overlay, with
another backing name and with clusters of their own put in by hand.
"""

from __future__ import annotations

import os
import random
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chainmerge.engines.metadata.backing import change_backing
from tests.support import qemu, surgery
from tests.support.images import GIB, KIB, SECTOR

CLUSTER = 64 * KIB
CLUSTERS_PER_TABLE = CLUSTER // 8
COPIED = 1 << 63


@dataclass(frozen=True)
class LongChain:
    """A chain from the root up, and the guest clusters that were written to each image."""

    paths: tuple[Path, ...]
    written: tuple[tuple[int, ...], ...]
    disk_size: int

    @property
    def top(self) -> Path:
        return self.paths[-1]

    def deciders(self) -> dict[int, int]:
        """The image that decides on each guest cluster that any image has, by its index."""
        return {cluster: index for index, own in enumerate(self.written) for cluster in own}


def stamp(image: int, cluster: int) -> bytes:
    """What an image holds at the start of a guest cluster; zeros follow."""
    return struct.pack(">QQ", image + 1, cluster) * (SECTOR // 16)


class HeadInMemory:
    """The first clusters of an image, to be rewritten without touching a disk."""

    is_block_device = False

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.content = bytearray(content)

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length]).ljust(length, b"\0")

    def reserve(self, offset: int, length: int) -> None:
        raise AssertionError

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data

    def truncate_to(self, size: int) -> None:
        raise AssertionError

    def punch(self, offset: int, length: int) -> None:
        raise AssertionError

    def flush(self) -> None:
        pass

    def forget_cached(self) -> None:
        pass


def build_long_chain(
    directory: Path,
    images: int,
    writes_per_image: int,
    disk_size: int = 20 * GIB,
    seed: int = 0,
) -> LongChain:
    """Build a chain of sparse images that each have some clusters all over the disk."""
    chooser = random.Random(seed)
    paths = [directory / f"{index:05}.qcow2" for index in range(images)]
    qemu.create(paths[0], disk_size)
    first = qemu.create(paths[1], backing=paths[0].name)
    heads = {False: paths[0].read_bytes(), True: first.read_bytes()}
    written = []
    for index, path in enumerate(paths):
        head = HeadInMemory(str(path), heads[index > 0])
        if index > 1:
            change_backing(head, paths[index - 1].name, "qcow2")
        clusters = tuple(sorted(chooser.sample(range(disk_size // CLUSTER), writes_per_image)))
        _write_image(path, head, index, clusters)
        written.append(clusters)
    return LongChain(tuple(paths), tuple(written), disk_size)


def _write_image(path: Path, head: HeadInMemory, index: int, clusters: tuple[int, ...]) -> None:
    """Put *head* and one table or cluster after the other into a file, with holes between."""
    l1_offset = int.from_bytes(head.read(surgery.L1_OFFSET.offset, 8))
    table_offset = int.from_bytes(head.read(surgery.REFCOUNT_OFFSET.offset, 8))
    block_offset = int.from_bytes(head.read(table_offset, 8))
    end = -(-head.size // CLUSTER)
    entries: list[tuple[int, bytes]] = []
    tables: dict[int, int] = {}
    for cluster in clusters:
        number, within = divmod(cluster, CLUSTERS_PER_TABLE)
        if number not in tables:
            tables[number] = end
            head.write(l1_offset + number * 8, _entry(end))
            end += 1
        entries.append((tables[number] * CLUSTER + within * 8, _entry(end)))
        entries.append((end * CLUSTER, stamp(index, cluster)))
        end += 1
    assert end <= CLUSTER // 2, "more clusters than one refcount block describes"
    head.write(block_offset, np.ones(end, ">u2").tobytes())
    with path.open("wb") as file:
        file.truncate(end * CLUSTER)
        for at in range(0, head.size, 4 * KIB):
            page = head.read(at, 4 * KIB)
            if any(page):
                os.pwrite(file.fileno(), page, at)
        for offset, data in entries:
            os.pwrite(file.fileno(), data, offset)


def _entry(cluster: int) -> bytes:
    return (COPIED | cluster * CLUSTER).to_bytes(8)
