# SPDX-License-Identifier: Apache-2.0
"""Merging: the same data by us, verified, and by `qemu-img commit`, unverified."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from benchmarks.harness import CHAINMERGE, Comparison, Contender, compare
from tests.support.qemu import create, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

_MIB = 1 << 20
_DISK = 2048 * _MIB


def merge_of_dense_data(scratch: Path, rounds: int) -> Comparison:
    """512 MiB in one piece."""
    return _merge(scratch, rounds, "merge, 512 MiB in one piece", (f"write -q 0 {512 * _MIB}",))


def merge_of_scattered_clusters(scratch: Path, rounds: int) -> Comparison:
    """2,000 single clusters, every other one."""
    writes = tuple(f"write -q {number * 128}k 64k" for number in range(2000))
    return _merge(scratch, rounds, "merge, 2000 scattered clusters", writes)


def prune_of_stale_bitmaps(scratch: Path, rounds: int) -> Comparison:
    """32 bitmaps of a 1 TiB disk: one command of ours, one each of qemu-img's."""
    template = create(scratch / "template.qcow2", 1 << 40)
    names = [f"stale-{number}" for number in range(32)]
    for name in names:
        qemu_img("bitmap", "--add", template, name)
    base = scratch / "base.qcow2"
    top = create(scratch / "top.qcow2", 1 << 40)
    shutil.copyfile(template, base)
    qemu_img("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, top)

    def prepare() -> None:
        shutil.copyfile(template, base)

    ours = Contender("chainmerge", ((*CHAINMERGE, "bitmaps", "prune", str(top)),), prepare)
    removals = (("qemu-img", "bitmap", "--remove", str(base), name) for name in names)
    theirs = Contender("qemu-img", tuple(removals), prepare)
    return compare("prune 32 bitmaps, 1 TiB disk", ours, theirs, rounds)


def _merge(scratch: Path, rounds: int, title: str, writes: tuple[str, ...]) -> Comparison:
    base_template = create(scratch / "base-template.qcow2", _DISK)
    top_template = create(scratch / "top-template.qcow2", _DISK)
    qemu_io(top_template, *writes)
    place = scratch / "work"
    base, top = place / "base.qcow2", place / "top.qcow2"

    def prepare() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        shutil.copyfile(base_template, base)
        shutil.copyfile(top_template, top)
        qemu_img("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, top)

    return compare(
        title,
        Contender("chainmerge", ((*CHAINMERGE, "merge", str(top)),), prepare),
        Contender("qemu-img", (("qemu-img", "commit", "-q", "-d", str(top)),), prepare),
        rounds,
    )
