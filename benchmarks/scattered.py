# SPDX-License-Identifier: Apache-2.0
"""Merging one overlay: by us, and by `qemu-img commit`, which verifies nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks import copies
from benchmarks.harness import Comparison, Contender, run_rounds
from benchmarks.images import (
    CLUSTER,
    GIB,
    MIB,
    fresh_copy,
    program_loader,
    random_clusters,
    write_clusters,
)
from tests.support.qemu import create, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from benchmarks.harness import Settings

_PEER: Final = "qemu-img commit -t none -d"
_SCATTERED_DISK: Final = 100 * GIB
_SCATTERED_CLUSTERS: Final = 16_000
_SEQUENTIAL_DISK: Final = 4 * GIB
_SEQUENTIAL_SIZE: Final = 1536 * MIB


def scattered(settings: Settings) -> Iterable[Comparison]:
    """16,000 random clusters of a 100 GiB disk."""
    return scattered_in(settings, settings.scratch, "")


def scattered_in(settings: Settings, directory: Path, place: str) -> Iterable[Comparison]:
    """The scattered case with its images in *directory*; *place* is for the title."""

    def fill(top: Path) -> None:
        write_clusters(top, random_clusters(_SCATTERED_CLUSTERS, _SCATTERED_DISK, seed=1))

    return _merges(
        settings,
        directory,
        f"merge, {_SCATTERED_CLUSTERS:,} scattered clusters{place}",
        _SCATTERED_DISK,
        fill,
        _SCATTERED_CLUSTERS * CLUSTER,
    )


def sequential(settings: Settings) -> Iterable[Comparison]:
    """1.5 GiB in one piece."""

    def fill(top: Path) -> None:
        qemu_io(top, *(f"write -q {at} {MIB}" for at in range(0, _SEQUENTIAL_SIZE, MIB)))

    return _merges(
        settings,
        settings.scratch,
        "merge, 1.5 GiB in one piece",
        _SEQUENTIAL_DISK,
        fill,
        _SEQUENTIAL_SIZE,
    )


def _merges(
    settings: Settings,
    directory: Path,
    title: str,
    disk_size: int,
    fill: Callable[[Path], None],
    data_size: int,
) -> Iterable[Comparison]:
    # Images in a directory of their own: chainmerge looks at whatever lies beside them.
    images, templates = directory / "images", directory / "templates"
    images.mkdir()
    templates.mkdir()
    settings.note("building images")
    template = create(templates / "base.qcow2", disk_size)
    base, top = images / "base.qcow2", images / "top.qcow2"
    fresh_copy(template, base)
    create(top, backing=base)
    fill(top)

    def prepare() -> None:
        fresh_copy(template, base)

    def check() -> None:
        qemu_img("compare", "-q", "-f", "qcow2", "-F", "qcow2", top, base)

    def merge_verifying(level: str) -> Contender:
        return Contender(level, (settings.merge(top, "--verify", level),), prepare, check=check)

    commit = ("qemu-img", "commit", "-q", "-t", "none", "-d", str(top))
    outcomes = run_rounds(
        settings,
        (
            merge_verifying("metadata"),
            Contender(_PEER, (commit,), prepare, check=check),
            merge_verifying("full"),
            copies.direct_copy(directory, data_size),
        ),
        load_programs=program_loader(settings),
    )
    for level in ("metadata", "full"):
        yield Comparison(
            f"{title}, --verify {level}",
            outcomes[level],
            _PEER,
            outcomes[_PEER],
            outcomes[copies.NAME],
        )
