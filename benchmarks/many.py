# SPDX-License-Identifier: Apache-2.0
"""Many small merges: by one process, and of all disks of a VM at once."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from benchmarks import many_merges
from benchmarks.harness import CHAINMERGE, Comparison, Contender, run_rounds
from benchmarks.images import GIB, MIB, fresh_copy, program_loader, random_clusters, write_clusters
from tests.support.qemu import create, qemu_img

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from benchmarks.harness import Settings

_DISKS: Final = 8
_DISK: Final = 20 * GIB
_CLUSTERS_EACH: Final = 200
_PEER: Final = f"qemu-img commit -t none -d, {_DISKS} times"
_MERGES: Final = 10_000


def eight_disks(settings: Settings) -> Iterable[Comparison]:
    """Eight disks of a VM in one command, each with 200 random clusters."""
    templates, images = settings.scratch / "templates", settings.scratch / "images"
    templates.mkdir()
    images.mkdir()
    pairs = [_disk(templates, number) for number in range(_DISKS)]
    tops = [images / top.name for _, top in pairs]

    def prepare() -> None:
        for path in (path for pair in pairs for path in pair):
            fresh_copy(path, images / path.name)

    def check() -> None:
        for base, top in pairs:
            qemu_img("compare", "-q", *("-f", "qcow2", "-F", "qcow2"), top, images / base.name)

    merge = (*CHAINMERGE, "merge", "--engine", settings.engine, *map(str, tops))
    commits = tuple(("qemu-img", "commit", "-q", "-t", "none", "-d", str(top)) for top in tops)
    outcomes = run_rounds(
        settings,
        (
            Contender("chainmerge", (merge,), prepare, check=check),
            Contender(_PEER, commits, prepare, check=check),
        ),
        load_programs=program_loader(settings),
    )
    yield Comparison(
        f"{_DISKS} disks in one command, --verify full",
        outcomes["chainmerge"],
        _PEER,
        outcomes[_PEER],
    )


def _disk(directory: Path, number: int) -> tuple[Path, Path]:
    base = create(directory / f"base-{number}.qcow2", _DISK)
    top = create(directory / f"top-{number}.qcow2", backing=base.name)
    write_clusters(top, random_clusters(_CLUSTERS_EACH, _DISK, seed=number))
    return base, top


def ten_thousand_merges(settings: Settings) -> Iterable[Comparison]:
    """10,000 small overlays, one after the other, by one process that uses the API."""
    base = create(settings.scratch / "base.qcow2", GIB)
    top = create(settings.scratch / "top.qcow2", backing=base)
    write_clusters(top, [0, 64 * MIB])
    command = (sys.executable, "-m", many_merges.__name__, str(top), str(_MERGES))
    outcomes = run_rounds(
        # Nothing to be paired with, and one run is long enough.
        replace(settings, rounds=1),
        (Contender("chainmerge", (command,)),),
        load_programs=None,
    )
    yield Comparison(f"{_MERGES:,} merges by one process, memory flat", outcomes["chainmerge"])
