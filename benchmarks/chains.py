# SPDX-License-Identifier: Apache-2.0
"""Merging a whole chain into its root, in one go."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from benchmarks import copies
from benchmarks.harness import Comparison, Contender, run_rounds
from benchmarks.images import (
    CLUSTER,
    GIB,
    fresh_copy,
    program_loader,
    random_clusters,
    write_clusters,
)
from tests.support.qemu import create, qemu_img

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from benchmarks.harness import Settings

_PEER: Final = "qemu-img commit -t none -b BASE"
_DISK: Final = 20 * GIB
_CLUSTERS_EACH: Final = 30
_BUILDERS: Final = 2


class _Chain:
    """A chain of images above an empty base. A merge changes its two ends."""

    def __init__(self, settings: Settings, length: int) -> None:
        self._images = settings.scratch / "disk" / "images"
        # Where nobody looks for users of the images: that of top stands on the one below top.
        self._templates = settings.scratch / "templates"
        self._images.mkdir(parents=True)
        self._templates.mkdir()
        self._length = length
        self._expected = self._templates / "expected.qcow2"
        settings.note(f"building {length} images")
        with ThreadPoolExecutor(_BUILDERS) as builders:
            list(builders.map(self._build, range(length)))
        self.base = self._image(0)
        self.top = self._image(length - 1)
        for end in (self.base, self.top):
            fresh_copy(end, self._templates / end.name)

    def prepare(self) -> None:
        """Have base and top as they were, and nothing that tells of a merge."""
        for record in self._images.glob(".*.chainmerge-*"):
            record.unlink()
        for end in (self.base, self.top):
            fresh_copy(self._templates / end.name, end)

    def check(self) -> None:
        """Base must read as an image that all was written to, in the order of the chain.

        To read the chain itself takes QEMU longer than to merge it.
        """
        if not self._expected.exists():
            create(self._expected, _DISK)
            for number in range(1, self._length):
                _write(self._expected, number)
        qemu_img("compare", "-q", "-f", "qcow2", "-F", "qcow2", self._expected, self.base)

    def _image(self, number: int) -> Path:
        return self._images / f"image-{number}.qcow2"

    def _build(self, number: int) -> None:
        image = self._image(number)
        # Without the images below: to open them again and again would take most of the time.
        create(image, _DISK)
        if number == 0:
            return
        _write(image, number)
        qemu_img(
            *("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2"),
            *("-b", self._image(number - 1), image),
        )


def _write(image: Path, number: int) -> None:
    """What the image of this number in the chain holds."""
    write_clusters(image, random_clusters(_CLUSTERS_EACH, _DISK, seed=number))


def chain_of_300(settings: Settings) -> Iterable[Comparison]:
    """300 images of 30 random clusters each."""
    chain = _Chain(settings, 300)

    def merge_verifying(level: str) -> Contender:
        merge = settings.merge(chain.top, "--base", str(chain.base), "--verify", level)
        return Contender(level, (merge,), chain.prepare, check=chain.check)

    commit = ("qemu-img", "commit", "-q", "-t", "none", "-b", str(chain.base), str(chain.top))
    outcomes = run_rounds(
        settings,
        (
            merge_verifying("metadata"),
            Contender(_PEER, (commit,), chain.prepare, check=chain.check),
            merge_verifying("full"),
            copies.direct_copy(settings.scratch, 299 * _CLUSTERS_EACH * CLUSTER),
        ),
        load_programs=program_loader(settings),
    )
    for level in ("metadata", "full"):
        yield Comparison(
            f"merge, chain of 300 images, --verify {level}",
            outcomes[level],
            _PEER,
            outcomes[_PEER],
            outcomes[copies.NAME],
        )


def chain_of_1000(settings: Settings) -> Iterable[Comparison]:
    """1,000 images of 30 random clusters each: by us alone."""
    chain = _Chain(settings, 1000)
    merge = settings.merge(chain.top, "--base", str(chain.base))
    outcomes = run_rounds(
        # Nothing to be paired with, and one run is long enough.
        replace(settings, rounds=1),
        (Contender("chainmerge", (merge,), chain.prepare, check=chain.check),),
        load_programs=program_loader(settings),
    )
    yield Comparison("merge, chain of 1,000 images, --verify full", outcomes["chainmerge"])
